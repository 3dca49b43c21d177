"""Decoding of interleaved rANS (:mod:`hf_sqf.runtime.sqf_rans`): four implementations that agree to the bit.

``numba`` follows one pointer through the words; ``numpy`` and ``torch`` take a step over all lanes at a time, the
latter on any device; ``reference`` is the plainest, and the definition of the format.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import PROBABILITY_BITS, SYMBOLS, TOTAL, slots
from .sqf_rans import LOWEST, Contexts, Stream, tail_lanes

BACKENDS = ("auto", "numba", "numpy", "torch", "reference")
"""The implementations; "auto" is numba where it is installed, and else numpy."""
_FEW_LANES = 16  # below this a step of vectors costs more than a scalar loop
_SLOT = TOTAL - 1
# What steps of vectors calculate with: numpy converts a Python number anew for each call, which costs as much as the
# calculation.
_SLOT_0D, _BITS_0D, _LOWEST_0D, _WORD_0D = (np.array(value) for value in (_SLOT, PROBABILITY_BITS, LOWEST, 16))


class _Decoder(Protocol):
    """Decodes parts of one array of symbols, in order."""

    def run(self, words: np.ndarray, states: np.ndarray, first: int, last: int) -> int:
        """Decode the symbols ``first..last`` and update the states; return the words read, -1 if there are too few."""

    def symbols(self) -> np.ndarray:
        """Return uint8 (m * n,), what has been decoded."""

    def groups(self) -> np.ndarray | None:
        """Return uint8 (m * n,), the group of each symbol; None without a machine."""


@jit
def _decode_compiled(
    words: np.ndarray,
    states: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    table: np.ndarray,
    classes: int,
    first: int,
    last: int,
    out: np.ndarray,
) -> int:
    """Decode without a state machine. ``words`` is padded by one word a lane, so that a step need not look."""
    lanes, n = states.size, cols.size
    at, end = np.uint64(0), np.uint64(words.size)
    one, none = np.uint64(1), np.uint64(0)
    lane, t, i = 0, first, first // n
    j = first - i * n
    while t < last:
        row = rows[i]
        while j < n and t < last:
            length = min(lanes - lane, n - j, last - t)
            if at + np.uint64(length) > end:
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
        i += 1
        j = 0
    return np.int64(at)


@jit
def _decode_compiled_machine(
    words: np.ndarray,
    states: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    table: np.ndarray,
    classes: int,
    first: int,
    last: int,
    out: np.ndarray,
    step: np.ndarray,
    parity: np.ndarray | None,
    column: np.ndarray,
    groups: np.ndarray,
) -> int:
    """The same with a machine.

    ``column`` uint32 (n,) holds each column's state as ``step`` (2 S,) gives the next by ``2 * state + parity``: bits
    0..8 are twice the state, bit 9 its group, and the rest the first class of that group.
    """
    lanes, n = states.size, cols.size
    at, end = np.uint64(0), np.uint64(words.size)
    one, none = np.uint64(1), np.uint64(0)
    lane, t, i = 0, first, first // n
    j = first - i * n
    while t < last:
        row = rows[i]
        while j < n and t < last:
            length = min(lanes - lane, n - j, last - t)
            if at + np.uint64(length) > end:
                return -1
            for k in range(length):
                x = states[np.uint64(lane + k)]
                state = column[np.uint64(j + k)]
                index = np.uint32(min(max(row + cols[np.uint64(j + k)], 0), classes - 1)) + (state >> np.uint32(10))
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
                groups[np.uint64(t + k)] = np.uint8((state >> np.uint32(9)) & np.uint32(1))
                odd = entry & np.uint32(1) if parity is None else np.uint32(parity[np.uint64(t + k)])
                column[np.uint64(j + k)] = step[(state & np.uint32(0x1FF)) | odd]
            t += length
            j += length
            lane += length
            if lane == lanes:
                lane = 0
        i += 1
        j = 0
    return np.int64(at)


class _Compiled:
    def __init__(self, contexts: Contexts, parity: np.ndarray | None) -> None:
        self.contexts = contexts
        self.out = np.empty(contexts.count, np.uint8)
        self.table = slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1)
        self.parity = parity
        if contexts.machine is not None:
            group = contexts.machine.grid.astype(np.uint32)
            state = (
                np.arange(len(group), dtype=np.uint32) << 1 | group << 9 | (group * np.uint32(contexts.classes)) << 10
            )
            self.step = state[contexts.machine.next_state.reshape(-1)]
            self.column = np.full(len(contexts.cols), state[0])
            self.visited = np.empty(contexts.count, np.uint8)

    def run(self, words: np.ndarray, states: np.ndarray, first: int, last: int) -> int:
        c, padded = self.contexts, np.concatenate([words, np.zeros(len(states), np.uint16)])
        common = (padded, states, c.rows, c.cols, self.table, c.classes, first, last, self.out)
        if c.machine is None:
            return int(_decode_compiled(*common))
        return int(_decode_compiled_machine(*common, self.step, self.parity, self.column, self.visited))

    def symbols(self) -> np.ndarray:
        return self.out

    def groups(self) -> np.ndarray | None:
        return None if self.contexts.machine is None else self.visited


class _Vectors:
    def __init__(self, contexts: Contexts, parity: np.ndarray | None) -> None:
        self.contexts, self.parity = contexts, parity
        table = slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1)
        self.symbol = table.astype(np.uint8)
        self.frequency = (table >> 8 & _SLOT).astype(np.int64)
        self.offset = (table >> 20).astype(np.int64)
        self.slot = contexts.class_index()  # becomes the slot of every symbol
        np.left_shift(self.slot, PROBABILITY_BITS, out=self.slot)
        if contexts.machine is not None:
            self.base = contexts.machine.grid.astype(np.int64) * (contexts.classes * TOTAL)
            self.step = contexts.machine.next_state.reshape(-1).astype(np.uint8)
            # The state of every symbol; that of the next in its column lies n further on.
            self.column = np.zeros(contexts.count + len(contexts.cols), np.uint8)

    def run(self, words: np.ndarray, states: np.ndarray, first: int, last: int) -> int:
        lanes, n, machine = len(states), len(self.contexts.cols), self.contexts.machine
        x, source = states.astype(np.int64), words.astype(np.int64)
        part, low, at, count = np.empty_like(x), np.empty(lanes, np.bool_), 0, len(words)
        # Names of their own: a step is a dozen calls, and looking them up would be a tenth of it.
        take_frequency, take_offset, slots_of_all = self.frequency.take, self.offset.take, self.slot
        mask, add, shift, multiply, less = np.bitwise_and, np.add, np.right_shift, np.multiply, np.less
        for t in range(first, last, lanes):
            end = t + lanes
            if end > last:
                end = last
                states[end - t :] = x[end - t :]
                x, part, low = x[: end - t], part[: end - t], low[: end - t]
            slot = slots_of_all[t:end]
            mask(x, _SLOT_0D, out=part)
            add(slot, part, out=slot)
            if machine is not None:
                add(slot, self.base[self.column[t:end]], out=slot)
            shift(x, _BITS_0D, out=x)
            take_frequency(slot, out=part, mode="clip")
            multiply(x, part, out=x)
            take_offset(slot, out=part, mode="clip")
            add(x, part, out=x)
            reading = less(x, _LOWEST_0D, out=low).nonzero()[0]
            few = len(reading)
            if few:
                if at + few > count:
                    return -1
                x[reading] = x[reading] << _WORD_0D | source[at : at + few]
                at += few
            if machine is not None:
                odd = self.symbol[slot] & 1 if self.parity is None else self.parity[t:end]
                self.column[t + n : end + n] = self.step[self.column[t:end].astype(np.int64) * 2 + odd]
        states[: len(x)] = x
        return at

    def symbols(self) -> np.ndarray:
        return self.symbol[self.slot]

    def groups(self) -> np.ndarray | None:
        if self.contexts.machine is None:
            return None
        return self.contexts.machine.grid.astype(np.uint8)[self.column[: self.contexts.count]]


class _Torch:
    """No step waits for the host."""

    def __init__(self, contexts: Contexts, parity: np.ndarray | None, device: torch.device | str) -> None:
        self.contexts, self.device = contexts, device
        self.table = self._move(slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1))
        self.index = self._move(contexts.class_index()) << PROBABILITY_BITS
        self.entries = torch.empty_like(self.index)
        self.parity = None if parity is None else self._move(parity)
        if contexts.machine is not None:
            self.base = self._move(contexts.machine.grid.astype(np.int64) * (contexts.classes * TOTAL))
            self.step = self._move(contexts.machine.next_state.reshape(-1))
            self.column = self._move(np.zeros(contexts.count + len(contexts.cols)))

    def _move(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    def run(self, words: np.ndarray, states: np.ndarray, first: int, last: int) -> int:
        lanes, n, machine, count = len(states), len(self.contexts.cols), self.contexts.machine, len(words)
        x, source = self._move(states), self._move(np.append(words, 0))
        at = torch.zeros((), dtype=torch.int64, device=self.device)
        for t in range(first, last, lanes):
            end = min(t + lanes, last)
            active = x[: end - t]
            slot = (active & _SLOT) + self.index[t:end]
            if machine is not None:
                slot += self.base[self.column[t:end]]
            entry = self.table[slot]
            self.entries[t:end] = entry
            active = (entry >> 8 & _SLOT) * (active >> PROBABILITY_BITS) + (entry >> 20)
            low = active < LOWEST
            order = torch.cumsum(low, 0)
            word = source[torch.clamp(at + order - 1, 0, count)]
            x[: end - t] = torch.where(low, active << 16 | word, active)
            at = at + order[-1]
            if machine is not None:
                odd = entry & 1 if self.parity is None else self.parity[t:end]
                self.column[t + n : end + n] = self.step[self.column[t:end] * 2 + odd]
        states[:] = x.cpu().numpy().astype(np.uint32)
        return int(at) if int(at) <= count else -1

    def symbols(self) -> np.ndarray:
        symbols: np.ndarray = self.entries.to(torch.uint8).cpu().numpy()
        return symbols

    def groups(self) -> np.ndarray | None:
        if self.contexts.machine is None:
            return None
        visited: np.ndarray = self.column[: self.contexts.count].cpu().numpy()
        return self.contexts.machine.grid.astype(np.uint8)[visited]


class _Reference:
    """A symbol at a time; the quickest for short sequences without numba."""

    def __init__(self, contexts: Contexts, parity: np.ndarray | None) -> None:
        self.rows, self.cols, self.classes = contexts.rows.tolist(), contexts.cols.tolist(), contexts.classes
        self.table = slots(contexts.table.reshape(-1, SYMBOLS)).reshape(-1).tolist()
        self.parity = None if parity is None else parity.tolist()
        machine = contexts.machine
        self.group = [0] if machine is None else machine.grid.tolist()
        self.step = [[0, 0]] if machine is None else machine.next_state.tolist()
        self.column = [0] * len(self.cols)
        self.out, self.visited = bytearray(contexts.count), bytearray(contexts.count)

    def run(self, words: np.ndarray, states: np.ndarray, first: int, last: int) -> int:
        n, lanes, source, x, at = len(self.cols), len(states), words.tolist(), states.tolist(), 0
        for t in range(first, last):
            i, j = divmod(t, n)
            lane, column = (t - first) % lanes, self.column[j]
            self.visited[t] = self.group[column]
            index = self.group[column] * self.classes + min(max(self.rows[i] + self.cols[j], 0), self.classes - 1)
            state = x[lane]
            entry = self.table[index << PROBABILITY_BITS | state & _SLOT]
            state = (entry >> 8 & _SLOT) * (state >> PROBABILITY_BITS) + (entry >> 20)
            if state < LOWEST:
                if at == len(source):
                    return -1
                state = state << 16 | source[at]
                at += 1
            x[lane] = state
            self.out[t] = entry & 0xFF
            self.column[j] = self.step[column][entry & 1 if self.parity is None else self.parity[t]]
        states[:] = x
        return at

    def symbols(self) -> np.ndarray:
        return np.frombuffer(self.out, np.uint8)

    def groups(self) -> np.ndarray | None:
        return np.frombuffer(self.visited, np.uint8) if len(self.step) > 1 else None


def _decoder(
    backend: str, lanes: int, contexts: Contexts, parity: np.ndarray | None, device: torch.device | str
) -> _Decoder:
    if backend == "auto":
        backend = "numba" if HAVE_NUMBA else "numpy"
    if backend == "numba":
        if not HAVE_NUMBA:
            raise ValueError("backend 'numba' needs the package numba, which is not installed")
        return _Compiled(contexts, parity)
    if backend == "reference" or (backend in ("numpy", "torch") and lanes < _FEW_LANES):
        return _Reference(contexts, parity)
    if backend == "torch":
        return _Torch(contexts, parity, device)
    if backend == "numpy":
        return _Vectors(contexts, parity)
    raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")


def decode(
    stream: Stream,
    contexts: Contexts,
    parity: np.ndarray | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the symbols, int8 (m * n,), and with a machine the group of each, uint8 (m * n,).

    Args:
        stream: what :func:`hf_sqf.runtime.sqf_rans.encode` made, of at least one lane and with a tail shorter than
            the array. With a machine, there must not be more lanes than columns.
        contexts: the models that the encoder used.
        parity: uint8 (m * n,), what drives the machine where it is not the symbols' own parity.
        backend: one of ``BACKENDS``.
        device: where the torch backend works.

    Raises:
        ValueError: the words do not end where the symbols do, or a lane does not end as one can begin.
    """
    decoder = _decoder(backend, len(stream.states), contexts, parity, device)
    states, middle = stream.states.astype(np.uint32), contexts.count - stream.tail
    whole = decoder.run(stream.words, states, 0, middle) == len(stream.words)
    carried = states - np.uint32(LOWEST)
    whole &= bool((carried < LOWEST).all())
    if whole and stream.tail:
        words, few = carried.astype("<u2"), tail_lanes(len(carried))
        states, words = words[: 2 * few].view("<u4").astype(np.uint32), words[2 * few :]
        whole &= bool((states >= LOWEST).all())
        read = decoder.run(words, states, middle, contexts.count)
        whole &= read >= 0 and not words[read:].any() and bool((states == LOWEST).all())
    elif carried.any():
        whole = False
    if not whole:
        raise ValueError("entropy-coded symbols are damaged")
    return decoder.symbols().view(np.int8), decoder.groups()
