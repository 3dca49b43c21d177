"""Integers <-> int8 symbols, escaped values and planes of low bits: what the models code, and what is coded plainly.

A code k is ``high << shift | low``. The high part is a symbol where it lies within +-126 and its class gives it a
probability, and otherwise an escape, whose value is listed in zigzag (0, -1, 1, -2, ... as 0, 1, 2, 3, ...) with
a fixed number of bits. Low parts are a plane of ``shift`` bits each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .sqf_bytes import pack_bits, packed_size, unpack_bits
from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import EVEN, LARGEST, ODD, SYMBOLS
from .sqf_paths import codes_of_points
from .sqf_rans import Contexts
from .sqf_trellis import machine

CHUNK = 1 << 20
"""Symbols in a chunk of rows, at most (but at least one row)."""


def chunk_rows(m: int, n: int) -> int:
    """Return the number of rows in a chunk of an (m, n) array. A state machine starts anew at each chunk."""
    return max(1, min(m, CHUNK // max(n, 1)))


def chunks(m: int, n: int) -> Iterator[slice]:
    """Yield the rows of each chunk of an (m, n) array."""
    rows = chunk_rows(m, n)
    return (slice(i, min(i + rows, m)) for i in range(0, m, rows))


def _zigzag(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    return np.where(values < 0, -2 * values - 1, 2 * values)


@dataclass(frozen=True)
class Split:
    """One way to split an array of codes k = value - offset.

    Attributes:
        codes: integers k (m, n).
        groups: uint8 (m, n), the grid that each code's state of the machine is on; None without a machine.
        offset: what was subtracted from the values.
        shift: number of low bits.
        escape_bits: bits of an escaped value.
        fits: every code is in the alphabet.
    """

    codes: np.ndarray
    groups: np.ndarray | None
    offset: int
    shift: int
    escape_bits: int
    fits: bool

    def high(self, rows: slice) -> np.ndarray:
        """Return the high parts of some rows."""
        return self.codes[rows] >> self.shift if self.shift else self.codes[rows]

    def symbols(self) -> np.ndarray:
        """Return int8 (m, n): the high parts, escaped where they are outside the alphabet."""
        if self.fits and not self.shift:
            return self.codes
        out = np.empty(self.codes.shape, np.int8)
        for rows in chunks(*self.codes.shape):
            high = self.high(rows)
            some = out[rows]
            some[...] = high.astype(np.int8)
            outside = (high > LARGEST) | (high < -LARGEST)  # few: they are not worth a pass over all
            some[outside] = np.where(high[outside] & 1, ODD, EVEN)
        return out

    def planes(self, rows: slice, escaped: np.ndarray) -> bytes:
        """Return the plain bits of a chunk: the escaped values, then the low parts."""
        values = _zigzag(self.high(rows).reshape(-1)[escaped])
        data = pack_bits(values, self.escape_bits)
        if self.shift:
            data += pack_bits(self.codes[rows].reshape(-1) & (1 << self.shift) - 1, self.shift)
        return data


def splits(values: np.ndarray, trellis: int) -> list[Split]:
    """Return the ways to split an array (m, n) that are worth costing, the first of them without low parts.

    Raises:
        ValueError: the values are not paths of the machine of ``trellis`` states.
    """
    offset, groups = 0, None
    codes: np.ndarray = values
    if trellis:
        codes, groups = _follow(values, trellis)
    elif len(values) == 1:
        offset = int(np.partition(values[0], values.size // 2)[values.size // 2])
        codes = values.astype(np.int64) - offset
    low, high = int(codes.min()), int(codes.max())
    largest = max(high, -low)
    fits = largest <= LARGEST
    if fits and codes.dtype != np.int8:
        codes = codes.astype(np.int8)
    shifts = {0}
    if not fits:
        mean = sum(float(np.abs(codes[rows].astype(np.int64)).sum()) for rows in chunks(*values.shape)) / codes.size
        shifts |= {max(0, math.frexp(mean)[1] - 4), (largest // LARGEST).bit_length()}
    found = []
    for shift in sorted(shifts):
        widest = int(_zigzag(np.array([low >> shift, high >> shift])).max())
        found.append(Split(codes, groups, offset, shift, max(1, widest.bit_length()), fits))
    return found


def _follow(values: np.ndarray, trellis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and grids along the paths of a machine that starts anew at each chunk."""
    states_machine = machine(trellis)
    # A code is about half its point in size.
    width = values.dtype if values.dtype in (np.int8, np.int16) else np.dtype(np.int32)
    codes, groups = np.empty(values.shape, width), np.empty(values.shape, np.uint8)
    for rows in chunks(*values.shape):
        try:
            codes[rows], states = codes_of_points(values[rows], states_machine)
        except ValueError as error:
            raise ValueError(f"in the rows from {rows.start} on, {error}") from None
        groups[rows] = states_machine.grid[states]
    return codes, groups


@jit
def _escape_compiled(
    symbols: np.ndarray,
    groups: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    table: np.ndarray,
    classes: int,
    out: np.ndarray,
) -> int:
    n, t, found = cols.size, 0, 0
    for i in range(rows.size):
        row = rows[i]
        for j in range(n):
            index = min(max(row + cols[j], 0), classes - 1)
            if groups.size:
                index += groups[t] * classes
            symbol = symbols[t]
            if table[index * 256 + symbol + 128] == 0 or symbol in (EVEN, ODD):
                symbol = np.int8(ODD if symbol & 1 else EVEN)
                found += 1
            out[t] = symbol
            t += 1
    return found


def escape(
    symbols: np.ndarray, groups: np.ndarray | None, contexts: Contexts, compiled: bool = HAVE_NUMBA
) -> tuple[np.ndarray, np.ndarray]:
    """Replace the symbols that their class has no slot for. Return the symbols (m * n,) and where escapes are."""
    table = contexts.table.reshape(-1)
    if compiled:
        out = np.empty_like(symbols)
        given = np.zeros(0, np.uint8) if groups is None else groups
        if not _escape_compiled(symbols, given, contexts.rows, contexts.cols, table, contexts.classes, out):
            return symbols, np.zeros(0, np.int64)
    else:
        index = contexts.class_index()
        if groups is not None:
            index += groups.astype(np.int64) * contexts.classes
        impossible = table[index * SYMBOLS + symbols + 128] == 0
        out = np.where(impossible, np.where(symbols & 1, ODD, EVEN).astype(np.int8), symbols)
    return out, np.flatnonzero((out == EVEN) | (out == ODD))


@jit
def _find_escapes(symbols: np.ndarray, where: np.ndarray) -> int:
    found = 0
    for t in range(symbols.size):
        if symbols[t] in (EVEN, ODD):
            if found < where.size:
                where[found] = t
            found += 1
    return found


def escapes_of(symbols: np.ndarray, count: int, compiled: bool = HAVE_NUMBA) -> np.ndarray:
    """Return where the ``count`` escapes among symbols (t,) are.

    Raises:
        ValueError: there are not so many.
    """
    if compiled:
        where = np.empty(count, np.int64)
        found = _find_escapes(symbols, where)
    else:
        where = np.flatnonzero((symbols == EVEN) | (symbols == ODD))
        found = len(where)
    if found != count:
        raise ValueError(f"{count} escaped values for {found} escapes")
    return where


def escaped_values(planes: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    """Return the escaped values, int64 (count,), that ``planes`` begin with."""
    if not count:
        return np.zeros(0, np.int64)
    zigzag = unpack_bits(planes[: packed_size(bits, count)], bits, count)
    return np.where(zigzag & 1, -(zigzag + 1 >> 1), zigzag >> 1)
