"""``auto``: the structure of least ``distortion + lambda bits``.

Rounding entry by entry costs little to try. What costs more is tried where the spectrum of the weight says that it
may pay (:mod:`.prediction`), and vector quantization where it does on a few rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .prediction import atoms_before_grid
from .rate import atom_bits
from .solution import Problem, Solution, slope
from .structures import (
    CLOSE,
    blocks_that_may_pay,
    blocks_to_ask,
    grid,
    has_spectrum,
    solve_sum,
    sparse_grid,
    vq,
    vq_widths,
)
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
    rounded = best = problem.least([grid(problem), sparse_grid(problem)])
    small = problem.weight.numel() <= SMALL
    cuts = blocks_to_ask(problem)
    for blocks in blocks_that_may_pay(cuts, rounded):
        for structure in ALIKE if small else ALIKE[:1]:
            best = problem.least([best, solve_two_factor(blocks, structure)])
    whole = next((b for b in cuts if b.count == 1), None) or Blocks(problem)
    if sum_may_pay(whole, rounded, best):
        best = problem.least([best, solve_sum(problem, "svd", "grid", whole)])
    if vq_may_pay(problem):
        best = problem.least([best, vq(problem)])
    return best


def sum_may_pay(whole: Blocks, rounded: Solution, best: Solution) -> bool:
    """Whether atoms taken away before rounding save something, and enough to come near to the best so far."""
    if not has_spectrum(whole):
        return False
    step = whole.problem.step
    saving = step**2 * atoms_before_grid(whole.principal[1], whole.rows, whole.width)[1]
    cost = rounded.cost(step)
    return saving > LEAST_SAVING * cost and cost - saving < CLOSE * best.cost(step)


def vq_may_pay(problem: Problem) -> bool:
    """Try vector quantization on a few rows against rounding them.

    The widest blocks are taken whose codebook is still small for so few rows, lest it learn them by heart.
    """
    rows = slice(None, None, math.ceil(problem.weight.numel() / VQ_SAMPLE))
    few = replace(problem, weight=problem.weight[rows], metric=problem.metric.of_rows(rows))
    found = solve_two_factor(Blocks(few, vq_widths(few)[-1]), "vq")
    shared = (1.0 - few.weight.numel() / problem.weight.numel()) * atom_bits(found.factors.terms[0])
    return found.cost(few.step) - slope(few.step) * shared < sparse_grid(few).cost(few.step)
