"""The dead zone: which small codes are not worth their bits.

Keeping an entry t (in noise steps) as +-1 rather than 0 lowers the distortion by ``2 |t| - 1`` and costs the
difference of their code lengths. At the slope ``lambda = 2 ln 2 / 12`` it pays where

    |t|  >  1/2 + (ln 2 / 12) log2(p_0 / p_1),

with p_1 the probability of +1 (or -1). The entries beyond are the k of ``Grid(1) @ TopK(k)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rounding import ColumnRounder
from .solution import slope

_SAMPLE = 1 << 18
_ROUNDS = 4


def dead_zone(targets: Tensor) -> float:
    """Return the magnitude (1/2 or more) beyond which an entry of ``targets``, in noise steps, is worth a code."""
    flat = targets.reshape(-1)
    size = flat[:: math.ceil(flat.numel() / _SAMPLE)].abs()
    below = float((size < 1.5).sum())
    threshold = 0.5
    for _ in range(_ROUNDS):  # probabilities and threshold depend on each other
        zeros = float((size < threshold).sum())
        ratio = (zeros + 1.0) / (0.5 * (below - zeros) + 1.0)
        threshold = min(max(0.5 + 0.5 * slope(1.0) * math.log2(ratio), 0.5), 1.49)
    return threshold


def count_significant(targets: Tensor) -> int:
    """Return k, how many entries of ``targets`` lie beyond the dead zone."""
    return int(torch.count_nonzero(targets.abs() > dead_zone(targets)))


def outside(threshold: float) -> ColumnRounder:
    """Return what rounds targets beyond the threshold to the nearest integers, and all others to 0."""
    return lambda targets, column: torch.where(targets.abs() > threshold, targets.round(), 0.0)
