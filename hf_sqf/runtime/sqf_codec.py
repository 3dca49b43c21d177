"""Integer arrays <-> bytes. The format is described field by field in FORMAT.md.

Arrays are cut into chunks of whole rows, each a stream of its own (:mod:`hf_sqf.runtime.sqf_rans`), so that they
decode in parallel, in bounded memory, and rows can be had without the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from . import sqf_rans
from .sqf_bytes import Reader, Writer, pack_bits, packed_size, unpack_bits
from .sqf_fit import Plan, Sample, fit
from .sqf_jit import HAVE_NUMBA
from .sqf_models import (
    CLASSES,
    EVEN,
    INTEGERS,
    LARGEST,
    ODD,
    Q0,
    SHAPES,
    SYMBOLS,
    ZEROS,
    Model,
    frequencies,
)
from .sqf_paths import codes_of_points, points_of_codes
from .sqf_rans import Contexts
from .sqf_trellis import Machine, machine

CHUNK = 1 << 20
"""Symbols in a chunk of rows, at most (but at least one row)."""
SYMBOLS_PER_BYTE = 11_400
"""No stream holds more symbols to a byte: the likeliest has a probability of 4094 / 4096."""
_LANE_BITS = 6144  # bits of a stream for each lane, whose state wastes 24: 0.4 %
_MOST_LANES = 4096
_CONSTANT_LIMIT = 1 << 16  # the most equal values that are written as one
_WIDTHS = (np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.int32))
_CONSTANT, _OFFSET, _SHIFT, _ROWS, _COLS, _ESCAPES = 3, 4, 8, 16, 32, 64  # bits of a stream's first byte


def chunk_rows(m: int, n: int) -> int:
    """Return the number of rows in a chunk of an (m, n) array. A state machine starts anew at each chunk."""
    return max(1, min(m, CHUNK // max(n, 1)))


def _chunks(m: int, n: int) -> Iterator[slice]:
    rows = chunk_rows(m, n)
    return (slice(i, min(i + rows, m)) for i in range(0, m, rows))


def _machine(trellis: int) -> Machine | None:
    return machine(trellis) if trellis else None


def _prior(prior: np.ndarray | None, count: int) -> np.ndarray:
    """The prior as int32 (count,), within what any class can make use of."""
    if prior is None:
        return np.zeros(count, np.int32)
    prior = np.clip(np.asarray(prior, np.int64).reshape(-1), -(1 << 20), 1 << 20).astype(np.int32)
    return np.broadcast_to(prior, (count,)).copy()


# ---------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class _Codes:
    """Values ready for modelling: ``offset + (high << shift | low)``, or points of a machine."""

    codes: np.ndarray  # (m, n) k, before the shift
    groups: np.ndarray | None  # uint8 (m, n)
    offset: int
    shift: int
    escape_bits: int

    def high(self, rows: slice) -> np.ndarray:
        return self.codes[rows] if self.shift == 0 else self.codes[rows] >> self.shift

    def symbols(self) -> np.ndarray:
        """int8 (m, n): the high parts, with escapes for what is outside the alphabet."""
        if self.codes.dtype == np.int8 and self.escape_bits == 0:
            return self.codes
        out = np.empty(self.codes.shape, np.int8)
        for rows in _chunks(*out.shape):
            high = self.high(rows)
            # -128 is even and 127 is odd, so the parity of an escape is that of its value.
            out[rows] = np.where(
                (high > LARGEST) | (high < -LARGEST), np.where(high & 1, ODD, EVEN).astype(np.int8), high
            )
        return out


def _zigzag(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    return np.where(values < 0, -2 * values - 1, 2 * values)


def _escape_bits(codes: np.ndarray, shift: int) -> int:
    return max(int(_zigzag(np.array([codes.min() >> shift, codes.max() >> shift])).max()).bit_length(), 1)


def _prepare(values: np.ndarray, trellis: int) -> list[_Codes]:
    """Return the ways to split values that are worth costing: without a plane of low bits, and with one."""
    m, n = values.shape
    states_machine, offset, groups = _machine(trellis), 0, None
    if states_machine is not None:
        codes, groups = np.empty((m, n), np.int32), np.empty((m, n), np.uint8)
        for rows in _chunks(m, n):
            try:
                codes[rows], states = codes_of_points(values[rows], states_machine)
            except ValueError as error:
                raise ValueError(f"rows {rows.start}..{rows.stop}: {error}") from None
            groups[rows] = states_machine.grid[states]
    elif m == 1:
        offset = int(np.partition(values[0], n // 2)[n // 2])
        codes = values.astype(np.int64) - offset
    else:
        codes = values
    low, high = int(codes.min()), int(codes.max())
    if codes.dtype != np.int8 and -LARGEST <= low and high <= LARGEST:
        codes = codes.astype(np.int8)
    shifts = [0]
    if max(high, -low) > LARGEST:
        mean = float(np.abs(codes.astype(np.int64)).mean()) if m * n <= CHUNK else float(
            np.mean([np.abs(codes[rows].astype(np.int64)).mean() for rows in _chunks(m, n)]))  # fmt: skip
        shifts += [s for s in {int(np.log2(max(mean, 1.0) / 8)), (max(high, -low) // LARGEST).bit_length()} if s > 0]
    return [_Codes(codes, groups, offset, s, _escape_bits(codes, s)) for s in sorted(set(shifts))]


def _plan(
    values: np.ndarray,
    row_prior: np.ndarray,
    col_prior: np.ndarray,
    trellis: int,
    scale: float,
) -> tuple[_Codes, np.ndarray, Plan]:
    grids = (INTEGERS,) if trellis == 0 else (Q0, Q0 + 1)
    best = None
    for codes in _prepare(values, trellis):
        symbols = codes.symbols()
        plan = fit(Sample(symbols, codes.groups, grids, codes.escape_bits, row_prior, col_prior, scale))
        bits = plan.bits + codes.shift * values.size * scale
        if best is None or bits < best[0]:
            best = bits, codes, symbols, plan
    assert best is not None
    return best[1:]


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise ValueError(f"expected a 2-D array of integers, not {values.dtype} of shape {values.shape}")
    if values.size and (int(values.min()) < -(1 << 31) or int(values.max()) >= 1 << 31):
        raise ValueError("integers must fit in 32 bits")
    if values.dtype not in _WIDTHS:
        values = values.astype(np.int32)
    return np.ascontiguousarray(values)


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
    values = _checked(values)
    m, n = values.shape
    if values.size == 0 or (values.size <= _CONSTANT_LIMIT and values.min() == values.max()):
        return 0.0
    scale = 1.0 if rows is None else rows / m
    codes, _, plan = _plan(values, _prior(row_prior, m), _prior(col_prior, n), trellis, scale)
    return plan.bits + codes.shift * values.size * scale


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
    values = _checked(values)
    m, n = values.shape
    out = Writer()
    if values.size == 0 or (values.size <= _CONSTANT_LIMIT and values.min() == values.max()):
        out.byte(_CONSTANT)
        out.signed(int(values[0, 0]) if values.size else 0)
        return bytes(out)
    row_prior, col_prior = _prior(row_prior, m), _prior(col_prior, n)
    codes, symbols, plan = _plan(values, row_prior, col_prior, trellis, 1.0)
    contexts = _contexts(plan, row_prior, col_prior, trellis)
    width = next(i for i, w in enumerate(_WIDTHS) if np.iinfo(w).min <= values.min() and values.max() <= np.iinfo(w).max)
    chunks = [
        _encode_chunk(codes, symbols, rows, contexts, lanes_for(plan.bits * (rows.stop - rows.start) / m, n if trellis else _MOST_LANES), compiled)
        for rows in _chunks(m, n)
    ]  # fmt: skip
    escaped = any(c.escapes for c in chunks)
    out.byte(
        width
        | _OFFSET * (codes.offset != 0)
        | _SHIFT * (codes.shift != 0)
        | _ROWS * (plan.row_spread is not None)
        | _COLS * (plan.col_spread is not None)
        | _ESCAPES * escaped
    )
    if codes.offset:
        out.signed(codes.offset)
    if codes.shift:
        out.byte(codes.shift)
    if escaped:
        out.byte(codes.escape_bits)
    out.signed(plan.base + plan.models[0].offset)
    for group, model in enumerate(plan.models):
        out.byte(model.shape << 4 | model.zero)
        if group:
            out.signed(model.offset - plan.models[0].offset)
    for spread in (plan.row_spread, plan.col_spread):
        if spread is not None:
            out.block(encode_integers(spread[None], compiled=compiled))
    for chunk in chunks:
        out.unsigned(len(chunk.states))
        out.unsigned(len(chunk.words))
        if escaped:
            out.unsigned(chunk.escapes)
    for chunk in chunks:
        out.raw(chunk.states.astype("<u4").tobytes())
        out.raw(chunk.words.astype("<u2").tobytes())
        out.raw(chunk.planes)
    return bytes(out)


@dataclass(frozen=True)
class _Chunk:
    states: np.ndarray
    words: np.ndarray
    escapes: int
    planes: bytes  # escaped values, then low bits


def lanes_for(bits: float, most: int = _MOST_LANES) -> int:
    """Return the number of lanes for a stream of about ``bits`` bits: as many as cost little."""
    return max(1, min(most, _MOST_LANES, int(bits) // _LANE_BITS))


def _encode_chunk(
    codes: _Codes, symbols: np.ndarray, rows: slice, contexts: Contexts, lanes: int, compiled: bool
) -> _Chunk:
    contexts = contexts.select(rows.start, rows.stop)
    part = symbols[rows].reshape(-1)
    groups = None if codes.groups is None else codes.groups[rows].reshape(-1)
    index = contexts.class_index()
    if groups is not None:
        index += groups.astype(np.int64) * contexts.classes
    known = contexts.table.reshape(-1, SYMBOLS)[index, part.astype(np.int64) + 128] > 0
    known &= (part != EVEN) & (part != ODD)
    escaped = np.flatnonzero(~known)
    high = codes.high(rows).reshape(-1)
    if len(escaped):
        part = part.copy()
        part[escaped] = np.where(high[escaped] & 1, ODD, EVEN)
    planes = pack_bits(_zigzag(high[escaped]), codes.escape_bits)
    if codes.shift:
        planes += pack_bits(codes.codes[rows].reshape(-1) & (1 << codes.shift) - 1, codes.shift)
    states, words = sqf_rans.encode(part, groups, contexts, lanes, compiled)
    return _Chunk(states, words, len(escaped), planes)


def _contexts(plan: Plan, row_prior: np.ndarray, col_prior: np.ndarray, trellis: int) -> Contexts:
    """The contexts that the header's fields mean; the tables span the classes that occur."""
    rows = plan.base + plan.models[0].offset - row_prior
    cols = -col_prior
    if plan.row_spread is not None:
        rows = rows + plan.row_spread
    if plan.col_spread is not None:
        cols = cols + plan.col_spread
    lowest, highest = (int(np.clip(f(rows) + f(cols), 0, CLASSES - 1)) for f in (np.min, np.max))
    grids = (INTEGERS,) if trellis == 0 else (Q0, Q0 + 1)
    classes = np.arange(lowest, highest + 1)
    table = np.stack([
        frequencies(model.shape, model.zero, grid)[np.clip(classes + model.offset - plan.models[0].offset, 0, CLASSES - 1)]
        for model, grid in zip(plan.models, grids, strict=True)
    ])  # fmt: skip
    states_machine = _machine(trellis)
    groups = () if states_machine is None else tuple(states_machine.grid.tolist())
    return Contexts((rows - lowest).astype(np.int32), cols.astype(np.int32), table, states_machine, groups)


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
        backend: implementation, one of :data:`hf_sqf.runtime.sqf_rans.BACKENDS`.
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
        value = reader.signed()
        reader.end()
        if flags != _CONSTANT or m * n > _CONSTANT_LIMIT or not -(1 << 31) <= value < 1 << 31:
            raise ValueError("a constant array is damaged")
        width = next(w for w in _WIDTHS if np.iinfo(w).min <= value <= np.iinfo(w).max)
        return np.full((stop - start, n), value, width)
    if flags >= 128:
        raise ValueError("an array uses a feature that this version does not know")
    if m * n == 0 or m * n > reader.left * SYMBOLS_PER_BYTE:
        raise ValueError(f"{reader.left} bytes cannot hold an array of shape {m} x {n}")
    states_machine = _machine(trellis)
    offset = reader.signed() if flags & _OFFSET else 0
    shift = reader.byte() if flags & _SHIFT else 0
    escape_bits = reader.byte() if flags & _ESCAPES else 0
    if shift > 31 or escape_bits > 33:
        raise ValueError("an array's header is damaged")
    plan = _read_plan(reader, m, n, flags, 1 if states_machine is None else 2)
    contexts = _contexts(plan, _prior(row_prior, m), _prior(col_prior, n), trellis)
    out = np.empty((stop - start, n), _WIDTHS[flags & 3])
    parts = _read_chunks(reader, m, n, flags, shift, escape_bits, states_machine is not None)

    def decode(part: tuple[slice, _Chunk]) -> None:
        where, chunk = part
        values = _decode_chunk(chunk, contexts.select(where.start, where.stop), shift, escape_bits, backend, device)
        first, last = max(where.start, start), min(where.stop, stop)
        inside = slice(first - where.start, last - where.start)
        target = out[first - start : last - start]
        if states_machine is None:
            _store(values[inside], offset, target)
        elif first == where.start and last == where.stop:
            _points(values, states_machine, target)
        else:
            whole = np.empty(values.shape, out.dtype)
            _points(values, states_machine, whole)
            target[:] = whole[inside]

    wanted = [(where, chunk) for where, chunk in parts if where.start < stop and where.stop > start]
    if len(wanted) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(min(len(wanted), torch.get_num_threads())) as pool:
            list(pool.map(decode, wanted))
    else:
        for part in wanted:
            decode(part)
    return out


def _read_plan(reader: Reader, m: int, n: int, flags: int, groups: int) -> Plan:
    base, models = reader.signed(1 << 24), []
    for group in range(groups):
        shape, zero = divmod(reader.byte(), 16)
        if shape >= SHAPES or zero >= ZEROS:
            raise ValueError(f"an array uses model {shape}, which this version does not know")
        models.append(Model(shape, zero, reader.signed(CLASSES) if group else 0))
    spreads = []
    for flag, count in ((_ROWS, m), (_COLS, n)):
        spread = None
        if flags & flag:
            spread = decode_integers(reader.block(), (1, count))[0].astype(np.int32)
            spread = np.clip(spread, -(1 << 20), 1 << 20)
        spreads.append(spread)
    return Plan(base, spreads[0], spreads[1], tuple(models), 0.0)


def _read_chunks(
    reader: Reader, m: int, n: int, flags: int, shift: int, escape_bits: int, machine: bool
) -> list[tuple[slice, _Chunk]]:
    """Return the rows and the content of each chunk; every size is checked against the bytes that are there."""
    sizes = []
    for rows in _chunks(m, n):
        count = (rows.stop - rows.start) * n
        lanes, words = reader.unsigned(min(count, 1 << 16)), reader.unsigned(count)
        escapes = reader.unsigned(count) if flags & _ESCAPES else 0
        if lanes == 0 or (machine and lanes > n):
            raise ValueError(f"a chunk has {lanes} lanes for rows of {n}")
        if count > (4 * lanes + 2 * words) * SYMBOLS_PER_BYTE:
            raise ValueError(f"a chunk of {count} symbols has only {words} words")
        sizes.append((rows, lanes, words, escapes, packed_size(escape_bits, escapes) + packed_size(shift, count)))
    parts = [
        (rows, _Chunk(reader.array("u4", lanes), reader.array("u2", words), escapes, bytes(reader.raw(planes))))
        for rows, lanes, words, escapes, planes in sizes
    ]
    reader.end()
    return parts


def _decode_chunk(
    chunk: _Chunk, contexts: Contexts, shift: int, escape_bits: int, backend: str, device: torch.device | str
) -> np.ndarray:
    """Return the codes k of a chunk, int8 (rows, n) where there are only symbols and else int64."""
    count = contexts.count
    low = parity = None
    if shift:
        low = unpack_bits(chunk.planes[packed_size(escape_bits, chunk.escapes) :], shift, count)
        parity = (low & 1).astype(np.uint8)
    symbols = sqf_rans.decode(chunk.states, chunk.words, contexts, parity, backend, device)
    shape = len(contexts.rows), len(contexts.cols)
    escaped = np.flatnonzero((symbols == EVEN) | (symbols == ODD))
    if len(escaped) != chunk.escapes:
        raise ValueError("the number of escaped values is wrong")
    if not len(escaped) and low is None:
        return symbols.reshape(shape)
    values = symbols.astype(np.int64)
    zigzag = unpack_bits(chunk.planes, escape_bits, chunk.escapes).astype(np.int64)
    values[escaped] = np.where(zigzag & 1, -(zigzag + 1 >> 1), zigzag >> 1)
    if low is not None:
        values = values << shift | low
    return values.reshape(shape)


def _store(values: np.ndarray, offset: int, target: np.ndarray) -> None:
    if values.dtype == np.int8 and offset == 0:
        target[:] = values
        return
    values = values.astype(np.int64) + offset
    _check_width(values, target)
    target[:] = values


def _check_width(values: np.ndarray, target: np.ndarray) -> None:
    limits = np.iinfo(target.dtype)
    if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
        raise ValueError("a value does not fit its declared width")


def _points(codes: np.ndarray, machine: Machine, target: np.ndarray) -> None:
    if 2 * int(np.abs(codes.astype(np.int16 if codes.dtype == np.int8 else codes.dtype)).max()) <= np.iinfo(target.dtype).max:
        points_of_codes(codes, machine, target)
        return
    wide = np.empty(codes.shape, np.int64)
    points_of_codes(codes, machine, wide)
    _check_width(wide, target)
    target[:] = wide
