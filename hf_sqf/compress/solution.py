"""What every solver returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ..runtime.sqf_factors import Factors


class Status(Enum):
    """How a solver ended."""

    CONVERGED = "converged"
    """No step that it knows lowers the objective by more than the tolerance."""
    DIRECT = "direct"
    """The solution came in one pass, without iterations."""
    ITERATION_LIMIT = "iteration limit"
    """It was still descending when its iterations were used up."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A weight's factors and how they came about.

    Attributes:
        factors: the factors.
        distortion: ``d(W, factors.dense())`` in the metric it was solved in.
        bits: what the factors cost in all, in bits (the entropy coder's ideal length with side information).
        status: how the solver ended.
        trace: the objective after each accepted iterate, never rising.
        iterations: how many iterations were run.
        start: what the solver started from, e.g. ``"identity"``.
    """

    factors: Factors
    distortion: float
    bits: float
    status: Status = Status.DIRECT
    trace: tuple[float, ...] = ()
    iterations: int = 0
    start: str = ""

    def cost(self, step: float) -> float:
        """Return the Lagrangian ``distortion + slope(step) * bits``, by which solutions compare."""
        return self.distortion + slope(step) * self.bits


def slope(step: float) -> float:
    """Return lambda: what a bit is worth, in distortion, where the noise step is ``step`` (metric units).

    An entry rounded with a small step c has distortion ``D = c^2 / 12`` and rate ``R = h - log2 c``, thus
    ``-dD/dR = 2 ln 2 c^2 / 12``.
    """
    return 2.0 * math.log(2.0) * step * step / 12.0
