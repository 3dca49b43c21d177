"""``auto``: the structure of least ``distortion + lambda bits``.

Rounding entry by entry costs little to try. What costs more is tried where the spectrum of the weight says that it
may pay (:mod:`.prediction`), and vector quantization where it does on a few rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .metric import Metric
from .prediction import atoms_before_grid
from .rate import atom_bits
from .solution import Problem, Solution, slope
from .structures import CLOSE, blocks_that_may_pay, grid, solve_sum, sparse_grid, vq, vq_widths
from .two_factor import Blocks, solve_two_factor

ALIKE = ("pgd", "svd", "sparse_pca")
"""Structures from the same start, which differ little: all are tried on weights of few entries, else the first."""
SMALL = 1 << 20
LEAST_SAVING = 0.002
"""Predicted saving of taking away a few atoms, relative to all costs, for which ``svd+grid`` is tried."""

VQ_SAMPLE = 1 << 13
"""Entries that vector quantization is tried on."""


def solve_auto(problem: Problem) -> Solution:
    """Solve with the structure that costs least."""
    best = problem.least([grid(problem), sparse_grid(problem)])
    tried = [best]
    small = problem.weight.numel() <= SMALL
    for blocks in blocks_that_may_pay(problem, best):
        tried += [solve_two_factor(blocks, structure) for structure in (ALIKE if small else ALIKE[:1])]
    whole = Blocks(problem)
    saving = atoms_before_grid(whole.principal[1], whole.rows, whole.width)[1] * problem.step**2
    reached, so_far = best.cost(problem.step), problem.least(tried).cost(problem.step)
    if saving > LEAST_SAVING * reached and reached - saving < CLOSE * so_far:
        tried.append(solve_sum(problem, "svd", "grid"))
    if vq_may_pay(problem):
        tried.append(vq(problem))
    return problem.least(tried)


def vq_may_pay(problem: Problem) -> bool:
    """Try vector quantization on a few rows against rounding them.

    The widest blocks are taken whose codebook is still small for so few rows, lest it learn them by heart.
    """
    rows = slice(None, None, math.ceil(problem.weight.numel() / VQ_SAMPLE))
    g = problem.metric.g
    metric = Metric(problem.metric.H, g if g is None or g.numel() == 1 else g[rows])
    few = replace(problem, weight=problem.weight[rows], metric=metric)
    found = solve_two_factor(Blocks(few, vq_widths(few)[-1]), "vq")
    shared = (1.0 - few.weight.numel() / problem.weight.numel()) * atom_bits(found.factors.terms[0])
    return found.cost(few.step) - slope(few.step) * shared < sparse_grid(few).cost(few.step)
