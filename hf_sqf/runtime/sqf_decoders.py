"""Decoding of interleaved rANS (:mod:`hf_sqf.runtime.sqf_rans`): four implementations that agree to the bit.

``numba`` follows one pointer through the words; ``numpy`` and ``torch`` take a step over all lanes at a time, the
latter on any device; ``reference`` is the plainest, and the definition of the format.
"""

from __future__ import annotations

import numpy as np
import torch

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import PROBABILITY_BITS, SYMBOLS, TOTAL, slots
from .sqf_rans import LOWEST, Contexts

BACKENDS = ("auto", "numba", "numpy", "torch", "reference")
"""The implementations; "auto" is numba where it is installed, and else numpy."""
_FEW_LANES = 16  # below this a step of vectors costs more than a scalar loop


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
