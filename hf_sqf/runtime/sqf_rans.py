"""Interleaved rANS: symbols -> lane states and 16-bit words (Duda, arXiv 1311.2540; Giesen, arXiv 1402.3392).

Decoding is in :mod:`hf_sqf.runtime.sqf_decoders`; what both do is told here.

Symbol t of a row-major (m, n) array belongs to lane ``t mod L``. A lane is a 32-bit state of at least 2^16;
decoding a symbol takes the low 12 bits of its state as a slot of the symbol's class,

    x <- frequency * (x >> 12) + offset;    if x < 2^16:  x <- x << 16 | next word

and all lanes read one sequence of words, in the order of the symbols. So a compiled loop follows one pointer, and
a step over all lanes is a handful of vector operations.

The encoder goes backwards. It may start a lane from any state in 2^16..2^17 - 1, and the decoder ends there: 16 bits
a lane that would be lost. They carry the last symbols, coded first and by fewer lanes (:func:`tail_lanes`): the
states of those lanes, as two words each, their words, and zeros.

The class of symbol (i, j) is ``clip(rows[i] + cols[j], 0, classes - 1)``, and with a state machine
(:mod:`hf_sqf.runtime.sqf_trellis`) the state of its column picks one of the groups of classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import PROBABILITY_BITS, SYMBOLS
from .sqf_trellis import Machine

LOWEST = 1 << 16
"""The least state of a lane."""


@dataclass(frozen=True)
class Contexts:
    """What the probabilities of a symbol are looked up by.

    Attributes:
        rows: int32 (m,), the rows' part of the class.
        cols: int32 (n,), the columns' part.
        table: int32 (groups, classes, 256), frequencies out of 4096; one group, or one for each grid of the machine.
        machine: the state machine of the columns, if any.
    """

    rows: np.ndarray
    cols: np.ndarray
    table: np.ndarray
    machine: Machine | None = None

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
        index = np.add.outer(self.rows.astype(np.int64), self.cols.astype(np.int64)).reshape(-1)
        low, high = (int(f(self.rows)) + int(f(self.cols)) for f in (np.min, np.max))
        if low < 0 or high >= self.classes:
            np.clip(index, 0, self.classes - 1, out=index)
        return index

    def select(self, first: int, last: int) -> Contexts:
        """Return the contexts of the rows ``first..last``."""
        return Contexts(self.rows[first:last], self.cols, self.table, self.machine)


@dataclass(frozen=True)
class Stream:
    """Coded symbols.

    Attributes:
        states: uint32 (L,), the lanes' states.
        words: uint16 (w,), in the decoder's order.
        tail: how many of the last symbols are carried by the states that the decoder ends with.
    """

    states: np.ndarray
    words: np.ndarray
    tail: int


def tail_lanes(lanes: int) -> int:
    """Return the number of lanes that the tail of a stream of ``lanes`` has."""
    return (lanes + 15) // 16


@jit
def _encode_compiled(
    symbols: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    starts: np.ndarray,
    classes: int,
    first: int,
    states: np.ndarray,
    words: np.ndarray,
) -> int:
    """Encode the symbols from ``first`` on, ``len(words)`` of them; ``words`` is filled from its end."""
    lanes, n = states.size, cols.size
    at = words.size
    t = first + at
    lane = (at - 1) % lanes
    i = (t - 1) // n
    j = (t - 1) - i * n
    while t > first:
        row = rows[i]
        while j >= 0 and t > first:
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
            j -= 1
        i -= 1
        j = n - 1
    return at


def _encode_vectors(entries: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Encode symbols given by their start << 16 | frequency, with steps over all lanes. Return the words."""
    lanes, count = len(states), len(entries)
    x = states.astype(np.int64)
    blocks = []
    for t in range((count - 1) // lanes * lanes, -1, -lanes):
        entry = entries[t : t + lanes].astype(np.int64)
        active = x[: len(entry)]
        frequency = entry & 0xFFFF
        full = active >> 20 >= frequency
        blocks.append((active[full] & 0xFFFF).astype(np.uint16))
        active[full] >>= 16
        q = active // frequency
        active[:] = (q << PROBABILITY_BITS) + (active - q * frequency) + (entry >> 16)
    states[:] = x.astype(np.uint32)
    return np.concatenate(blocks[::-1]) if blocks else np.zeros(0, np.uint16)


class _Encoder:
    """Encodes parts of one array of symbols."""

    def __init__(self, symbols: np.ndarray, groups: np.ndarray | None, contexts: Contexts, compiled: bool) -> None:
        self.symbols, self.groups, self.contexts, self.compiled = symbols, groups, contexts, compiled
        table = contexts.table.reshape(-1, SYMBOLS)
        starts = (np.cumsum(table, axis=1) - table).astype(np.uint32) << 16
        self.starts = (starts | table.astype(np.uint32)).reshape(-1)

    def entries(self, first: int, last: int) -> np.ndarray:
        """Return start << 16 | frequency, uint32, of the symbols ``first..last``."""
        n = len(self.contexts.cols)
        top = first // n
        index = self.contexts.select(top, -(-last // n)).class_index()[first - top * n : last - top * n]
        if self.groups is not None:
            index += self.groups[first:last].astype(np.int64) * self.contexts.classes
        return self.starts[index * SYMBOLS + self.symbols[first:last] + 128]

    def encode(self, first: int, last: int, states: np.ndarray) -> np.ndarray:
        """Encode the symbols ``first..last``, update the states, return the words."""
        if not self.compiled:
            return _encode_vectors(self.entries(first, last), states)
        c, words = self.contexts, np.empty(last - first, np.uint16)
        groups = np.zeros(0, np.uint8) if self.groups is None else self.groups
        at = _encode_compiled(self.symbols, groups, c.rows, c.cols, self.starts, c.classes, first, states, words)
        return words[at:].copy()

    def tail(self, lanes: int) -> tuple[int, np.ndarray]:
        """Return how many of the last symbols fit into the first states of ``lanes`` lanes, and what they become."""
        few, count = tail_lanes(lanes), len(self.symbols)
        room = lanes - 2 * few
        length = min(count // 4, 64 * lanes) if room > few else 0
        if length:
            frequency = np.maximum(self.entries(count - length, count)[::-1] & 0xFFFF, 1)
            costs = np.rint((PROBABILITY_BITS - np.log2(frequency)) * 256).astype(np.int64)
            length = int(np.searchsorted(np.cumsum(costs), room * 16 * 256))
        while length:
            states = np.full(few, LOWEST, np.uint32)
            words = self.encode(count - length, count, states)
            if len(words) <= room:
                carried = np.concatenate([states.astype("<u4").view("<u2"), words, np.zeros(room - len(words), "<u2")])
                return length, carried.astype(np.uint32)
            length = length * 15 // 16
        return 0, np.zeros(lanes, np.uint32)


def encode(
    symbols: np.ndarray, groups: np.ndarray | None, contexts: Contexts, lanes: int, compiled: bool = HAVE_NUMBA
) -> Stream:
    """Return the stream of an array of at least one symbol.

    Args:
        symbols: int8 (m * n,), all of them with a frequency above 0 in their class.
        groups: uint8 (m * n,), each symbol's group of classes, or None for group 0.
        contexts: the models.
        lanes: number of lanes L.
        compiled: use the numba kernel; the bytes are the same.
    """
    encoder = _Encoder(symbols, groups, contexts, compiled)
    tail, carried = encoder.tail(lanes)
    states = carried + np.uint32(LOWEST)
    words = encoder.encode(0, len(symbols) - tail, states)
    return Stream(states, words, tail)
