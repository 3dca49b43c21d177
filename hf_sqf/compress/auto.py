"""``auto``: the structure of least ``distortion + lambda bits``.

Rounding entry by entry costs little to try. What costs more is tried where the spectrum of the weight says that it
may pay (:mod:`.prediction`), and vector quantization where it does on a few rows. On a large weight all is tried on a
sample of its rows, and the winner alone solves the whole.
"""

from __future__ import annotations

from functools import partial

from ..runtime.sqf_memory import trim
from .prediction import atoms_before_grid
from .solution import Problem, Solution
from .structures import (
    CLOSE,
    LARGEST_SPECTRUM,
    Solver,
    blocks_that_may_pay,
    blocks_to_ask,
    dependent_grid,
    has_spectrum,
    nearest_grid,
    solve_sum,
    sparse_grid,
    vq,
    vq_widths,
)
from .two_factor import Blocks, solve_two_factor

ALIKE = ("pgd", "svd", "sparse_pca")
"""Structures from the same start, which differ little: too little for a sample to tell, which takes the first."""
SAMPLE = 1 << 20
"""Entries of a weight that the structures are compared on, or more where rows are long:"""
ROWS_TO_COLUMNS = 4
"""Rows of a sample, at least, for each column: the spectrum of fewer looks steeper than that of all rows."""
LEAST_SAVING = 0.002
"""Predicted saving of taking away a few atoms, relative to all costs, for which ``svd+grid`` is tried."""
VQ_SAMPLE = 1 << 13
"""Entries that vector quantization is tried on."""


def solve_auto(problem: Problem) -> Solution:
    """Solve with the structure that costs least."""
    columns = min(problem.weight.shape[1], LARGEST_SPECTRUM)  # wider ones are not asked for their spectrum
    few = problem.sample(max(SAMPLE, ROWS_TO_COLUMNS * columns * columns))
    found, solver = _contest(few)
    if few is problem:
        return found
    del found
    trim()
    return solver(problem)


def _contest(problem: Problem) -> tuple[Solution, Solver]:
    """Return the solution of least cost, and the solver that finds it."""
    rounders = [nearest_grid, sparse_grid, *([dependent_grid] if problem.trellis else [])]
    found = [(rounder(problem), rounder) for rounder in rounders]
    rounded = problem.least(solution for solution, _ in found)
    scalar = problem.least(solution for solution, _ in found[:2])  # predictions are for scalar codes
    cuts = blocks_to_ask(problem)
    for blocks in blocks_that_may_pay(cuts, scalar):
        names = ALIKE if problem.stands_for == 1.0 else ALIKE[:1]
        found += [(solve_two_factor(blocks, name), partial(_two_factor, blocks.width, name)) for name in names]
    best = problem.least(solution for solution, _ in found)
    whole = next((b for b in cuts if b.count == 1), None) or Blocks(problem)
    if sum_may_pay(whole, rounded, best):
        found.append((solve_sum(problem, "svd", "grid", whole), _low_rank_and_grid))
    if vq_may_pay(problem):
        found.append((vq(problem), vq))
    best = problem.least(solution for solution, _ in found)
    return next((solution, solver) for solution, solver in found if solution is best)


def _two_factor(width: int, structure: str, problem: Problem) -> Solution:
    return solve_two_factor(Blocks(problem, width), structure)


def _low_rank_and_grid(problem: Problem) -> Solution:
    return solve_sum(problem, "svd", "grid")


def sum_may_pay(whole: Blocks, rounded: Solution, best: Solution) -> bool:
    """Whether atoms taken away before rounding save something, and enough to come near to the best so far."""
    if not has_spectrum(whole):
        return False
    problem = whole.problem
    saving = problem.step**2 * atoms_before_grid(whole.principal[1], whole.population, whole.width)[1]
    cost = problem.stands_for * problem.cost(rounded)
    return saving > LEAST_SAVING * cost and cost - saving < CLOSE * problem.stands_for * problem.cost(best)


def vq_may_pay(problem: Problem) -> bool:
    """Try vector quantization on a few rows against rounding them.

    The widest blocks are taken whose codebook is still small for so few rows, lest it learn them by heart.
    """
    few = problem.sample(VQ_SAMPLE)
    return few.better(solve_two_factor(Blocks(few, vq_widths(few, few.weight.numel())[-1]), "vq"), sparse_grid(few))
