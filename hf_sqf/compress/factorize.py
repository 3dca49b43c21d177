"""``solve`` and ``factorize``: one weight to factors, at a noise step or at a number of bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.sqf_container import pack
from ..runtime.sqf_factors import FINE
from .auto import solve_auto
from .metric import Metric
from .solution import Problem, Solution
from .structures import SOLVERS, solve_sum

TOLERANCE = 0.01
"""How far below the bits asked for the bits in the file may fall, relative."""
_TRIALS = 24


def solve(
    weight: Tensor,
    metric: Metric | None = None,
    step: float = 0.25,
    structure: str = "auto",
    block: int | None = None,
    seed: int = 0,
    name: str = "weight",
    trellis: int = 0,
) -> Solution:
    """Find the factors of a weight that minimise ``distortion + slope(step) * bits``.

    Args:
        weight: float (m, n).
        metric: the distance; without one, :meth:`Metric.relative`.
        step: c, the noise step in the metric's units. It fixes what a bit is worth, and so the rate.
        structure: ``"auto"``, one of :data:`SOLVERS`, or a sum of two such as ``"svd+grid"``.
        block: d, the width of blocks; None lets the structure choose.
        seed: of the starts that draw at random.
        name: of the tensor, for messages.
        trellis: states of dependent quantization, one of
            :data:`~hf_sqf.runtime.sqf_trellis.TRELLIS_STATES`; 0 for scalar rounding alone.

    Raises:
        ValueError: the weight is not a matrix, is empty or not finite, or an option is out of range.
    """
    check(weight, name)
    check_structure(structure)
    if not step > 0.0 or (block is not None and block < 1):
        raise ValueError(f"{name}: step and block must be positive, got {step} and {block}")
    metric = metric or Metric.relative(weight)
    problem = Problem(weight, metric, step, block, seed, trellis)
    if structure == "auto":
        return solve_auto(problem)
    if structure in SOLVERS:
        return SOLVERS[structure](problem)
    first, _, second = structure.partition("+")
    return solve_sum(problem, first, second)


def check(weight: Tensor, name: str) -> None:
    """Raise ValueError unless the weight is a finite, non-empty matrix of floats."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty matrix of floats, got {weight.dtype} {tuple(weight.shape)}")
    low, high = torch.aminmax(weight)  # both carry NaN, and neither needs a second copy
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: weight has NaN or infinite entries")


def check_structure(structure: str) -> None:
    """Raise ValueError unless the structure is ``"auto"``, one of :data:`SOLVERS`, or a sum of two of them."""
    parts = structure.split("+")
    if structure != "auto" and not (len(parts) <= 2 and set(parts) <= set(SOLVERS)):
        raise ValueError(f"structure must be auto, one of {', '.join(SOLVERS)}, or a sum of two; got {structure!r}")


def factorize(
    weight: Tensor,
    structure: str = "auto",
    bits: float = 4.0,
    metric: Metric | None = None,
    block: int | None = None,
    seed: int = 0,
    name: str = "weight",
    trellis: int = 0,
) -> Solution:
    """Factorize one weight to ``bits`` bits per parameter, everything counted.

    Args:
        weight: float (m, n).
        structure: see :func:`solve`; ``"auto"`` takes the one of least error.
        bits: the bits of the packed bytes per parameter, met from below within :data:`TOLERANCE` where
            the weight is large enough; in (0, 16].
        metric, block, seed, name, trellis: see :func:`solve`.

    Returns:
        The solution; its ``bits`` are those of the packed bytes.

    Raises:
        ValueError: bad input, or bits that no noise step reaches.
    """
    if not 0.0 < bits <= 16.0:
        raise ValueError(f"bits must lie in (0, 16], got {bits}")
    check(weight, name)
    check_structure(structure)
    metric = metric or Metric.relative(weight)

    def trial(log_step: float) -> tuple[Solution, float]:
        found = solve(weight, metric, 2.0**log_step, structure, block, seed, name, trellis)
        return found, 8.0 * pack([found.factors]).numel()

    rms = math.sqrt(metric.distance(weight, None) / weight.numel())
    start = math.log2(rms or 1.0) + 2.05 - bits  # a Gaussian's differential entropy less its rate
    best, size = _largest_below(trial, bits * weight.numel(), start)
    return replace(best, bits=size)


def _largest_below(
    trial: Callable[[float], tuple[Solution, float]], budget: float, log_step: float
) -> tuple[Solution, float]:
    """Return the costliest solution that ``budget`` bits pay for, and its bits.

    Bits fall as the step grows, by about one per weight and octave; a secant in log2 c, kept within what is
    already bracketed, finds the budget in a few trials.
    """
    best: tuple[Solution, float] | None = None
    low: tuple[float, float] | None = None  # (log2 c, bits) above the budget
    high: tuple[float, float] | None = None  # below
    for _ in range(_TRIALS):
        found, size = trial(log_step)
        if size <= budget:
            high = (log_step, size)
            if best is None or size > best[1] or found.distortion < best[0].distortion:
                best = found, size
            if size >= (1.0 - TOLERANCE) * budget or found.distortion == 0.0:
                break
        else:
            low = (log_step, size)
        aim = (1.0 - 0.4 * TOLERANCE) * budget
        if low and high:
            share = (low[1] - aim) / (low[1] - high[1])
            log_step = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
            if high[0] - low[0] < 1.0 / FINE:
                break
        else:
            count = found.factors.shape[0] * found.factors.shape[1]
            log_step += max(-4.0, min(4.0, (size - aim) / count)) or 0.01
    if best is None:
        assert low is not None
        raise ValueError(f"bits too few: the smallest reachable size of this weight is {low[1] / 8:.0f} bytes")
    return best
