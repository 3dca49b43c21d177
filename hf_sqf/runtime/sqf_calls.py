"""What a call of the compiled kernels is told, and what they have in common.

A matrix's descriptor and a call are arrays of int64: numbers, and addresses of what the numbers describe. Threads get
the address of the call alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .sqf_jit import carray, jit
from .sqf_vectors import (
    INT4,
    INT6,
    INT16,
    LANES,
    LOOKUPS,
    NONE,
    WORD_LOOKUPS,
    address_as,
    lookup,
    lookup_words,
    unpack,
)

REVISION = 30
"""Of the vectors and tiles; see :mod:`sqf_vectors`."""
FLOAT32, BFLOAT16, PAIRED = range(3)
"""Type of x and y; PAIRED: bfloat16, and many rows are multiplied as such, two numbers at a time."""
LARGEST_INT4 = 7
"""Codes in 4 bits lie in [-7, 7], so that ``16 high + low`` fits a signed byte."""
SLACK = 64
"""Bytes that must be readable behind the dense part: vectors run over the end of its last row, against zeros of x."""

CODES, KIND, M, N, STEPS, ROWS, STARTS, COLUMNS, VALUES, GOMP, RANK, WORKER = range(12)
"""Fields of a matrix's descriptor, int64 each: addresses (0: there is none) of the dense part, float32 steps (n) and
rows (m), of the sparse remainder's int32 starts (m + 1), uint16 columns and int16 values, and of what forks, numbers
threads and works (see :class:`~.sqf_kernels.Kernels`). KIND is a storage."""

(MATRIX, TASK, INPUT, SCALED_STRIDE, OPERAND, OPERAND_STRIDE, PLANE, COUNT, SCALES, OUTPUT, BIAS, BATCH, DTYPE, IDS,
 FIRST_ROW, LAST, CHUNK, TEAM, TAKEN, LINES, PANELS, SCRATCH, SCRATCH_STRIDE, STARTED, FIXED) = range(25)  # fmt: skip
"""Fields of a call, int64 each. INPUT: x, scaled where SCALED_STRIDE is given; OPERAND: what the inner products take,
in rows or planes; LAST: of what is shared out among a TEAM of threads, a CHUNK at a time; TAKEN: the address of what
says for each chunk that a thread has it. LINES and PANELS: most rows of codes and vectors of inputs at a time; SCRATCH:
room for each thread, of those that have STARTED. FIXED: inputs as integers, which OPERAND has in digits."""
MATRIX_FIELDS, CALL_FIELDS = 12, 25
LINE = 64
"""Bytes of a line of the caches."""
FLOATS, BYTES, DECODE, ROUND, ADD, BY_LINES, BY_PANELS = range(7)
"""Tasks of a call: products of floats, of bytes, decoding; COUNT rows of inputs times the steps and then rows of codes
times their factors, each in bfloat16; products of few nonzeros, added to what is there; and products with inputs side
by side, of which each thread has some rows of codes or some panels of inputs."""

at_int64 = address_as("int64")
at_int32 = address_as("int32")
at_int16 = address_as("int16")
at_int8 = address_as("int8")
at_uint16 = address_as("uint16")
at_float32 = address_as("float32")
at_float64 = address_as("float64")
_unpack, _lookup, _lookup_words = unpack(), lookup(), lookup_words()


@jit
def row_bytes(kind: int, n: int) -> int:
    """Return the distance of two rows of the dense part."""
    return (n + 1) // 2 if kind == INT4 else n * 2 if kind == INT16 else n


@jit
def to_bfloat16(bits: int) -> int:
    """Return the upper half of a float32's bits, rounded to nearest even; a NaN stays one."""
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return 0x7FC0
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@jit
def round_row(line: Any, halves: Any) -> None:  # noqa: ANN401
    """Fill halves (uint16, n) with the bfloat16 of line (float32, n or more).

    NaNs must have nothing in their lower halves, as those from bfloat16: to heed others would take vectors away.
    """
    bits = line.view(np.uint32)
    for k in range(len(halves)):
        word = bits[k]
        halves[k] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@jit
def scale_row(x: int, dtype: int, n: int, steps: Any, scaled: Any) -> None:  # noqa: ANN401
    """Fill scaled (float32, n or more) with the row of inputs at the address x, times the steps (n)."""
    if dtype == FLOAT32:
        singles = carray(at_float32(x), n)
        for k in range(n):
            scaled[k] = singles[k] * steps[k]
    else:
        halves, bits = carray(at_uint16(x), n), scaled.view(np.uint32)
        for k in range(n):
            bits[k] = np.uint32(halves[k]) << 16
        for k in range(n):
            scaled[k] *= steps[k]


@jit
def entry_bytes(dtype: int) -> int:
    """Return the bytes of a number of x or y."""
    return 4 if dtype == FLOAT32 else 2


@jit
def padded(n: int) -> int:
    """Return n, rounded up to whole vectors."""
    return (n + LANES - 1) // LANES * LANES


@jit
def in_lines(size: int) -> int:
    """Return a number of bytes, rounded up to whole lines of the caches."""
    return (size + LINE - 1) // LINE * LINE


@jit
def _low(pair: Any) -> Any:  # noqa: ANN401
    """Return the code in the low half of a byte, int8: numba's own 64 bits at any step would make short vectors."""
    return np.int8(np.int8((pair & np.int8(15)) ^ np.int8(8)) - np.int8(8))


@jit
def _high(pair: Any) -> Any:  # noqa: ANN401
    """Return the code in the high half of a byte, int8."""
    return np.int8(np.int8(pair + np.int8(8)) >> np.int8(4))


@jit
def widen(kind: int, n: int, z: int, line: Any) -> None:  # noqa: ANN401
    """Fill line (float32, n) with the row of codes at the address z."""
    if kind == INT4:
        half = (n + 1) // 2
        pairs, done = carray(at_int8(z), half), (n - half) // LANES * LANES
        low, high = line[:half], line[half:]
        _unpack(z, 0, low.ctypes.data, 0, high.ctypes.data, done // LANES, 0)
        for k in range(done, half):
            low[k] = np.float32(_low(pairs[k]))
            if k < n - half:
                high[k] = np.float32(_high(pairs[k]))
    elif kind == INT16:
        words = carray(at_int16(z), n)
        for k in range(n):
            line[k] = np.float32(words[k])
    else:
        narrow = carray(at_int8(z), n)
        for k in range(n):
            line[k] = np.float32(narrow[k])


@jit
def look_up_row(kind: int, n: int, z: int, factor: int, one: Any, halves: Any) -> None:  # noqa: ANN401
    """Fill halves (uint16, n) with the bfloat16 of the row of codes at the address z, times the one at factor.

    Codes of 4 bits take LOOKUPS, those of 6 bits WORD_LOOKUPS; one is room for a float32.
    """
    apart = (n + 1) // 2 if kind == INT4 else n  # the columns of a byte lie so far apart
    if kind == INT4:
        done = (n - apart) // LOOKUPS * LOOKUPS
        _lookup(z, 0, factor, 0, halves[apart:].ctypes.data, done // LOOKUPS, halves.ctypes.data)
    else:
        done = n // WORD_LOOKUPS * WORD_LOOKUPS
        _lookup_words(z, 0, factor, 0, 0, done // WORD_LOOKUPS, halves.ctypes.data)
    scale = carray(at_float32(factor), 1)[0]
    for k in range(done, apart):
        for place in range(k, n, apart):
            one[0] = code_at(kind, n, z, place) * scale
            round_row(one, halves[place : place + 1])


@jit
def code_at(kind: int, n: int, z: int, k: int) -> int:
    """Return the code k of the row of codes, of 4 bits or a byte each, at the address z."""
    half = (n + 1) // 2 if kind == INT4 else n
    octets = carray(at_int8(z), half)
    if kind != INT4:
        return octets[k]
    return _low(octets[k]) if k < half else _high(octets[k - half])


@jit
def widen_row(matrix: Any, row: int, line: Any) -> None:  # noqa: ANN401
    """Fill line (float32, n) with a row of codes."""
    kind, n = matrix[KIND], matrix[N]
    if kind == NONE:
        line[:] = 0
    else:
        widen(kind, n, matrix[CODES] + row * row_bytes(kind, n), line)
    if matrix[STARTS] != 0:
        starts = carray(at_int32(matrix[STARTS]), matrix[M] + 1)
        columns, values = carray(at_uint16(matrix[COLUMNS]), 1), carray(at_int16(matrix[VALUES]), 1)
        for e in range(starts[row], starts[row + 1]):
            line[columns[e]] += np.float32(values[e])


@jit
def round_codes(matrix: Any, row: int, factor: int, line: Any, halves: Any) -> None:  # noqa: ANN401
    """Fill halves (uint16, n) with the bfloat16 of a row of codes times the float32 at factor; line has room for n."""
    kind, n = matrix[KIND], matrix[N]
    scale = carray(at_float32(factor), 1)[0]
    if not (LOOKUPS > 0 if kind == INT4 else WORD_LOOKUPS > 0 and kind == INT6):
        widen_row(matrix, row, line)
        for k in range(n):
            line[k] *= scale
        round_row(line, halves)
        return
    z, one = matrix[CODES] + row * row_bytes(kind, n), line[:1]
    look_up_row(kind, n, z, factor, one, halves)
    if matrix[STARTS] != 0:
        starts = carray(at_int32(matrix[STARTS]), matrix[M] + 1)
        columns, values = carray(at_uint16(matrix[COLUMNS]), 1), carray(at_int16(matrix[VALUES]), 1)
        for e in range(starts[row], starts[row + 1]):
            one[0] = (code_at(kind, n, z, columns[e]) + values[e]) * scale
            round_row(one, halves[columns[e] : columns[e] + 1])


@jit
def cut(pairs: Any, codes: Any) -> None:  # noqa: ANN401
    """Fill codes (n) with those of a row of bytes."""
    low, high = codes[: len(pairs)], codes[len(pairs) :]
    for k in range(len(low)):
        low[k] = _low(pairs[k])
    for k in range(len(high)):
        high[k] = _high(pairs[k])
