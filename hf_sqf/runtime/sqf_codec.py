"""Integer arrays <-> bytes. The format is described field by field in FORMAT.md.

Arrays are cut into chunks of whole rows, each a stream of its own (:mod:`hf_sqf.runtime.sqf_rans`), so that they
decode in parallel, in bounded memory, and rows can be had without the rest.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .sqf_bytes import Reader, Writer, packed_size, unpack_bits
from .sqf_decoders import decode
from .sqf_fit import Plan, Sample, fit
from .sqf_jit import HAVE_NUMBA
from .sqf_models import CLASSES, INTEGERS, Q0, Q1, SHAPES, Model, frequencies
from .sqf_paths import points_of_codes
from .sqf_rans import Contexts, Stream, encode
from .sqf_streams import SYMBOLS_PER_BYTE, lanes_for, read_sizes, read_stream, write_sizes, write_stream
from .sqf_symbols import Split, chunk_rows, chunks, escape, escaped_values, escapes_of, splits
from .sqf_trellis import machine

__all__ = ["chunk_rows", "contexts_of", "decode_integers", "encode_integers", "ideal_bits"]

_CONSTANT_LIMIT = 1 << 16  # the most equal values that are written as one
_FAR = 1 << 20  # beyond what a part of a class can make use of
_WIDTHS: tuple[np.dtype[Any], ...] = (np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32))
_LIMITS = tuple((-(1 << 8 * w.itemsize - 1), (1 << 8 * w.itemsize - 1) - 1) for w in _WIDTHS)
_CONSTANT, _OFFSET, _SHIFT, _ROWS, _COLS, _ESCAPES = 3, 4, 8, 16, 32, 64  # the bits of an array's first byte


def _prior(prior: np.ndarray | None, count: int) -> np.ndarray:
    """The prior as int32 (count,), within what any class can make use of."""
    if prior is None:
        return np.zeros(count, np.int32)
    prior = np.clip(np.asarray(prior, np.int64).reshape(-1), -_FAR, _FAR).astype(np.int32)
    return np.broadcast_to(prior, (count,)).copy()


def _grids(trellis: int) -> tuple[int, ...]:
    return (Q0, Q1) if trellis else (INTEGERS,)


def _class(value: int) -> int:
    return min(max(value, 0), CLASSES - 1)


def _contexts(plan: Plan, row_prior: np.ndarray, col_prior: np.ndarray, trellis: int) -> Contexts:
    """The contexts that a plan means; the tables span the classes that occur."""
    rows, cols = plan.base - row_prior, -col_prior
    if plan.row_spread is not None:
        rows = rows + plan.row_spread
    if plan.col_spread is not None:
        cols = cols + plan.col_spread
    lowest, highest = (_class(int(r) + int(c)) for r, c in ((rows.min(), cols.min()), (rows.max(), cols.max())))
    classes = range(lowest, highest + 1)
    table = np.stack([
        frequencies(model.shape, model.zero, grid)[[_class(c + model.offset) for c in classes]]
        for model, grid in zip(plan.models, _grids(trellis), strict=True)
    ])  # fmt: skip
    rows, cols = (rows - lowest).astype(np.int32), cols.astype(np.int32)
    return Contexts(rows, cols, table, machine(trellis) if trellis else None)


# ---------------------------------------------------------------------------------------------- encoding


def _plan(
    values: np.ndarray, row_prior: np.ndarray, col_prior: np.ndarray, trellis: int, scale: float, compiled: bool
) -> tuple[Split, np.ndarray, Plan]:
    """Return the cheapest way to split the values, its symbols and their models; the plan's bits count everything."""
    best: tuple[Split, np.ndarray, Plan] | None = None
    for split in splits(values, trellis):
        symbols = split.symbols()
        sample = Sample(symbols, split.groups, _grids(trellis), split.escape_bits, row_prior, col_prior, scale)
        plan = fit(sample, compiled)
        plan = replace(plan, bits=plan.bits + split.shift * values.size * scale)
        if best is None or plan.bits < best[2].bits:
            best = split, symbols, plan
    assert best is not None
    return best


def _checked(values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the values in one of the widths, their least and their largest."""
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise ValueError(f"expected a 2-D array of integers, not {values.dtype} of shape {values.shape}")
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < _LIMITS[-1][0] or high > _LIMITS[-1][1]:
        raise ValueError(f"integers must fit in 32 bits, and these reach from {low} to {high}")
    if values.dtype not in _WIDTHS:
        values = values.astype(np.int32)
    return np.ascontiguousarray(values), low, high


def _is_constant(values: np.ndarray, low: int, high: int) -> bool:
    return low == high and values.size <= _CONSTANT_LIMIT


def ideal_bits(
    values: np.ndarray,
    row_prior: np.ndarray | None = None,
    col_prior: np.ndarray | None = None,
    trellis: int = 0,
    rows: int | None = None,
) -> float:
    """Return the bits that :func:`encode_integers` takes, but for lanes and headers.

    Args:
        values: integers (m, n).
        row_prior: see :func:`encode_integers`.
        col_prior: see :func:`encode_integers`.
        trellis: number of states, 0 for none.
        rows: where ``values`` is a sample of the rows of a taller array, its number of rows; the bits are then those
            of all of it.
    """
    values, low, high = _checked(values)
    m, n = values.shape
    if _is_constant(values, low, high):
        return 0.0
    scale = 1.0 if rows is None else rows / m
    return _plan(values, _prior(row_prior, m), _prior(col_prior, n), trellis, scale, HAVE_NUMBA)[2].bits


def contexts_of(
    values: np.ndarray, row_prior: np.ndarray | None = None, col_prior: np.ndarray | None = None, trellis: int = 0
) -> Contexts:
    """Return the sharpest models of integers (m, n), m * n > 0: prices to code by, of whole codes.

    :func:`encode_integers` may choose others, where sharp ones do not earn what they take.
    """
    values, _, _ = _checked(values)
    row_prior, col_prior = _prior(row_prior, values.shape[0]), _prior(col_prior, values.shape[1])
    split = splits(values, trellis)[0]
    sample = Sample(split.symbols(), split.groups, _grids(trellis), split.escape_bits, row_prior, col_prior)
    return _contexts(fit(sample, HAVE_NUMBA, sharpest=True), row_prior, col_prior, trellis)


def encode_integers(
    values: np.ndarray,
    row_prior: np.ndarray | None = None,
    col_prior: np.ndarray | None = None,
    trellis: int = 0,
    compiled: bool = HAVE_NUMBA,
) -> bytes:
    """Return the bytes of an integer array, from which :func:`decode_integers` makes it again.

    Args:
        values: integers (m, n) of at most 32 bits, small ones mostly; 1-D arrays as (1, n).
        row_prior: integers (m,) or (1,), quarter octaves: what the decoder will know, too, of the rows' scale. A larger
            prior means smaller magnitudes, as the logarithm of a row's step does.
        col_prior: integers (n,) or (1,), likewise of the columns.
        trellis: number of states of the machine that chose the values' grids (they are points of its fine grid, each
            column from state 0 at the top of each chunk of :func:`chunk_rows`), or 0.
        compiled: use compiled kernels; the bytes are the same.

    Raises:
        ValueError: not integers of 32 bits, or not a path of the machine.
    """
    values, low, high = _checked(values)
    m, n = values.shape
    out = Writer()
    if _is_constant(values, low, high):
        out.byte(_CONSTANT)
        out.signed(low)
        return bytes(out)
    row_prior, col_prior = _prior(row_prior, m), _prior(col_prior, n)
    split, symbols, plan = _plan(values, row_prior, col_prior, trellis, 1.0, compiled)
    contexts = _contexts(plan, row_prior, col_prior, trellis)
    parts = []
    for rows in chunks(m, n):
        bits = (plan.bits - split.shift * values.size) * (rows.stop - rows.start) / m
        lanes = lanes_for(bits, n if trellis else values.size)
        parts.append(_encode_chunk(split, symbols, rows, contexts, lanes, compiled))
    width = next(i for i, (least, most) in enumerate(_LIMITS) if least <= low and high <= most)
    _write_header(out, width, split, plan, any(part.escapes for part in parts), compiled)
    for part in parts:
        write_sizes(out, part.stream)
        if any(p.escapes for p in parts):
            out.unsigned(part.escapes)
    for part in parts:
        write_stream(out, part.stream)
        out.raw(bytes(part.planes))
    return bytes(out)


@dataclass(frozen=True)
class _Chunk:
    stream: Stream
    escapes: int
    planes: bytes | memoryview  # escaped values, then low bits


def _encode_chunk(
    split: Split, symbols: np.ndarray, rows: slice, contexts: Contexts, lanes: int, compiled: bool
) -> _Chunk:
    contexts = contexts.select(rows.start, rows.stop)
    groups = None if split.groups is None else split.groups[rows].reshape(-1)
    part, escaped = escape(symbols[rows].reshape(-1), groups, contexts, compiled)
    return _Chunk(encode(part, groups, contexts, lanes, compiled), len(escaped), split.planes(rows, escaped))


def _write_header(out: Writer, width: int, split: Split, plan: Plan, escaped: bool, compiled: bool) -> None:
    out.byte(
        width
        | _OFFSET * (split.offset != 0)
        | _SHIFT * (split.shift != 0)
        | _ROWS * (plan.row_spread is not None)
        | _COLS * (plan.col_spread is not None)
        | _ESCAPES * escaped
    )
    if split.offset:
        out.signed(split.offset)
    if split.shift:
        out.byte(split.shift)
    if escaped:
        out.byte(split.escape_bits)
    out.signed(plan.base)
    for group, model in enumerate(plan.models):
        out.byte(model.shape << 4 | model.zero)
        if group:
            out.signed(model.offset)
    for spread in (plan.row_spread, plan.col_spread):
        if spread is not None:
            out.block(encode_integers(spread[None], compiled=compiled))


# ---------------------------------------------------------------------------------------------- decoding


def decode_integers(
    data: bytes | memoryview,
    shape: tuple[int, int],
    row_prior: np.ndarray | None = None,
    col_prior: np.ndarray | None = None,
    trellis: int = 0,
    backend: str = "auto",
    rows: slice | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return the integers of :func:`encode_integers`: int8, int16 or int32, the least that holds them all.

    Args:
        data: exactly the bytes of one array.
        shape: (m, n).
        row_prior: as the encoder had it.
        col_prior: as the encoder had it.
        trellis: as the encoder had it.
        backend: implementation, one of :data:`hf_sqf.runtime.sqf_decoders.BACKENDS`.
        rows: decode only the chunks that hold this range of rows, and return the range.
        device: where the torch backend works.

    Raises:
        ValueError: the bytes are damaged or do not belong to this shape. Nothing large is allocated before the
            number of bytes has been found to allow for it.
    """
    m, n = shape
    start, stop = (0, m) if rows is None else (rows.start or 0, m if rows.stop is None else rows.stop)
    if not 0 <= start <= stop <= m:
        raise ValueError(f"rows {start}..{stop} are not among {m}")
    reader = Reader(data)
    flags = reader.byte()
    if flags & 3 == _CONSTANT:
        return _constant(reader, flags, m * n, (stop - start, n))
    if flags >= 128:
        raise ValueError("an array uses a feature that this version does not know")
    if m * n == 0 or m * n > reader.left * SYMBOLS_PER_BYTE:
        raise ValueError(f"{reader.left} bytes cannot hold an array of shape {m} x {n}")
    layout = _Layout(
        reader.signed() if flags & _OFFSET else 0,
        reader.byte() if flags & _SHIFT else 0,
        reader.byte() if flags & _ESCAPES else 0,
    )
    if (
        (flags & _SHIFT and not 1 <= layout.shift <= 31)
        or (flags & _ESCAPES and not 1 <= layout.escape_bits <= 34)
        or (flags & (_ROWS | _COLS) and (m == 1 or n == 1))  # so that a spread cannot have spreads in turn
    ):
        raise ValueError("the header of an array is damaged")
    plan = _read_plan(reader, m, n, flags, len(_grids(trellis)))
    parts = _read_chunks(reader, (m, n), layout, trellis > 0, slice(start, stop))
    contexts = _contexts(plan, _prior(row_prior, m), _prior(col_prior, n), trellis)
    out = np.empty((stop - start, n), _WIDTHS[flags & 3])

    def read(part: tuple[slice, _Chunk]) -> None:
        where, chunk = part
        first, last = max(where.start, start), min(where.stop, stop)
        inside, target = slice(first - where.start, last - where.start), out[first - start : last - start]
        _decode_chunk(chunk, contexts.select(where.start, where.stop), layout, inside, target, backend, device)

    if len(parts) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(min(len(parts), torch.get_num_threads())) as pool:
            list(pool.map(read, parts))
    else:
        for part in parts:
            read(part)
    return out


@dataclass(frozen=True)
class _Layout:
    """How values are made of symbols and plain bits."""

    offset: int
    shift: int
    escape_bits: int


def _constant(reader: Reader, flags: int, count: int, shape: tuple[int, int]) -> np.ndarray:
    value = reader.signed()
    reader.end()
    widths = [w for w, (low, high) in zip(_WIDTHS, _LIMITS, strict=True) if low <= value <= high]
    if flags != _CONSTANT or count > _CONSTANT_LIMIT or not widths:
        raise ValueError(f"an array of {count} equal values is damaged")
    return np.full(shape, value, widths[0])


def _read_plan(reader: Reader, m: int, n: int, flags: int, groups: int) -> Plan:
    base, models = reader.signed(1 << 24), []
    for group in range(groups):
        shape, zero = divmod(reader.byte(), 16)
        if shape >= SHAPES:
            raise ValueError(f"an array uses model {shape}, which this version does not know")
        models.append(Model(shape, zero, reader.signed(CLASSES) if group else 0))
    spreads = []
    for flag, count in ((_ROWS, m), (_COLS, n)):
        spread = None
        if flags & flag:
            spread = decode_integers(reader.block(), (1, count))[0].astype(np.int32)
            spread = np.minimum(np.maximum(spread, -_FAR), _FAR)
        spreads.append(spread)
    return Plan(base, spreads[0], spreads[1], tuple(models), 0.0)


def _read_chunks(
    reader: Reader, shape: tuple[int, int], layout: _Layout, machine: bool, wanted: slice
) -> list[tuple[slice, _Chunk]]:
    """Return the rows and the content of each wanted chunk; every size is checked against the bytes that are there."""
    n, sizes = shape[1], []
    for rows in chunks(*shape):
        count = (rows.stop - rows.start) * n
        size = read_sizes(reader, count, n if machine else count)
        escapes = reader.unsigned(count) if layout.escape_bits else 0
        planes = packed_size(layout.escape_bits, escapes) + packed_size(layout.shift, count)
        sizes.append((rows, size, escapes, planes))
    parts = []
    for rows, size, escapes, planes in sizes:
        if rows.start < wanted.stop and rows.stop > wanted.start:
            parts.append((rows, _Chunk(read_stream(reader, size), escapes, reader.raw(planes))))
        else:
            reader.raw(4 * size.lanes + 2 * size.words + planes)
    reader.end()
    return parts


def _decode_chunk(
    chunk: _Chunk,
    contexts: Contexts,
    layout: _Layout,
    inside: slice,
    target: np.ndarray,
    backend: str,
    device: torch.device | str,
) -> None:
    """Write the values of the rows ``inside`` of a chunk to ``target``, whose width they must fit."""
    low = parity = None
    shape = len(contexts.rows), len(contexts.cols)
    if layout.shift:
        planes = chunk.planes[packed_size(layout.escape_bits, chunk.escapes) :]
        low = unpack_bits(planes, layout.shift, contexts.count)
        parity = (low & 1).astype(np.uint8)
    symbols, grids = decode(chunk.stream, contexts, parity, backend, device)
    where = escapes_of(symbols, chunk.escapes)
    escaped = escaped_values(chunk.planes, chunk.escapes, layout.escape_bits)
    first, last = inside.start * shape[1], inside.stop * shape[1]
    flat = target.reshape(-1)
    if low is None and layout.offset == 0:
        # Symbols are most of the values, and int8; the few escaped ones are put in their places.
        values = symbols
        if grids is not None:
            values, escaped = points_of_codes(symbols, grids), points_of_codes(escaped, grids[where])
            values[where] = 0
        chosen = (where >= first) & (where < last)
        _check_width(values[first:last], target)
        _check_width(escaped[chosen], target)
        flat[:] = values[first:last]
        flat[where[chosen] - first] = escaped[chosen]
        return
    values = symbols.astype(np.int64)
    values[where] = escaped
    values = values if low is None else values << layout.shift | low
    values = layout.offset + (values if grids is None else points_of_codes(values, grids))[first:last]
    _check_width(values, target)
    flat[:] = values


def _check_width(values: np.ndarray, target: np.ndarray) -> None:
    if values.dtype.itemsize <= target.dtype.itemsize:
        return
    least, most = _LIMITS[_WIDTHS.index(target.dtype)]
    if values.size and not (least <= int(values.min()) and int(values.max()) <= most):
        raise ValueError("a value does not fit the width of its array")
