"""Choosing the parameters of a stream's models: what the encoder does beyond the format.

The magnitude class of symbol (i, j) is ``base + rows[i] + cols[j]``, whose parts come from what both sides know
already (the steps, as priors) plus spreads that are stored where they pay for their bits. Parts are fitted to the
sums of magnitudes over rows and columns alone; then one histogram by class tells the exact cost of every model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
_SPREAD = 60  # a fitted part lies within this many quarter octaves of the middle
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
def _marginals_compiled(symbols, groups, odd_grid, fine, rows, cols):  # noqa: ANN001, ANN202
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
        if fine:
            magnitude = 2 * magnitude - odd_grid[sample.groups[part]].astype(np.int16) * (magnitude > 0)
        rows[part] = magnitude.sum(1, dtype=np.int64)
        cols += magnitude.sum(0, dtype=np.int64)
    return rows, cols


@jit
def _histogram_compiled(symbols, groups, rows, cols, classes, counts):  # noqa: ANN001, ANN202
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


def _fit_part(sums: np.ndarray, others: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the part r of each line's class whose expected sum over the ``others`` lies nearest to its own.

    Args:
        sums: (lines,) sums of magnitudes.
        others: int32, the other side's parts of the class.
        mean: (CLASSES,) expected magnitudes.
    """
    values, counts = np.unique(others, return_counts=True)
    middle = int(np.median(others))
    candidates = np.arange(-middle - _SPREAD // 4, CLASSES - middle + _SPREAD // 4)
    expected = mean[np.clip(candidates[:, None] + values, 0, CLASSES - 1)] @ counts
    # Nearest in ratio; half a unit keeps empty lines finite.
    bounds = np.sqrt((expected[1:] + 0.5) * (expected[:-1] + 0.5))
    return candidates[np.searchsorted(bounds, sums + 0.5)].astype(np.int32)


def _entropy(values: np.ndarray) -> float:
    """Return the bits of ``values`` by their own histogram, with what storing a model and a stream takes."""
    counts = np.bincount(values - values.min())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / len(values))).sum()) + _SIDE_OVERHEAD


def _choose_model(counts: np.ndarray, grid: int, escape_bits: int) -> tuple[int, Model]:
    """Return the least cost (65536 to the bit) of a histogram (CLASSES, SYMBOLS) and its model, by local search."""
    used = np.flatnonzero(counts.any(1))
    if not len(used):
        return 0, Model(DEFAULT_SHAPE, DEFAULT_ZERO)
    symbols = np.flatnonzero(counts.any(0))
    window = slice(symbols[0], symbols[-1] + 1)
    counts = counts[used][:, window]
    known: dict[Model, int] = {}

    def cost(model: Model) -> int:
        if model not in known:
            bits, escaped = costs(model.shape, model.zero, grid)
            rows = np.clip(used + model.offset, 0, CLASSES - 1)
            each = bits[rows, window] + escaped[rows, window] * (escape_bits * COST_ONE)
            known[model] = int((counts * each).sum())
        return known[model]

    best = min((Model(DEFAULT_SHAPE, DEFAULT_ZERO, o) for o in range(-4, 5)), key=cost)
    while True:
        near = [
            Model(best.shape + s, best.zero + z, best.offset + o)
            for s, z, o in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (1, 0, 1), (-1, 0, -1))
            if 0 <= best.shape + s < SHAPES and 0 <= best.zero + z < ZEROS and abs(best.offset + o) < CLASSES
        ]
        better = min(near, key=cost)
        if cost(better) >= cost(best):
            return cost(best), best
        best = better


def _middle(values: np.ndarray) -> int:
    return int(np.partition(values, len(values) // 2)[len(values) // 2])


def fit(sample: Sample, compiled: bool = HAVE_NUMBA) -> Plan:
    """Return the cheapest plan found for a sample of at least one symbol."""
    m, n = sample.symbols.shape
    sums, col_sums = _marginals(sample, compiled)
    mean = np.mean([mean_magnitudes(DEFAULT_SHAPE, DEFAULT_ZERO, g) for g in sample.grids], axis=0)
    row_part, col_part = -sample.row_prior, -sample.col_prior
    # The priors alone: one base for all.
    base = int(_fit_part(sums.sum(keepdims=True), np.add.outer(_thin(row_part), _thin(col_part)).reshape(-1), mean * (
        m * n / (len(_thin(row_part)) * len(_thin(col_part)))))[0])  # fmt: skip
    candidates = [(row_part, col_part + base, False, False)]
    if n > 1 and m > 1:
        rows = _fit_part(sums, candidates[0][1], mean)
        cols = _fit_part(col_sums, row_part, mean)
        both_cols = _fit_part(col_sums, rows, mean)
        both_rows = _fit_part(sums, both_cols, mean)
        candidates += [
            (rows, candidates[0][1], True, False),
            (row_part, cols, False, True),
            (both_rows, _fit_part(col_sums, both_rows, mean), True, True),
        ]
    plans = []
    for rows, cols, rows_stored, cols_stored in candidates:
        base, row_spread, col_spread, side = 0, None, None, 0.0
        if rows_stored:
            row_spread = rows + sample.row_prior
            base += _middle(row_spread)
            row_spread = row_spread - _middle(row_spread)
            side += _entropy(row_spread) * sample.scale
        if cols_stored:
            col_spread = cols + sample.col_prior
            base += _middle(col_spread)
            col_spread = col_spread - _middle(col_spread)
            side += _entropy(col_spread)
        else:
            base += int(cols[0] + sample.col_prior[0])
        chosen = [
            _choose_model(counts, grid, sample.escape_bits)
            for counts, grid in zip(_histogram(sample, rows, cols, compiled), sample.grids, strict=True)
        ]
        bits = sum(c for c, _ in chosen) / COST_ONE
        plans.append(Plan(base, row_spread, col_spread, tuple(x for _, x in chosen), bits * sample.scale + side))
    return min(plans, key=lambda p: p.bits)


def _thin(part: np.ndarray) -> np.ndarray:
    """At most 64 of the values, evenly spaced in rank: their sums stand for all pairs."""
    if len(part) <= 64:
        return part
    return np.sort(part)[np.linspace(0, len(part) - 1, 64).astype(np.int64)]
