"""Products with many rows of inputs, which are laid side by side: a number of each of LANES rows after another.

So one number of a row of codes meets LANES inputs in one instruction, and sums stay in the lanes where they are added
up. A chunk of codes is widened to float32 first; W is nowhere as a whole. Each thread lays side by side what it
multiplies: to fetch inputs from where another has put them takes longer, and nobody waits.

Where a call is PAIRED, two bfloat16 take the place of each float32: of codes, which are exact up to 256, and of inputs
times the steps. A *word* below is either.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .sqf_calls import (
    BATCH,
    BIAS,
    BY_LINES,
    CALL_FIELDS,
    CODES,
    COLUMNS,
    DTYPE,
    FLOAT32,
    INPUT,
    KIND,
    LINES,
    MATRIX,
    MATRIX_FIELDS,
    OUTPUT,
    PAIRED,
    PANELS,
    ROWS,
    STARTS,
    STEPS,
    TASK,
    VALUES,
    M,
    N,
    at_float32,
    at_int8,
    at_int16,
    at_int32,
    at_int64,
    at_uint16,
    cut,
    entry_bytes,
    in_lines,
    padded,
    round_codes,
    round_row,
    row_bytes,
    scale_row,
    to_bfloat16,
    widen,
)
from .sqf_jit import carray, jit
from .sqf_tiles import pair_tile, panel_tile, round_rows, transpose, transpose_columns, transpose_rows
from .sqf_vectors import INT4, INT8, LANES, NONE, PANEL, WIDE

REVISION = 30
"""Of the vectors and tiles; see :mod:`sqf_vectors`."""
DEPTH = 1024
"""Most columns whose inputs, side by side, stay in the caches while all rows of a chunk are multiplied with them."""


@jit
def words_of(n: int, dtype: int) -> int:
    """Return the words in a row of n numbers."""
    return (n + 1) // 2 if dtype == PAIRED else n


@jit
def columns_at_a_time(words: int) -> int:
    """Return how many columns of words are multiplied before the next ones: equal shares, of DEPTH at most."""
    blocks = (words + DEPTH - 1) // DEPTH
    return (words + blocks - 1) // blocks


@jit
def widened_at_a_time(words: int, dtype: int) -> int:
    """Return how many columns of words are widened before the next ones: pairs whole, which take half the room."""
    return words if dtype == PAIRED else columns_at_a_time(words)


@jit
def scratch_bytes(matrix: Any, dtype: int, lines: int, panels: int) -> int:  # noqa: ANN401
    """Return the bytes that a thread needs for so many rows of codes and panels of inputs at a time."""
    words = words_of(matrix[N], dtype)
    octets = lines * words if dtype != PAIRED and matrix[KIND] == INT4 and words > DEPTH else 0
    codes, sums = 4 * lines * widened_at_a_time(words, dtype), 4 * panels * lines * LANES
    return (panels + 1) * _plane(words) + in_lines(codes) + in_lines(sums) + in_lines(octets)


@jit
def _plane(words: int) -> int:
    """Return the bytes of a panel."""
    return 4 * padded(words) * LANES


@jit
def _top(batch: int, panel: int) -> int:
    """Return the first row of a panel. The last one begins early enough to be whole: some rows are multiplied twice."""
    return min(panel * LANES, batch - LANES)


@jit
def multiply_panels(address: int, first: int, last: int, scratch: int) -> None:
    """Fill the rows of y of the panels first..last, or its columns first..last, with a thread's room at ``scratch``.

    There are LANES rows or more.
    """
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    count, most = (call[BATCH] + LANES - 1) // LANES, call[PANELS]
    words = words_of(matrix[N], call[DTYPE])
    inputs = scratch + _plane(words)
    room = inputs + most * _plane(words)
    start, end = 0, matrix[M]
    if call[TASK] == BY_LINES:
        start, end, first, last = first, last, 0, count
    for panel in range(first, last, most):
        now = min(most, last - panel)
        kept = end - start > call[LINES] or words > DEPTH  # else the next panels take the place of what is done
        for i in range(start, end, call[LINES]):
            rows = scratch if i == start else 0
            _multiply_chunk(call, matrix, i, min(i + call[LINES], end), panel, now, rows, inputs, kept, room)


@jit
def _lay_side_by_side(call: Any, matrix: Any, first: int, count: int, rows: int, out: int) -> None:  # noqa: ANN401
    """Scale the inputs of some panels and fill these, (words or more, LANES) each, from the address ``out`` on.

    Args:
        call, matrix: their descriptors.
        first: panel.
        count: of panels.
        rows: address of room for the rows of one.
        out: see above.
    """
    n, batch, dtype = matrix[N], call[BATCH], call[DTYPE]
    words = words_of(n, dtype)
    steps, width = carray(at_float32(matrix[STEPS]), n), padded(words)
    scaled = carray(at_float32(rows), (LANES, width))
    scaled[:, n // 2 if dtype == PAIRED else n :] = 0
    line = np.empty(n if dtype == PAIRED else 0, np.float32)
    for panel in range(first, first + count):
        top, at = _top(batch, panel), out + (panel - first) * _plane(words)
        if dtype == FLOAT32 and n == width:  # whole vectors need no copy
            transpose_columns(call[INPUT] + 4 * top * n, 4 * n, matrix[STEPS], n // LANES, at, 4 * LANES)
            continue
        for lane in range(LANES):
            x = call[INPUT] + (top + lane) * n * entry_bytes(dtype)
            if dtype == PAIRED:
                scale_row(x, dtype, n, steps, line)
                round_row(line, scaled[lane].view(np.uint16)[:n])
            else:
                scale_row(x, dtype, n, steps, scaled[lane])
        transpose(scaled.ctypes.data, 4 * width, width // LANES, at, 4 * LANES)


@jit
def _multiply_chunk(
    call: Any,  # noqa: ANN401
    matrix: Any,  # noqa: ANN401
    first: int,
    last: int,
    panel: int,
    count: int,
    rows: int,
    inputs: int,
    kept: bool,
    room: int,
) -> None:
    """Fill the columns first..last of y for some panels.

    Args:
        call, matrix: their descriptors.
        first, last: see above.
        panel, count: the first of the panels, and their number.
        rows: address of room for the rows of a panel: each is laid side by side before it is used; 0 where all are.
        inputs: address of the panels.
        kept: whether they lie there one after another, and not those in use alone.
        room: address of room for codes and sums.
    """
    n, paired, height = matrix[N], call[DTYPE] == PAIRED, last - first
    words = words_of(n, call[DTYPE])
    depth, stride = columns_at_a_time(words), widened_at_a_time(words, call[DTYPE])
    codes = carray(at_float32(room), (height, stride))
    room += in_lines(4 * height * stride)
    sums = carray(at_float32(room), count * height * LANES)
    octets = carray(at_int8(room + in_lines(4 * count * height * LANES)), height * n)
    if paired:
        _round_chunk(matrix, first, codes)
    elif matrix[KIND] == INT4 and n > DEPTH:  # a row's halves lie in the same bytes
        for i in range(height):
            pairs = carray(at_int8(matrix[CODES] + (first + i) * row_bytes(INT4, n)), (n + 1) // 2)
            cut(pairs, octets[i * n : (i + 1) * n])
    for k in range(0, words, depth):
        now = min(depth, words - k)
        if not paired:
            _widen_chunk(matrix, octets, first, k, now, codes)
        done = 0
        while done < count:
            left = count - done
            vectors = 2 if left == 4 else min(left, WIDE)  # two and two wait less for each other than three and one
            place = done if words > DEPTH else 0  # short rows have their sums at once
            part = sums[place * height * LANES : (place + vectors) * height * LANES]
            x = inputs + (done if kept else 0) * _plane(words)
            if k == 0:
                part[:] = 0
                if rows != 0:
                    _lay_side_by_side(call, matrix, panel + done, vectors, rows, x)
            x += 4 * k * LANES
            i = 0
            while i < height:
                tall = PANEL if height - i >= PANEL else 1
                out = part.ctypes.data + 4 * i * vectors * LANES
                z = codes.ctypes.data + 4 * (i * stride + (k if paired else 0))
                if paired:
                    pair_tile(tall, vectors, z, 4 * stride, x, _plane(words), now, out)
                else:
                    panel_tile(tall, vectors, z, 4 * stride, x, _plane(words), now, out)
                i += tall
            if k + now == words:
                _finish(call, matrix, first, last, panel + done, part.reshape(height, vectors, LANES))
            done += vectors


@jit
def _round_chunk(matrix: Any, first: int, codes: Any) -> None:  # noqa: ANN401
    """Fill codes (rows, words) with those of the rows from ``first`` on, in bfloat16."""
    n = matrix[N]
    line, one = np.empty(n, np.float32), np.ones(1, np.float32)
    codes[:, n // 2 :] = 0
    for i in range(len(codes)):
        round_codes(matrix, first + i, one.ctypes.data, line, codes[i].view(np.uint16)[:n])


@jit
def _widen_chunk(matrix: Any, octets: Any, first: int, k: int, now: int, codes: Any) -> None:  # noqa: ANN401
    """Fill codes, float32 (rows, now or more), with the columns k..k + now of the rows from ``first`` on.

    Args:
        matrix: its descriptor.
        octets: int8 (rows x n), the dense part's codes; where rows of 4 bits are longer than DEPTH.
        first, k, now, codes: see above.
    """
    kind, n = matrix[KIND], matrix[N]
    starts, columns = carray(at_int32(matrix[STARTS]), matrix[M] + 1), carray(at_uint16(matrix[COLUMNS]), 1)
    values = carray(at_int16(matrix[VALUES]), 1)
    for i in range(len(codes)):
        line = codes[i]
        if kind == NONE:
            line[:] = 0
        elif kind == INT4 and n > DEPTH:
            widen(INT8, now, octets.ctypes.data + i * n + k, line)
        else:
            z = matrix[CODES] + (first + i) * row_bytes(kind, n) + row_bytes(kind, k)
            widen(kind, now, z, line)
        if matrix[STARTS] != 0:
            for e in range(starts[first + i], starts[first + i + 1]):
                column = np.int64(columns[e]) - k
                if 0 <= column < now:
                    line[column] += np.float32(values[e])


@jit
def _finish(call: Any, matrix: Any, first: int, last: int, panel: int, sums: Any) -> None:  # noqa: ANN401
    """Write the columns first..last of y for some panels, from sums (rows, panels, LANES)."""
    m, batch = matrix[M], call[BATCH]
    rows, bias = carray(at_float32(matrix[ROWS]), m), carray(at_float32(call[BIAS]), m)
    y, y_half = carray(at_float32(call[OUTPUT]), (batch, m)), carray(at_uint16(call[OUTPUT]), (batch, m))
    zeros, line = np.zeros(LANES, np.float32), np.empty(1, np.float32)
    bits = line.view(np.uint32)
    vectors, size = sums.shape[1], entry_bytes(call[DTYPE])
    for v in range(vectors):
        top, done = _top(batch, panel + v), first
        while last - done >= LANES:  # in registers; one number at a time would take a tenth of the product's time
            offsets = bias[done:].ctypes.data if call[BIAS] != 0 else zeros.ctypes.data
            factors, out = matrix[ROWS] + 4 * done, call[OUTPUT] + size * (top * m + done)
            stride, at = 4 * vectors * LANES, sums.ctypes.data + 4 * LANES * ((done - first) * vectors + v)
            if call[DTYPE] == FLOAT32:
                transpose_rows(at, stride, factors, offsets, out, size * m)
            else:
                round_rows(at, stride, factors, offsets, out, size * m)
            done += LANES
        for lane in range(LANES):
            for i in range(done, last):
                value = sums[i - first, v, lane] * rows[i] + (bias[i] if call[BIAS] != 0 else np.float32(0))
                if call[DTYPE] == FLOAT32:
                    y[top + lane, i] = value
                else:
                    line[0] = value
                    y_half[top + lane, i] = to_bfloat16(bits[0])
