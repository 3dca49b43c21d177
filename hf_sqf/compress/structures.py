"""The structures by name, each with a solver that makes the choices it leaves open; and sums of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ..runtime.sqf_factors import Factors
from .dependent import solve_dependent
from .grid import solve_grid
from .prediction import atoms_before_grid, columns_cost, low_rank_cost
from .rate import factors_bits
from .solution import Problem, Solution
from .two_factor import Blocks, codebook_size, solve_two_factor

Solver = Callable[[Problem], Solution]

PGD_WIDTHS = (9, 16, 64)
"""Widths of blocks, beside whole rows, of which ``pgd`` asks the spectrum: 9 is a kernel of a 3 x 3 convolution."""
MARGIN = 0.96
"""What principal atoms may cost of their prediction, made for Gaussian entries: they are tried if that pays."""
LARGEST_SPECTRUM = 2048
"""Smaller side of a matrix beyond which its spectrum takes longer to find than all else, and is not asked for."""
CLOSE = 1.02
"""Predictions that differ by less than this are not taken to tell which is better."""
VQ_WIDTHS = (1, 2, 4, 8)
"""Widths of blocks among which ``vq`` chooses, where the codebook that its rate calls for is no larger than:"""
VQ_ATOMS = 1024
_VQ_SHARE = 0.1  # most of the bits that the codebook may take
FEW = 1 << 14
"""Entries of a weight that quick decisions are made on."""


def grid(problem: Problem) -> Solution:
    """Entry by entry, to the nearest; or along a trellis where that costs less."""
    return problem.least([dependent_grid(problem), nearest_grid(problem)]) if problem.trellis else nearest_grid(problem)


def nearest_grid(problem: Problem) -> Solution:
    """Entry by entry, to the nearest."""
    return solve_grid(problem.weight, problem.metric, problem.step)


def dependent_grid(problem: Problem) -> Solution:
    """Along a trellis."""
    return solve_dependent(problem.weight, problem.metric, problem.step, problem.trellis)


def sparse_grid(problem: Problem) -> Solution:
    """Entry by entry, with a dead zone: ``pgd`` from the identity."""
    return solve_grid(problem.weight, problem.metric, problem.step, sparse=True)


def svd(problem: Problem) -> Solution:
    """Dense codes over few atoms."""
    return solve_two_factor(Blocks(problem, problem.width), "svd")


def sparse_pca(problem: Problem) -> Solution:
    """Codes with the same number of nonzeros in each row."""
    return solve_two_factor(Blocks(problem, problem.width), "sparse_pca")


def pgd(problem: Problem) -> Solution:
    """Sparse codes, from the identity, and from the SVD of rows and of blocks where that may pay."""
    identity = sparse_grid(problem)
    cuts = blocks_that_may_pay(blocks_to_ask(problem), identity)
    return problem.least([identity, *(solve_two_factor(blocks, "pgd") for blocks in cuts)])


def vq(problem: Problem) -> Solution:
    """One-hot codes, with the width of blocks that costs least."""
    widths = [problem.width] if problem.width else vq_widths(problem, problem.weight.numel() * problem.stands_for)
    return problem.least(solve_two_factor(Blocks(problem, d), "vq") for d in widths)


SOLVERS: dict[str, Solver] = {"grid": grid, "svd": svd, "sparse_pca": sparse_pca, "vq": vq, "pgd": pgd}
"""The structures."""


def solve_sum(problem: Problem, first: str, second: str, blocks: Blocks | None = None) -> Solution:
    """Solve for a sum of two structures, such as ``svd+grid``: the second stands for what the first leaves.

    ``svd`` takes only atoms that pay although what they leave is stored, too; ``grid`` has a dead zone: low rank
    plus sparse. ``blocks`` is the problem cut into blocks, where that was done before.
    """
    head = low_rank(blocks or Blocks(problem, problem.width)) if first == "svd" else SOLVERS[first](problem)
    rest = replace(problem, weight=head.factors.dense().neg_().add_(problem.weight))
    tail = sparse_grid(rest) if second == "grid" and not problem.trellis else SOLVERS[second](rest)
    del rest  # as large as the weight
    used = tuple(t for t in (*head.factors.terms, *tail.factors.terms) if t.one_hot or t.nonzeros)
    factors = Factors(tail.factors.shape, f"{first}+{second}", used or tail.factors.terms)
    distortion = problem.metric.distance(problem.weight, factors)
    iterations = head.iterations + tail.iterations
    trace = (head.distortion, distortion)
    return Solution(factors, distortion, factors_bits(factors), tail.status, trace, iterations, head.start)


def low_rank(blocks: Blocks) -> Solution:
    """Solve for the atoms that pay although what they leave is stored, too."""
    return solve_two_factor(blocks, "svd", count=lambda *spectrum: atoms_before_grid(*spectrum)[0])


def blocks_to_ask(problem: Problem) -> list[Blocks]:
    """Return the cuts into blocks of which the spectrum is asked: the width given, or whole rows and some others."""
    n = problem.weight.shape[1]
    widths = [problem.width] if problem.width else [n, *(d for d in PGD_WIDTHS if d < n and n % d == 0)]
    return [blocks for blocks in (Blocks(problem, d) for d in widths) if has_spectrum(blocks)]


def blocks_that_may_pay(cuts: list[Blocks], identity: Solution) -> list[Blocks]:
    """Return those whose principal atoms may cost less than the solution from the identity.

    They must by prediction save something over the columns as they are, what they cost must come near to what the
    identity really took, and to the least that is predicted of any.
    """
    costs = {}
    for blocks in cuts:
        limit = blocks.problem.stands_for * identity.cost(blocks.problem.step) / blocks.problem.step**2
        cost = low_rank_cost(blocks.principal[1], blocks.population, blocks.width)
        if MARGIN * cost < limit and cost < columns_cost(blocks.power_of_columns, blocks.population):
            costs[blocks] = cost
    return [blocks for blocks, cost in costs.items() if cost < CLOSE * min(costs.values())]


def has_spectrum(blocks: Blocks) -> bool:
    """Whether the spectrum of the blocks may be asked for."""
    return min(blocks.rows, blocks.width) <= LARGEST_SPECTRUM


def vq_widths(problem: Problem, entries: float) -> list[int]:
    """Return the widths (two at most, the widest) whose codebooks, sized for the rate, suit so many entries."""
    weight, fit = problem.weight, []
    for d in (d for d in VQ_WIDTHS if d <= weight.shape[1]):
        few = Blocks(problem, d).part(slice(None, None, math.ceil(weight.numel() / FEW)))
        atoms = codebook_size(few)
        codes = math.log2(atoms) / d * entries
        if atoms <= VQ_ATOMS and 8.0 * atoms * d <= _VQ_SHARE * codes:
            fit.append(d)
    return fit[-2:] or [1]
