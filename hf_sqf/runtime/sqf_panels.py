"""Products with many rows of inputs, which are laid side by side: a number of each of LANES rows after another.

So one number of a row of codes meets LANES inputs in one instruction, and sums stay in the lanes where they are added
up. A chunk of codes is widened to float32 first; W is nowhere as a whole. Both steps are shared out among threads by
:mod:`sqf_kernels`.
"""

from __future__ import annotations

import numpy as np

from .sqf_calls import (
    BATCH,
    BIAS,
    CALL_FIELDS,
    CODES,
    COLUMNS,
    DTYPE,
    FLOAT32,
    INPUT,
    KIND,
    MATRIX,
    MATRIX_FIELDS,
    OPERAND,
    OUTPUT,
    PANELS,
    ROWS,
    STARTS,
    STEPS,
    VALUES,
    M,
    N,
    at_float32,
    at_int16,
    at_int32,
    at_int64,
    at_uint16,
    entry_bytes,
    padded,
    row_bytes,
    scale_row,
    to_bfloat16,
    widen,
)
from .sqf_jit import jit
from .sqf_tiles import panel_tile, transpose
from .sqf_vectors import LANES, NONE, PANEL

try:
    from numba import carray
except ImportError:  # nothing here is called then
    carray = None  # type: ignore[assignment]

REVISION = 21
"""Of the vectors and tiles; see :mod:`sqf_vectors`."""
_DEPTH = 1024
"""Columns whose inputs, side by side, stay in the caches while all rows of a chunk are multiplied with them."""


@jit
def lay_side_by_side(address: int, first: int, last: int) -> None:
    """Scale the inputs of the panels first..last and fill these, (n or more, LANES) each."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    n, batch, dtype = matrix[N], call[BATCH], call[DTYPE]
    steps, width = carray(at_float32(matrix[STEPS]), n), padded(n)
    scaled = np.zeros((LANES, width), np.float32)
    for panel in range(first, last):
        for lane in range(LANES):
            b = panel * LANES + lane
            if b < batch:
                scale_row(call[INPUT] + b * n * entry_bytes(dtype), dtype, n, steps, scaled[lane])
            else:
                scaled[lane] = 0
        out = call[OPERAND] + panel * 4 * width * LANES
        transpose(scaled.ctypes.data, 4 * width, width // LANES, out, 4 * LANES)


@jit
def multiply_panels(address: int, first: int, last: int) -> None:  # noqa: C901 (a nest of loops)
    """Fill the columns first..last of y from inputs side by side."""
    call = carray(at_int64(address), CALL_FIELDS)
    matrix = carray(at_int64(call[MATRIX]), MATRIX_FIELDS)
    m, n, batch, count = matrix[M], matrix[N], call[BATCH], call[PANELS]
    rows, bias = carray(at_float32(matrix[ROWS]), m), carray(at_float32(call[BIAS]), m)
    starts, columns = carray(at_int32(matrix[STARTS]), m + 1), carray(at_uint16(matrix[COLUMNS]), 1)
    values = carray(at_int16(matrix[VALUES]), 1)
    panels = carray(at_float32(call[OPERAND]), (count, padded(n), LANES))
    y, y_half = carray(at_float32(call[OUTPUT]), (batch, m)), carray(at_uint16(call[OUTPUT]), (batch, m))
    dense = last - first if matrix[KIND] != NONE else 0
    codes, octets = np.zeros((dense, n), np.float32), np.zeros(n, np.int8)
    for i in range(dense):
        widen(matrix[KIND], n, matrix[CODES] + (first + i) * row_bytes(matrix[KIND], n), octets, codes[i])
    plane = 4 * padded(n) * LANES
    for panel in range(0, count, 2):
        vectors = min(count - panel, 2)
        sums = np.zeros((last - first, vectors, LANES), np.float32)
        for k in range(0, n, _DEPTH):
            inputs = call[OPERAND] + panel * plane + 4 * k * LANES
            i = 0
            while i < dense:
                tall = PANEL if dense - i >= PANEL else 1
                z, out = codes.ctypes.data + 4 * (i * n + k), sums.ctypes.data + 4 * i * vectors * LANES
                panel_tile(tall, vectors, z, 4 * n, inputs, plane, min(_DEPTH, n - k), out)
                i += tall
        for i in range(first, last):
            scale = rows[i]
            offset = bias[i] if call[BIAS] != 0 else np.float32(0)
            for v in range(vectors):
                line = sums[i - first, v]
                if matrix[STARTS] != 0:
                    for e in range(starts[i], starts[i + 1]):
                        value, excess = np.float32(values[e]), panels[panel + v, columns[e]]
                        for lane in range(LANES):
                            line[lane] += value * excess[lane]
                for lane in range(LANES):
                    line[lane] = line[lane] * scale + offset
        bits, done = sums.view(np.uint32), first
        # Whole panels of float32 leave in registers; one number at a time would take a tenth of the product's time.
        while call[DTYPE] == FLOAT32 and (panel + vectors) * LANES <= batch and last - done >= LANES:
            line_size = 4 * vectors * LANES
            out = call[OUTPUT] + 4 * (panel * LANES * m + done)
            transpose(sums.ctypes.data + (done - first) * line_size, line_size, vectors, out, 4 * m)
            done += LANES
        for b in range(panel * LANES, min((panel + vectors) * LANES, batch)):
            v, lane = b // LANES - panel, b % LANES
            if call[DTYPE] == FLOAT32:
                for i in range(done, last):
                    y[b, i] = sums[i - first, v, lane]
            else:
                for i in range(first, last):
                    y_half[b, i] = to_bfloat16(bits[i - first, v, lane])
