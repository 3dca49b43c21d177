"""``grid``: codes on a grid of steps, the dictionary being the identity.

Entropy-coded scalar quantization with steps ``step_j * row_i = c / (L_jj g_i)``: every entry carries the same
expected loss c^2 / 12 (reverse water-filling), and zeros appear where nothing is lost. Where H says how columns
go together, their rounding errors cancel (:mod:`.rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.sqf_factors import FINE, Factors, Term, log_scale, nearest_log_scale
from .metric import Metric
from .prices import prices_of, round_at_price
from .rate import term_bits
from .rounding import round_in_metric
from .solution import Solution
from .threads import side_by_side

RESOLUTION = 16
"""Divisions of an octave in steps and rows."""
MOST_FINER = 0.05
"""Where codes have prices, cells move outwards from their points, and points somewhat closer together do better: by
half the price of leaving zero, in steps, up to this (measured on Gaussian and on real weights at 0.5 to 4 bits)."""
_BLOCK = 1 << 20  # entries that are dealt with at a time: rows do not touch, and memory stays small
_SAMPLE = 1 << 20  # entries that tell what integers cost


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of a term as they are stored.

    Attributes:
        scale: int, in 1/4096 octaves.
        steps: int32 (n,), or (1,) where all are equal.
        rows: int32 (m,), or (1,) where all are equal.
    """

    scale: int
    steps: Tensor
    rows: Tensor

    def step_values(self) -> Tensor:
        """float32 (n,) or (1,): the columns' steps, the scale folded in."""
        return log_scale(self.steps, RESOLUTION) * log_scale(torch.tensor(self.scale), FINE)

    def row_values(self) -> Tensor:
        """float32 (m,) or (1,)."""
        return log_scale(self.rows, RESOLUTION)

    def term(self, codes: Tensor) -> Term:
        """Return the term of these scales and integer codes (m, n), in the narrowest type that holds them."""
        return Term(narrow(codes), self.scale, self.steps, self.rows, None, RESOLUTION, RESOLUTION)


def grid_scales(metric: Metric, step: float) -> Scales:
    """Return the scales ``c / (L_jj g_i)`` of the noise step c, on the logarithmic grid of the file."""
    g = metric.row_weights()
    ell = torch.ones(1, dtype=torch.float64) if metric.H is None else metric.cholesky().diagonal()
    centre_g, centre_l = float(torch.log2(g).mean()), float(torch.log2(ell).mean())
    scale = round(FINE * (math.log2(step) - centre_g - centre_l))
    rows = nearest_log_scale(2.0**centre_g / g, RESOLUTION)
    steps = nearest_log_scale(2.0**centre_l / ell, RESOLUTION)
    return Scales(scale, steps, rows)


def narrow(codes: Tensor) -> Tensor:
    """Return integers in the narrowest of int8, int16 and int32 that holds them."""
    low, high = torch.aminmax(codes) if codes.numel() else (torch.zeros(()), torch.zeros(()))
    largest = max(-float(low), float(high))
    if largest >= 2.0**31:
        raise ValueError(f"noise step too small: a code of {largest:.3g} does not fit 32 bits")
    return codes.to(torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32)


def solve_grid(weight: Tensor, metric: Metric, step: float, sparse: bool = False) -> Solution:
    """Round a weight on the grid of the noise step c; where the metric is uniform, with one step for all.

    Args:
        weight: float (m, n).
        metric: the distance.
        step: c, in the metric's units.
        sparse: round to the integers that are worth their bits instead. This is ``pgd`` from the identity, which its
            steps on the dictionary leave as it is: rounding errors have nothing in common with the codes.
    """
    scales = grid_scales(metric, step)
    prices = None
    if sparse:
        prices = _prices(weight, scales)
        finer = 1.0 - min(MOST_FINER, 0.5 * float(prices[0]))
        scales, prices = grid_scales(metric, finer * step), (prices / finer**2).clamp_max(1.0)
    codes = _round(weight, metric, scales, prices)
    term = scales.term(codes)
    return rounded(weight, metric, "pgd" if sparse else "grid", term)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // max(weight.shape[1], 1))
    for first in range(0, weight.shape[0], size):
        yield slice(first, first + size)


def _of_rows(values: Tensor, rows: slice) -> Tensor:
    return values if values.numel() == 1 else values[rows]


def _prices(weight: Tensor, scales: Scales) -> Tensor:
    """Return what integers cost, from some of the rows."""
    some = slice(None, None, math.ceil(weight.numel() / _SAMPLE))
    units = scales.step_values() * _of_rows(scales.row_values(), some)[:, None]
    return prices_of(weight[some].float() / units)


def _round(weight: Tensor, metric: Metric, scales: Scales, prices: Tensor | None) -> Tensor:
    """Return the codes, rounded to the nearest or at their prices, some rows at a time."""
    rounder = None if prices is None else lambda targets, column: round_at_price(targets, prices)
    steps, rows = scales.step_values(), scales.row_values()
    lower = None if metric.H is None else metric.cholesky()

    def block(some: slice) -> Tensor:
        if prices is not None and lower is None:
            return narrow(round_at_price(weight[some].float() / (steps * _of_rows(rows, some)[:, None]), prices))
        return narrow(round_in_metric(weight[some], steps, _of_rows(rows, some), lower, rounder))

    return torch.cat(side_by_side(block, list(_row_blocks(weight))))


def rounded(weight: Tensor, metric: Metric, structure: str, term: Term) -> Solution:
    """Return the solution that consists of one term of rounded codes."""
    factors = Factors((weight.shape[0], weight.shape[1]), structure, (term,))
    distortion = metric.distance(weight, factors)
    return Solution(factors, distortion, term_bits(term), trace=(distortion,), start="identity")
