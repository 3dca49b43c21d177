"""Choosing the parameters of a stream's models: what the encoder does beyond the format.

The magnitude class of symbol (i, j) is ``base + rows[i] + cols[j]``, whose parts come from what both sides know
already (the steps, as priors) plus spreads that are stored where they pay for their bits. Parts are fitted to the
sums of magnitudes over rows and columns alone; then one histogram by class tells the exact cost of every model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .sqf_jit import HAVE_NUMBA, jit
from .sqf_models import (
    CLASSES,
    COST_ONE,
    DEFAULT_SHAPE,
    DEFAULT_ZERO,
    INTEGERS,
    SHAPES,
    SYMBOLS,
    ZEROS,
    Model,
    costs,
    mean_magnitudes,
)

_BLOCK = 1 << 20  # symbols that numpy works on at a time
_WIDE = 32  # quarter octaves about the middle beyond which parts of a class are not told apart
_MOVES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (1, 0, 1), (-1, 0, -1))
_SIDE_OVERHEAD = 96  # bits of a stored spread beside its entropy


@dataclass(frozen=True)
class Plan:
    """The models of a stream.

    Attributes:
        base: added to every class.
        row_spread: int32 (m,) or None where it does not pay.
        col_spread: int32 (n,) or None.
        models: one for each group of states.
        bits: the ideal cost of the symbols and escapes, and an estimate of that of the spreads.
    """

    base: int
    row_spread: np.ndarray | None
    col_spread: np.ndarray | None
    models: tuple[Model, ...]
    bits: float


@dataclass(frozen=True)
class Sample:
    """Symbols to be modelled.

    Attributes:
        symbols: int8 (m, n), with escapes for what is outside the alphabet.
        groups: uint8 (m, n) group of each symbol, or None for group 0.
        grids: the grid of each group.
        escape_bits: bits of an escaped value.
        row_prior: int32 (m,), subtracted from the rows' part of the class.
        col_prior: int32 (n,), likewise.
        scale: how many times the rows stand for (a sample of the rows of a matrix), for weighing side information.
    """

    symbols: np.ndarray
    groups: np.ndarray | None
    grids: tuple[int, ...]
    escape_bits: int
    row_prior: np.ndarray
    col_prior: np.ndarray
    scale: float = 1.0


def _blocks(m: int, n: int) -> Iterator[slice]:
    rows = max(1, _BLOCK // max(n, 1))
    return (slice(i, i + rows) for i in range(0, m, rows))


@jit
def _marginals_compiled(
    symbols: np.ndarray, groups: np.ndarray, odd_grid: np.ndarray, fine: bool, rows: np.ndarray, cols: np.ndarray
) -> None:
    m, n = symbols.shape
    for i in range(m):
        total = 0
        for j in range(n):
            magnitude = abs(np.int64(symbols[i, j]))
            if fine:
                magnitude = 2 * magnitude - (odd_grid[groups[i, j]] if magnitude else 0)
            total += magnitude
            cols[j] += magnitude
        rows[i] = total


def _marginals(sample: Sample, compiled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of magnitudes on the fine grid, int64 (m,) and (n,)."""
    m, n = sample.symbols.shape
    rows, cols = np.zeros(m, np.int64), np.zeros(n, np.int64)
    fine = sample.grids[0] != INTEGERS
    odd_grid = np.array([g == 2 for g in sample.grids], np.int64)
    if compiled:
        groups = np.zeros((1, 1), np.uint8) if sample.groups is None else sample.groups
        _marginals_compiled(sample.symbols, groups, odd_grid, fine, rows, cols)
        return rows, cols
    for part in _blocks(m, n):
        magnitude = np.abs(sample.symbols[part].astype(np.int16))
        if sample.groups is not None:
            magnitude = 2 * magnitude - odd_grid[sample.groups[part]].astype(np.int16) * (magnitude > 0)
        rows[part] = magnitude.sum(1, dtype=np.int64)
        cols += magnitude.sum(0, dtype=np.int64)
    return rows, cols


@jit
def _histogram_compiled(
    symbols: np.ndarray, groups: np.ndarray, rows: np.ndarray, cols: np.ndarray, classes: int, counts: np.ndarray
) -> None:
    m, n = symbols.shape
    for i in range(m):
        row = rows[i]
        for j in range(n):
            index = min(max(row + cols[j], 0), classes - 1)
            if groups.size:
                index += groups[i, j] * classes
            counts[np.uint64(index * 256 + symbols[i, j] + 128)] += 1


def _histogram(sample: Sample, rows: np.ndarray, cols: np.ndarray, compiled: bool) -> np.ndarray:
    """Return int64 (groups, CLASSES, SYMBOLS): how often each symbol occurs in each class."""
    m, n = sample.symbols.shape
    counts = np.zeros(len(sample.grids) * CLASSES * SYMBOLS, np.int64)
    if compiled:
        groups = np.zeros((0, 0), np.uint8) if sample.groups is None else sample.groups
        _histogram_compiled(sample.symbols, groups, rows, cols, CLASSES, counts)
    else:
        for part in _blocks(m, n):
            index = np.clip(np.add.outer(rows[part], cols), 0, CLASSES - 1)
            if sample.groups is not None:
                index += sample.groups[part].astype(np.int32) * CLASSES
            index = index * SYMBOLS + sample.symbols[part] + 128
            counts += np.bincount(index.reshape(-1), minlength=len(counts))
    return counts.reshape(-1, CLASSES, SYMBOLS)


def _fit_part(sums: np.ndarray, others: np.ndarray, mean: np.ndarray, share: float = 1.0) -> np.ndarray:
    """Return the part r of each line's class whose expected sum over the ``others`` lies nearest to its own.

    Args:
        sums: (lines,) sums of magnitudes.
        others: int32, the other side's parts of the class.
        mean: (CLASSES,) expected magnitudes.
        share: how many symbols each of the others stands for.
    """
    middle = _middle(others)
    offsets = np.clip(others - middle, -_WIDE, _WIDE) + _WIDE
    counts = np.bincount(offsets, minlength=2 * _WIDE + 1) * share
    ladder = np.concatenate([np.full(2 * _WIDE, mean[0]), mean, np.full(2 * _WIDE, mean[-1])])
    # expected[r] = sum over the others of mean[clip(r + other)], for r = -_WIDE..CLASSES + _WIDE - 1
    expected = np.correlate(ladder, counts, "valid")
    # Nearest in ratio; half a unit keeps empty lines finite.
    bounds = np.sqrt((expected[1:] + 0.5) * (expected[:-1] + 0.5))
    return (np.searchsorted(bounds, sums + 0.5) - _WIDE - middle).astype(np.int32)


def _entropy(values: np.ndarray) -> float:
    """Return the bits of ``values`` by their own histogram, with what storing a model and a stream takes."""
    counts = np.bincount(values - values.min())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / len(values))).sum()) + _SIDE_OVERHEAD


def _choose_model(counts: np.ndarray, grid: int, escape_bits: int) -> tuple[int, Model]:
    """Return the least cost (65536 to the bit) of a histogram (CLASSES, SYMBOLS) and its model, by local search."""
    used, symbols = np.flatnonzero(counts.any(1)), np.flatnonzero(counts.any(0))
    if not len(used):
        return 0, Model(DEFAULT_SHAPE, DEFAULT_ZERO)
    first, last = int(used[0]), int(used[-1])
    window = slice(int(symbols[0]), int(symbols[-1]) + 1)
    counts = counts[first : last + 1, window]
    known: dict[tuple[int, int, int], int] = {}

    def cost(model: tuple[int, int, int]) -> int:
        if model not in known:
            shape, zero, offset = model
            bits, escaped = costs(shape, zero, grid)
            if first + offset >= 0 and last + offset < CLASSES:
                rows: slice | np.ndarray = slice(first + offset, last + offset + 1)
            else:
                rows = np.clip(np.arange(first, last + 1) + offset, 0, CLASSES - 1)
            total = int(np.einsum("ij,ij->", counts, bits[rows, window]))
            extra = int(np.einsum("ij,ij->", counts, escaped[rows, window]))
            known[model] = total + extra * escape_bits * COST_ONE
        return known[model]

    best = DEFAULT_SHAPE, DEFAULT_ZERO, 0
    while True:
        shape, zero, offset = best
        near = [
            (shape + s, zero + z, offset + o)
            for s, z, o in _MOVES
            if 0 <= shape + s < SHAPES and 0 <= zero + z < ZEROS and abs(offset + o) < CLASSES
        ]
        better = min(near, key=cost)
        if cost(better) >= cost(best):
            return cost(best), Model(*best)
        best = better


def _middle(values: np.ndarray) -> int:
    return int(np.partition(values, len(values) // 2)[len(values) // 2])


def fit(sample: Sample, compiled: bool = HAVE_NUMBA, sharpest: bool = False) -> Plan:
    """Return the cheapest plan found for a sample of at least one symbol.

    Args:
        sample: to be coded.
        compiled: use compiled kernels; the plan is the same.
        sharpest: store the parts of rows and columns whatever they take, and look at no other plan.
    """
    m, n = sample.symbols.shape
    row_sums, col_sums = _marginals(sample, compiled)
    mean = np.mean([mean_magnitudes(DEFAULT_SHAPE, DEFAULT_ZERO, g) for g in sample.grids], axis=0)
    known_rows, known_cols = -sample.row_prior, -sample.col_prior
    if sharpest:
        return _plan(sample, *_both_parts(row_sums, col_sums, known_cols, mean), True, True, compiled)
    # With the priors alone there is one base for all, fitted to (some of) all pairs of rows and columns.
    pairs = np.add.outer(_thin(known_rows), _thin(known_cols)).reshape(-1)
    base = int(_fit_part(row_sums.sum(keepdims=True), pairs, mean, m * n / len(pairs))[0])
    plans = [_plan(sample, known_rows + base, known_cols, False, False, compiled)]
    if m > 1 and n > 1:
        rows = _fit_part(row_sums, known_cols, mean)
        cols = _fit_part(col_sums, known_rows, mean)
        plans.append(_plan(sample, rows, known_cols, True, False, compiled))
        plans.append(_plan(sample, known_rows, cols, False, True, compiled))
        plans.append(_plan(sample, *_both_parts(row_sums, col_sums, known_cols, mean), True, True, compiled))
    return min(plans, key=lambda p: p.bits)


def _both_parts(
    row_sums: np.ndarray, col_sums: np.ndarray, known_cols: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows' and the columns' parts of the class, fitted to each other in turns."""
    rows = _fit_part(row_sums, known_cols, mean)
    cols = _fit_part(col_sums, rows, mean)
    rows = _fit_part(row_sums, cols, mean)
    return rows, _fit_part(col_sums, rows, mean)


def _plan(
    sample: Sample, rows: np.ndarray, cols: np.ndarray, rows_stored: bool, cols_stored: bool, compiled: bool
) -> Plan:
    """Return the plan of given parts of the class: its models, and which parts differ from the priors."""
    row_spread, col_spread = rows + sample.row_prior, cols + sample.col_prior
    base = _middle(row_spread) + _middle(col_spread)
    row_spread, col_spread = row_spread - _middle(row_spread), col_spread - _middle(col_spread)
    side = rows_stored * _entropy(row_spread) * sample.scale + cols_stored * _entropy(col_spread)
    chosen = [
        _choose_model(counts, grid, sample.escape_bits)
        for counts, grid in zip(_histogram(sample, rows, cols, compiled), sample.grids, strict=True)
    ]
    # The first group's offset goes into the base, so that no stream has to store it.
    first = chosen[0][1].offset
    models = tuple(replace(model, offset=model.offset - first) for _, model in chosen)
    bits = sum(cost for cost, _ in chosen) / COST_ONE * sample.scale + side
    return Plan(base + first, row_spread if rows_stored else None, col_spread if cols_stored else None, models, bits)


def _thin(part: np.ndarray) -> np.ndarray:
    """At most 64 of the values, evenly spaced in rank: their sums stand for all pairs."""
    if len(part) <= 64:
        return part
    return np.sort(part)[np.linspace(0, len(part) - 1, 64).astype(np.int64)]
