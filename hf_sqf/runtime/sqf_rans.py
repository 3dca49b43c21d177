"""Interleaved rANS: symbols <-> lane states and 16-bit words (Duda, arXiv 1311.2540; Giesen, arXiv 1402.3392).

Symbol t of a row-major (m, n) array belongs to lane ``t mod L``. A lane is a 32-bit state of at least 2^16;
decoding a symbol takes the low 12 bits of its state as a slot of the symbol's class,

    x <- frequency * (x >> 12) + offset;    if x < 2^16:  x <- x << 16 | next word

and all lanes read one sequence of words, in the order of the symbols. So a compiled loop follows one pointer, and
a step over all lanes is a handful of vector operations. Every lane starts the encoder, and must end the decoder,
at 2^16.

The class of symbol (i, j) is ``clip(rows[i] + cols[j], 0, classes - 1)``, and with a state machine
(:mod:`hf_sqf.runtime.sqf_trellis`) the state of its column picks one of the groups of classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import PROBABILITY_BITS, SYMBOLS, TOTAL, slots
from .sqf_trellis import Machine

LOWEST = 1 << 16
"""The least state of a lane, and the one it starts the encoder from."""
BACKENDS = ("auto", "numba", "numpy", "torch", "reference")
"""The implementations of decoding. They agree to the bit."""
_FEW_LANES = 16  # below this a step of vectors costs more than a scalar loop


@dataclass(frozen=True)
class Contexts:
    """What the probabilities of a symbol are looked up by.

    Attributes:
        rows: int32 (m,), the rows' part of the class.
        cols: int32 (n,), the columns' part.
        table: int32 (groups, classes, 256), frequencies out of 4096.
        machine: the state machine of the columns, if any.
        group_of_state: (S,) group of each state of the machine; empty without one.
    """

    rows: np.ndarray
    cols: np.ndarray
    table: np.ndarray
    machine: Machine | None = None
    group_of_state: tuple[int, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes in a group."""
        return self.table.shape[1]

    @property
    def count(self) -> int:
        """Number of symbols m * n."""
        return len(self.rows) * len(self.cols)

    def class_index(self) -> np.ndarray:
        """int64 (m * n,): each symbol's class."""
        return np.clip(np.add.outer(self.rows, self.cols), 0, self.classes - 1).astype(np.int64).reshape(-1)

    def select(self, first: int, last: int) -> Contexts:
        """Return the contexts of the rows ``first..last``."""
        return Contexts(self.rows[first:last], self.cols, self.table, self.machine, self.group_of_state)


# ---------------------------------------------------------------------------------------------- encoding


@jit
def _encode_compiled(
    symbols: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    starts: np.ndarray,
    classes: int,
    states: np.ndarray,
    words: np.ndarray,
) -> int:
    lanes, n = states.size, cols.size
    at, t = words.size, symbols.size
    lane = (t - 1) % lanes
    for i in range(rows.size - 1, -1, -1):
        row = rows[i]
        for j in range(n - 1, -1, -1):
            t -= 1
            index = min(max(row + cols[j], 0), classes - 1)
            if groups.size:
                index += groups[t] * classes
            entry = starts[index * 256 + symbols[t] + 128]
            frequency = np.uint32(entry & np.uint32(0xFFFF))
            x = states[lane]
            if x >> np.uint32(20) >= frequency:
                at -= 1
                words[at] = x & np.uint32(0xFFFF)
                x = np.uint32(x >> np.uint32(16))
            q = np.uint32(x // frequency)
            states[lane] = np.uint32((q << np.uint32(12)) + (x - q * frequency) + (entry >> np.uint32(16)))
            lane = lane - 1 if lane else lanes - 1
    return at


def _encode_vectors(symbols: np.ndarray, index: np.ndarray, starts: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Encode with steps over all lanes; ``states`` is updated. Return the words."""
    lanes, count = len(states), len(symbols)
    entries = starts[index * SYMBOLS + (symbols.astype(np.int64) + 128)].astype(np.int64)
    x = states.astype(np.int64)
    blocks = []
    for t in range((count - 1) // lanes * lanes, -1, -lanes):
        entry = entries[t : t + lanes]
        active = x[: len(entry)]
        frequency = entry & 0xFFFF
        full = active >> 20 >= frequency
        blocks.append((active[full] & 0xFFFF).astype(np.uint16))
        active[full] >>= 16
        q = active // frequency
        active[:] = (q << PROBABILITY_BITS) + (active - q * frequency) + (entry >> 16)
    states[:] = x.astype(np.uint32)
    return np.concatenate(blocks[::-1]) if blocks else np.zeros(0, np.uint16)


def encode(
    symbols: np.ndarray, groups: np.ndarray | None, contexts: Contexts, lanes: int, compiled: bool = HAVE_NUMBA
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lanes' states, uint32 (lanes,), and the words, uint16 (w,), in the decoder's order.

    Args:
        symbols: int8 (m * n,), all of them with a frequency above 0 in their class.
        groups: uint8 (m * n,), each symbol's group of classes, or None for group 0.
        contexts: the models.
        lanes: number of lanes L.
        compiled: use the numba kernel; the bytes are the same.
    """
    table = contexts.table.reshape(-1, SYMBOLS)
    starts = ((np.cumsum(table, axis=1) - table).astype(np.uint32) << 16 | table.astype(np.uint32)).reshape(-1)
    states = np.full(lanes, LOWEST, np.uint32)
    if compiled:
        words = np.empty(len(symbols), np.uint16)
        given = np.zeros(0, np.uint8) if groups is None else groups
        at = _encode_compiled(symbols, given, contexts.rows, contexts.cols, starts, contexts.classes, states, words)
        return states, words[at:].copy()
    index = contexts.class_index()
    if groups is not None:
        index += groups.astype(np.int64) * contexts.classes
    return states, _encode_vectors(symbols, index, starts, states)


# ---------------------------------------------------------------------------------------------- decoding


@jit
def _decode_compiled(
    words: np.ndarray,
    states: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    table: np.ndarray,
    classes: int,
    out: np.ndarray,
) -> int:
    """Decode without a state machine; returns the number of words read, or -1 when they do not suffice."""
    lanes, n = states.size, cols.size
    at, last = np.uint64(0), np.uint64(words.size)
    one, none = np.uint64(1), np.uint64(0)
    lane, t = 0, 0
    for i in range(rows.size):
        row, j = rows[i], 0
        while j < n:
            length = min(lanes - lane, n - j)
            if at + np.uint64(length) > last:  # words are padded by one step, so this means too few
                return -1
            for k in range(length):
                x = states[np.uint64(lane + k)]
                index = np.uint32(min(max(row + cols[np.uint64(j + k)], 0), classes - 1))
                entry = table[(index << np.uint32(12)) | (x & np.uint32(0xFFF))]
                x = np.uint32(
                    ((entry >> np.uint32(8)) & np.uint32(0xFFF)) * (x >> np.uint32(12)) + (entry >> np.uint32(20))
                )
                word = np.uint32(words[at])
                low = x < np.uint32(65536)
                x = np.uint32((x << np.uint32(16)) | word) if low else x
                at += one if low else none
                states[np.uint64(lane + k)] = x
                out[np.uint64(t + k)] = np.uint8(entry & np.uint32(0xFF))
            t += length
            j += length
            lane += length
            if lane == lanes:
                lane = 0
    return np.int64(at)


@jit
def _decode_compiled_machine(
    words: np.ndarray,
    states: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    table: np.ndarray,
    classes: int,
    base: np.ndarray,
    step: np.ndarray,
    parity: np.ndarray,
    out: np.ndarray,
) -> int:
    """The same with a state machine: ``base`` (S,) first class of each state, ``step`` (2 S,) the next states."""
    lanes, n = states.size, cols.size
    at, last = np.uint64(0), np.uint64(words.size)
    one, none = np.uint64(1), np.uint64(0)
    column = np.zeros(n, np.uint8)
    planes = parity.size > 0
    lane, t = 0, 0
    for i in range(rows.size):
        row, j = rows[i], 0
        while j < n:
            length = min(lanes - lane, n - j)
            if at + np.uint64(length) > last:
                return -1
            for k in range(length):
                x = states[np.uint64(lane + k)]
                state = np.uint32(column[np.uint64(j + k)])
                index = np.uint32(min(max(row + cols[np.uint64(j + k)], 0), classes - 1)) + base[state]
                entry = table[(index << np.uint32(12)) | (x & np.uint32(0xFFF))]
                x = np.uint32(
                    ((entry >> np.uint32(8)) & np.uint32(0xFFF)) * (x >> np.uint32(12)) + (entry >> np.uint32(20))
                )
                word = np.uint32(words[at])
                low = x < np.uint32(65536)
                x = np.uint32((x << np.uint32(16)) | word) if low else x
                at += one if low else none
                states[np.uint64(lane + k)] = x
                out[np.uint64(t + k)] = np.uint8(entry & np.uint32(0xFF))
                odd = np.uint32(parity[np.uint64(t + k)]) if planes else entry & np.uint32(1)
                column[np.uint64(j + k)] = step[(state << np.uint32(1)) | odd]
            t += length
            j += length
            lane += length
            if lane == lanes:
                lane = 0
    return np.int64(at)


def _decode_vectors(
    words: np.ndarray, states: np.ndarray, contexts: Contexts, parity: np.ndarray | None, out: np.ndarray
) -> int:
    """Decode with steps over all lanes in numpy. Return the number of words read, or -1 when they do not suffice."""
    lanes, count, n = len(states), contexts.count, len(contexts.cols)
    table = slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1).astype(np.int64)
    index = contexts.class_index() << PROBABILITY_BITS
    machine = contexts.machine
    if machine is not None:
        base = np.array(contexts.group_of_state, np.int64) * (contexts.classes * TOTAL)
        step = machine.next_state.reshape(-1).astype(np.uint8)
        column = np.zeros(count + n, np.uint8)  # the state of every symbol: that of the row above moves n on
    entries = np.empty(count, np.int64)
    x, source = states.astype(np.int64), words.astype(np.int64)
    slot, part, low = np.empty_like(x), np.empty_like(x), np.empty(lanes, np.bool_)
    at = 0
    for t in range(0, count, lanes):
        end = min(t + lanes, count)
        entry = entries[t:end]
        if end - t < lanes:
            x, slot, part, low = x[: end - t], slot[: end - t], part[: end - t], low[: end - t]
        np.bitwise_and(x, TOTAL - 1, out=slot)
        np.add(slot, index[t:end], out=slot)
        if machine is not None:
            np.add(slot, base[column[t:end]], out=slot)
        table.take(slot, out=entry, mode="clip")
        np.right_shift(x, PROBABILITY_BITS, out=x)
        np.right_shift(entry, 8, out=part)
        np.bitwise_and(part, TOTAL - 1, out=part)
        np.multiply(x, part, out=x)
        np.right_shift(entry, 20, out=part)
        np.add(x, part, out=x)
        reading = np.less(x, LOWEST, out=low).nonzero()[0]
        if len(reading):
            read = source[at : at + len(reading)]
            if len(read) < len(reading):
                return -1
            x[reading] = x[reading] << 16 | read
            at += len(reading)
        if machine is not None:
            odd = entry & 1 if parity is None else parity[t:end]
            column[t + n : end + n] = step[column[t:end].astype(np.int64) * 2 + odd]
        states[: end - t] = x
    out[:] = entries.astype(np.uint8)
    return at


def _decode_torch(
    words: np.ndarray, states: np.ndarray, contexts: Contexts, parity: np.ndarray | None, out: np.ndarray,
    device: torch.device | str,
) -> int:  # fmt: skip
    """Decode with steps over all lanes in torch: no step waits for the host, so that it suits any device."""

    def move(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(a.astype(np.int64))).to(device)

    lanes, count, n = len(states), contexts.count, len(contexts.cols)
    table = move(slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1))
    index = move(contexts.class_index()) << PROBABILITY_BITS
    machine = contexts.machine
    if machine is not None:
        base = move(np.array(contexts.group_of_state, np.int64) * (contexts.classes * TOTAL))
        step = move(machine.next_state.reshape(-1))
        column = torch.zeros(count + n, dtype=torch.int64, device=device)
        odd_plane = None if parity is None else move(parity)
    entries = torch.empty(count, dtype=torch.int64, device=device)
    x, source = move(states), move(np.append(words, 0))
    last = len(words)
    at = torch.zeros((), dtype=torch.int64, device=device)
    for t in range(0, count, lanes):
        end = min(t + lanes, count)
        active = x[: end - t]
        slot = (active & TOTAL - 1) + index[t:end]
        if machine is not None:
            slot += base[column[t:end]]
        entry = table[slot]
        entries[t:end] = entry
        active = (entry >> 8 & TOTAL - 1) * (active >> PROBABILITY_BITS) + (entry >> 20)
        low = active < LOWEST
        order = torch.cumsum(low, 0)
        word = source[torch.clamp(at + order - 1, 0, last)]
        x[: end - t] = torch.where(low, active << 16 | word, active)
        at = at + order[-1]
        if machine is not None:
            odd = entry & 1 if odd_plane is None else odd_plane[t:end]
            column[t + n : end + n] = step[column[t:end] * 2 + odd]
    out[:] = entries.to(torch.uint8).cpu().numpy()
    states[:] = x.cpu().numpy().astype(np.uint32)
    return int(at) if int(at) <= last else -1


def _decode_reference(
    words: np.ndarray, states: np.ndarray, contexts: Contexts, parity: np.ndarray | None, out: np.ndarray
) -> int:
    """Decode a symbol at a time: the definition of the format, and the quickest for short sequences without numba."""
    lanes, n, classes = len(states), len(contexts.cols), contexts.classes
    table = slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1).tolist()
    x, source, cols, machine = states.tolist(), words.tolist(), contexts.cols.tolist(), contexts.machine
    column = [0] * n
    group = contexts.group_of_state or (0,)
    step = [[0, 0]] if machine is None else machine.next_state.tolist()
    odd_plane = None if parity is None else parity.tolist()
    decoded = bytearray(contexts.count)
    at = t = 0
    for row in contexts.rows.tolist():
        for j in range(n):
            index = group[column[j]] * classes + min(max(row + cols[j], 0), classes - 1)
            state = x[t % lanes]
            entry = table[index << PROBABILITY_BITS | state & TOTAL - 1]
            state = (entry >> 8 & TOTAL - 1) * (state >> PROBABILITY_BITS) + (entry >> 20)
            if state < LOWEST:
                if at == len(source):
                    return -1
                state = state << 16 | source[at]
                at += 1
            x[t % lanes] = state
            decoded[t] = entry & 0xFF
            column[j] = step[column[j]][entry & 1 if odd_plane is None else odd_plane[t]]
            t += 1
    out[:] = np.frombuffer(decoded, np.uint8)
    states[:] = x
    return at


def decode(
    states: np.ndarray,
    words: np.ndarray,
    contexts: Contexts,
    parity: np.ndarray | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return the symbols, int8 (m * n,).

    Args:
        states: uint32 (L,), the lanes' states.
        words: uint16 (w,), the words.
        contexts: the models that the encoder used. With a machine, L must not exceed n.
        parity: uint8 (m * n,), what drives the machine where it is not the symbols' own parity.
        backend: one of ``BACKENDS``; "auto" takes numba, or numpy where there is none.
        device: where the torch backend works.

    Raises:
        ValueError: the words do not end where the symbols do, or a lane does not end at 2^16.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    if backend == "numba" and not HAVE_NUMBA:
        raise ValueError("backend 'numba' needs the package numba, which is not installed")
    if backend == "auto":
        backend = "numba" if HAVE_NUMBA else "numpy"
    if backend == "numpy" and len(states) < _FEW_LANES:
        backend = "reference"
    out = np.empty(contexts.count, np.uint8)
    x = states.astype(np.uint32)
    if backend == "numba":
        padded = np.concatenate([words, np.zeros(len(x), np.uint16)])
        table = slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1)
        common = (padded, x, contexts.rows, contexts.cols, table, contexts.classes)
        if contexts.machine is None:
            read = _decode_compiled(*common, out)
        else:
            base = np.array(contexts.group_of_state, np.uint32) * np.uint32(contexts.classes)
            step = contexts.machine.next_state.reshape(-1).astype(np.uint8)
            odd = np.zeros(0, np.uint8) if parity is None else parity
            read = _decode_compiled_machine(*common, base, step, odd, out)
    elif backend == "numpy":
        read = _decode_vectors(words, x, contexts, parity, out)
    elif backend == "torch":
        read = _decode_torch(words, x, contexts, parity, out, device)
    else:
        read = _decode_reference(words, x, contexts, parity, out)
    if read != len(words) or (x != LOWEST).any():
        raise ValueError("entropy-coded symbols are damaged")
    return out.view(np.int8)
