"""What every solver is given and returns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from ..runtime.sqf_factors import Factors
from .metric import Metric
from .rate import atom_bits


class Status(Enum):
    """How a solver ended."""

    CONVERGED = "converged"
    """No step that it knows lowers the objective by more than the tolerance."""
    DIRECT = "direct"
    """The solution came in one pass, without iterations."""
    ITERATION_LIMIT = "iteration limit"
    """It was still descending when its iterations were used up."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a solver is given.

    Attributes:
        weight: float (m, n), finite.
        metric: the distance.
        step: c, the noise step in the metric's units: it fixes what a bit is worth.
        width: d of the blocks; None lets the structure choose.
        seed: of starts that draw at random.
        trellis: states of dependent quantization, which ``grid`` may use; 0 for scalar rounding alone.
        stands_for: rows of a taller weight that each row stands for, where these are a sample of it.
    """

    weight: Tensor
    metric: Metric
    step: float
    width: int | None = None
    seed: int = 0
    trellis: int = 0
    stands_for: float = 1.0

    def sample(self, entries: int) -> Problem:
        """Return the problem of evenly spaced rows, with about so many entries; itself if it has no more."""
        stride = math.ceil(self.weight.numel() / entries)
        if stride <= 1:
            return self
        few, rows = self.weight[::stride], slice(None, None, stride)
        stands_for = self.stands_for * len(self.weight) / len(few)
        return replace(self, weight=few, metric=self.metric.of_rows(rows), stands_for=stands_for)

    def cost(self, solution: Solution) -> float:
        """Return ``distortion + lambda bits`` of a solution, its share of the bits where other rows use them too."""
        shared = 0.0
        if self.stands_for > 1.0:
            shared = (1.0 - 1.0 / self.stands_for) * sum(atom_bits(term) for term in solution.factors.terms)
        return solution.cost(self.step) - slope(self.step) * shared

    def better(self, solution: Solution, than: Solution) -> bool:
        """Whether a solution costs less than another, by more than rounding errors do."""
        return self.cost(solution) < self.cost(than) * (1.0 - 1e-9)

    def least(self, solutions: Iterable[Solution]) -> Solution:
        """Return the solution of least ``distortion + lambda bits``; the first where they differ by rounding only."""
        best: Solution | None = None
        for found in solutions:
            if best is None or self.better(found, best):
                best = found
        assert best is not None
        return best


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
