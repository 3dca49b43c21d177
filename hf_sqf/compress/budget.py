"""The budget: one noise step c for many weights, whose files meet a number of bits.

Every metric measures a weight on the same scale (relative to its own energy without data, in nats with), so equal c
means equal worth of a bit everywhere, and the least total error at a given size (reverse water-filling). Rates are
estimated on a few rows of each weight, since rows are independent in the rounding. The weights are then solved in
rounds, the largest first; what the codec really needed corrects the step for the rounds still to come, and a last few
weights are solved again until the total lies within :data:`TOLERANCE` below the target. The weights of a round do not
depend on one another: several processes may share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metric import Metric

TOLERANCE = 0.005
"""How far below the bits asked for the result may lie, relative."""
AIM = 1.0 - 0.3 * TOLERANCE
"""Where in that range to aim."""
SAMPLE, SHARE = 1 << 14, 256
"""Entries of a weight that its rate is estimated on: so many, or at least one in so many."""
CLASS = 1 << 10
"""Least entries in a class of rows and columns of like magnitude."""
OCTAVES = (-16.0, 6.0)
"""Range of log2 c, in units of the weights' root mean square in the metric."""
SAVED = (0.1, 0.2)
"""What a trellis saves: a share of the entropy, and the most in bits per entry (on the weights of MiniLM)."""
ROUND = 16
"""Most weights of a round."""
_TRIALS = 12


class RateCurve:
    """Estimates what a weight costs at a noise step c, from the entropy of some of its rows when they are rounded.

    Entropies are found as they are needed, at quarters of an octave of c, and interpolated.

    Args:
        matrices: of one weight, (m, n) each; all of them are sampled evenly, down their rows.
        metrics: of each.
        overhead: bits of side information.
        trellis: rounding goes along a trellis, which saves about :data:`SAVED` of the entropy.
    """

    def __init__(
        self, matrices: Sequence[Tensor], metrics: Sequence[Metric], overhead: float, trellis: bool = False
    ) -> None:
        self._saved = SAVED if trellis else (0.0, 0.0)
        self.count = sum(w.numel() for w in matrices)
        self.overhead = overhead
        share = min(1.0, max(SAMPLE / max(self.count, 1), 1.0 / SHARE))
        parts = []
        for weight, metric in zip(matrices, metrics, strict=True):
            g = metric.row_weights()
            rows = torch.linspace(0, len(weight) - 1, max(1, math.ceil(share * len(weight)))).round().long()
            if g.numel() > 1:  # evenly among rows that count much and little
                rows = torch.sort(torch.argsort(g, stable=True)[rows])[0]
            part = weight[rows].double() * (g if g.numel() == 1 else g[rows])[:, None]
            if metric.H is not None:
                part = part * metric.cholesky().diagonal()
            parts.extend(_classes(part.float().numpy()))
        self._sample = parts  # in units of the noise step 1: entries times L_jj g_i
        self._known: dict[int, float] = {}

    def at(self, quarter: int) -> float:
        """Return the bits of the whole weight at ``c = 2^(quarter/4)``."""
        if quarter not in self._known:
            entropy = self._entropy(2.0 ** (quarter / 4.0))
            share, most = self._saved
            self._known[quarter] = (entropy - min(share * entropy, most)) * self.count + self.overhead
        return self._known[quarter]

    def _entropy(self, step: float) -> float:
        """Return the mean entropy of an entry, in bits."""
        return sum(part.size * _entropy(part, step) for part in self._sample) / sum(part.size for part in self._sample)


def _entropy(sample: NDArray[np.float32], step: float) -> float:
    """Return the entropy of entries rounded to multiples of ``step``, in bits."""
    if float(np.ptp(sample)) / step < 1 << 20:
        codes = np.rint(sample / step).astype(np.int64)
        counts = np.bincount(codes - codes.min())
        p = counts[counts > 0] / codes.size
        if len(p) <= max(codes.size // 8, 1):
            return float(-(p * np.log2(p)).sum())
    # Steps too fine for a histogram of so few entries; there, entropy grows by a bit an octave.
    return _entropy(sample, 2.0 * step) + 1.0


def _classes(sample: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Sort entries (k, n) by their rows' and columns' magnitudes in half octaves, as the codec tells them apart too.

    Classes of less than :data:`CLASS` entries join the next: too few would look as if they had less entropy.
    """
    power = np.square(sample, dtype=np.float64)
    mean = power.mean() or 1.0
    scale = np.maximum(power.mean(1, keepdims=True) * power.mean(0) / mean**2, 2.0**-32)
    klass = np.rint(np.log2(scale)).astype(np.int64)  # of squares: half octaves of magnitudes
    parts: list[NDArray[np.float32]] = []
    pending: list[NDArray[np.float32]] = []
    for k in np.unique(klass)[::-1]:
        pending.append(sample[klass == k])
        if sum(part.size for part in pending) >= CLASS:
            parts.append(np.concatenate(pending))
            pending = []
    if pending:
        parts.append(np.concatenate(pending))
    return parts


class RateSum:
    """The sum of rate curves, from which some may be taken away."""

    def __init__(self, curves: Sequence[RateCurve]) -> None:
        self._curves = dict.fromkeys(curves)
        self._known: dict[int, float] = {}

    def remove(self, curve: RateCurve) -> None:
        """Take a curve away."""
        del self._curves[curve]
        for quarter in self._known:
            self._known[quarter] -= curve.at(quarter)

    def at(self, quarter: int) -> float:
        """Return the sum at ``c = 2^(quarter/4)``."""
        if quarter not in self._known:
            self._known[quarter] = sum(curve.at(quarter) for curve in self._curves)
        return self._known[quarter]

    def step_for(self, bits: float) -> float:
        """Return log2 of the noise step at which the sum is ``bits``.

        Bits fall as c grows; where the range of c ends before the bits do, its end is returned.
        """
        low, high = (round(4 * octave) for octave in OCTAVES)
        if self.at(high) >= bits:
            return high / 4.0
        if self.at(low) <= bits:
            return low / 4.0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) > bits else (low, middle)
        return (low + (self.at(low) - bits) / (self.at(low) - self.at(high))) / 4.0


def interpolate(curve: RateCurve | RateSum, log_step: float) -> float:
    """Return a curve's bits at log2 c, which may lie between quarters."""
    quarter = math.floor(4.0 * log_step)
    part = 4.0 * log_step - quarter
    return curve.at(quarter) if part == 0.0 else (1.0 - part) * curve.at(quarter) + part * curve.at(quarter + 1)


def smallest(curves: Sequence[RateCurve]) -> float:
    """Return the least bits that weights can cost."""
    return RateSum(curves).at(round(4 * OCTAVES[1]))


SolveRound = Callable[[list[tuple[int, float]]], Sequence[int]]
"""(index of a weight, noise step) of each weight of a round -> true bits of each result, which is kept in place of an
earlier one of the same weight."""


def rounds(counts: Sequence[int]) -> list[list[int]]:
    """Cut weights of so many entries each into rounds, the largest first; return their indices.

    A round takes up to :data:`ROUND` weights and half of the entries that are left, so that there is always something
    left for the next to correct, and little in the last ones.
    """
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    left, cut = sum(counts), []
    while order:
        taken = 1
        while taken < min(ROUND, len(order)) and 2 * sum(counts[i] for i in order[: taken + 1]) <= left:
            taken += 1
        cut.append(order[:taken])
        left -= sum(counts[i] for i in order[:taken])
        del order[:taken]
    return cut


class Budget:
    """A number of bits that weights share, and how much of it those solved so far have cost.

    Args:
        curves: one per weight.
        bits: the target, for all together.
    """

    def __init__(self, curves: Sequence[RateCurve], bits: float) -> None:
        self._curves, self._bits = curves, bits
        self._rest = RateSum(curves)
        self._estimated = 0.0
        self._sizes: dict[int, float] = {}  # in the order in which they were solved
        self._steps: dict[int, float] = {}  # log2 c

    def solve(self, indices: Sequence[int], solve: SolveRound) -> None:
        """Solve some weights, at the step at which those that are left cost what is left."""
        spent = sum(self._sizes.values())
        ratio = spent / self._estimated if self._estimated else 1.0
        log_step = self._rest.step_for((AIM * self._bits - spent) / ratio)
        if self._steps:  # a small rest must not pay for all that came before
            middle = next(iter(self._steps.values()))
            log_step = min(max(log_step, middle - 0.5), middle + 0.5)
        self._steps |= dict.fromkeys(indices, log_step)
        self._solve(indices, 0.0, solve)
        for index in indices:
            self._estimated += interpolate(self._curves[index], log_step)
            self._rest.remove(self._curves[index])

    def _solve(self, indices: Sequence[int], shift: float, solve: SolveRound) -> None:
        """Solve weights at their steps, shifted by so many octaves."""
        found = solve([(index, 2.0 ** (self._steps[index] + shift)) for index in indices])
        self._sizes |= dict(zip(indices, map(float, found), strict=True))

    def settle(self, solve: SolveRound) -> float:
        """Bring the total within tolerance, once all weights are solved; return it.

        The last ones are solved again at steps shifted in common, as many as make the shift a small one.

        Raises:
            ValueError: no noise step reaches the target.
        """
        sizes, bits = self._sizes, self._bits
        total = sum(sizes.values())
        if not self._good(total):
            gap = AIM * bits - total
            chosen: list[int] = []
            for index in reversed(sizes):
                chosen.append(index)
                if sum(sizes[i] for i in chosen) > 8.0 * abs(gap):
                    break
            total = self._shift(chosen, solve)
        if total > bits:
            raise ValueError(f"no noise step meets {bits:.0f} bits; the closest costs {total:.0f}")
        return total

    def _good(self, total: float) -> bool:
        return (1.0 - TOLERANCE) * self._bits <= total <= self._bits

    def _shift(self, chosen: list[int], solve: SolveRound) -> float:
        """Solve some weights again until the total is within tolerance, or as near as it gets; return the total."""
        aim, shift = AIM * self._bits, 0.0
        totals = {0.0: sum(self._sizes.values())}  # shift in octaves -> total
        for _ in range(_TRIALS):
            below = min((s for s, total in totals.items() if total <= self._bits), default=math.inf)
            above = max((s for s, total in totals.items() if total > self._bits and s < below), default=None)
            if above is not None and below < math.inf:
                share = (totals[above] - aim) / max(totals[above] - totals[below], 1.0)
                shift = above + min(max(share, 0.1), 0.9) * (below - above)
            else:
                shift += (totals[shift] - aim) / sum(self._curves[i].count for i in chosen) * 1.5
            self._solve(chosen, shift, solve)
            totals[shift] = sum(self._sizes.values())
            if self._good(totals[shift]):
                return totals[shift]
        best = max((s for s in totals if totals[s] <= self._bits), key=lambda s: totals[s], default=max(totals))
        if best != shift:
            self._solve(chosen, best, solve)
        return totals[best]
