"""Inner products of some rows of codes with some rows of inputs: which one fits.

A product's registers hold one sum for each pair of a row of codes and a row of inputs, so that each load serves
several products; what is left over is taken one by one.
"""

from __future__ import annotations

from .sqf_jit import jit
from .sqf_vectors import (
    BYTE_TILE,
    INT4,
    INT8,
    INT16,
    PANEL,
    TALL,
    TILE,
    WIDE,
    byte_dots,
    float_dots,
    panel_dots,
    side_by_side,
)

REVISION = 30
"""Of the vectors; see :mod:`sqf_vectors`."""

_float4, _float8, _float16 = (float_dots(kind, 1, 1) for kind in (INT4, INT8, INT16))
_float4_1, _float8_1, _float16_1 = (float_dots(kind, TALL, 1) for kind in (INT4, INT8, INT16))
_float4_4, _float8_4, _float16_4 = (float_dots(kind, TILE, 4) for kind in (INT4, INT8, INT16))
_row_1, _row_2, _row_3 = (panel_dots(1, vectors) for vectors in (1, 2, 3))
_panel_1, _panel_2, _panel_3 = (panel_dots(PANEL, min(vectors, WIDE)) for vectors in (1, 2, 3))
_pair_row_1, _pair_row_2, _pair_row_3 = (panel_dots(1, vectors, True) for vectors in (1, 2, 3))
_pairs_1, _pairs_2, _pairs_3 = (panel_dots(PANEL, min(vectors, WIDE), True) for vectors in (1, 2, 3))
_transpose, _transpose_columns, _transpose_rows = side_by_side(), side_by_side("columns"), side_by_side("rows")
_round_rows = side_by_side("rows", rounded=True)
_byte4, _byte8 = (byte_dots(kind, 1, 1) for kind in (INT4, INT8))
_byte4_1, _byte8_1 = (byte_dots(kind, BYTE_TILE, 1) for kind in (INT4, INT8))
_byte8_2 = byte_dots(INT8, BYTE_TILE, 2)  # two rows of 4-bit codes' six planes would not fit the registers


@jit
def float_tile(
    kind: int, rows: int, batch: int, z: int, z_stride: int, x: int, x_stride: int, plane: int, count: int, out: int
) -> None:
    """Fill out, float32 (rows, batch), from a kind of codes; see :func:`~.sqf_vectors.float_dots`.

    One row, or TALL rows for one of x and TILE rows for four.
    """
    if kind == INT4:
        if rows == 1:
            _float4(z, z_stride, x, x_stride, plane, count, out)
        elif batch == 4:
            _float4_4(z, z_stride, x, x_stride, plane, count, out)
        else:
            _float4_1(z, z_stride, x, x_stride, plane, count, out)
    elif kind == INT8:
        if rows == 1:
            _float8(z, z_stride, x, x_stride, plane, count, out)
        elif batch == 4:
            _float8_4(z, z_stride, x, x_stride, plane, count, out)
        else:
            _float8_1(z, z_stride, x, x_stride, plane, count, out)
    elif rows == 1:
        _float16(z, z_stride, x, x_stride, plane, count, out)
    elif batch == 4:
        _float16_4(z, z_stride, x, x_stride, plane, count, out)
    else:
        _float16_1(z, z_stride, x, x_stride, plane, count, out)


@jit
def byte_tile(
    kind: int, rows: int, batch: int, z: int, z_stride: int, x: int, x_stride: int, plane: int, count: int, out: int
) -> None:
    """Fill out, int32 (rows, batch, 3), from a kind of codes; see :func:`~.sqf_vectors.byte_dots`."""
    if kind == INT4:
        if rows == 1:
            _byte4(z, z_stride, x, x_stride, plane, count, out)
        else:
            _byte4_1(z, z_stride, x, x_stride, plane, count, out)
    elif rows == 1:
        _byte8(z, z_stride, x, x_stride, plane, count, out)
    elif batch == 2:
        _byte8_2(z, z_stride, x, x_stride, plane, count, out)
    else:
        _byte8_1(z, z_stride, x, x_stride, plane, count, out)


@jit
def panel_tile(rows: int, vectors: int, z: int, z_stride: int, x: int, plane: int, count: int, out: int) -> None:
    """Add to out, float32 (rows, vectors x LANES); see :func:`~.sqf_vectors.panel_dots`.

    One row, or PANEL rows; at most WIDE vectors.
    """
    if rows == 1:
        if vectors == 1:
            _row_1(z, z_stride, x, 0, plane, count, out)
        elif vectors == 2:
            _row_2(z, z_stride, x, 0, plane, count, out)
        else:
            _row_3(z, z_stride, x, 0, plane, count, out)
    elif vectors == 1:
        _panel_1(z, z_stride, x, 0, plane, count, out)
    elif vectors == 2:
        _panel_2(z, z_stride, x, 0, plane, count, out)
    else:
        _panel_3(z, z_stride, x, 0, plane, count, out)


@jit
def pair_tile(rows: int, vectors: int, z: int, z_stride: int, x: int, plane: int, count: int, out: int) -> None:
    """Do as :func:`panel_tile`, with two bfloat16 in the place of a float of rows and inputs."""
    if rows == 1:
        if vectors == 1:
            _pair_row_1(z, z_stride, x, 0, plane, count, out)
        elif vectors == 2:
            _pair_row_2(z, z_stride, x, 0, plane, count, out)
        else:
            _pair_row_3(z, z_stride, x, 0, plane, count, out)
    elif vectors == 1:
        _pairs_1(z, z_stride, x, 0, plane, count, out)
    elif vectors == 2:
        _pairs_2(z, z_stride, x, 0, plane, count, out)
    else:
        _pairs_3(z, z_stride, x, 0, plane, count, out)


@jit
def transpose(rows: int, stride: int, count: int, out: int, out_stride: int) -> None:
    """Fill out, float32 (count x LANES, LANES); see :func:`~.sqf_vectors.side_by_side`."""
    _transpose(rows, stride, 0, 0, out_stride, count, out)


@jit
def transpose_columns(rows: int, stride: int, steps: int, count: int, out: int, out_stride: int) -> None:
    """Fill out, float32 (count x LANES, LANES), from rows whose columns are scaled by steps, (count x LANES)."""
    _transpose_columns(rows, stride, steps, 0, out_stride, count, out)


@jit
def transpose_rows(rows: int, stride: int, factors: int, offsets: int, out: int, out_stride: int) -> None:
    """Fill out, float32 (LANES, LANES), from rows times their factors plus their offsets, float32 (LANES) each."""
    _transpose_rows(rows, stride, factors, offsets, out_stride, 1, out)


@jit
def round_rows(rows: int, stride: int, factors: int, offsets: int, out: int, out_stride: int) -> None:
    """Do as :func:`transpose_rows`, to bfloat16."""
    _round_rows(rows, stride, factors, offsets, out_stride, 1, out)
