"""Interleaved rANS: symbols -> lane states and 16-bit words (Duda, arXiv 1311.2540; Giesen, arXiv 1402.3392).

Decoding is in :mod:`hf_sqf.runtime.sqf_decoders`; what both do is told here.

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

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import PROBABILITY_BITS, SYMBOLS
from .sqf_trellis import Machine

LOWEST = 1 << 16
"""The least state of a lane, and the one it starts the encoder from."""


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
