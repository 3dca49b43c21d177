"""Codes times a dictionary: ``svd``, ``sparse_pca``, ``vq`` and ``pgd`` are one solver with other constraint sets.

    minimise  tr(G (W - Z D) H (W - Z D)^T)   over  Z in the structure's set,  D on a grid

Everything is computed in units of the noise step: with ``X = diag(g) W / c``, codes are plain integers and a bit is
worth ``slope(1)``. Atoms have norm 1 in the metric H, so that the noise of a code does not depend on its atom;
by the same rule (``step = c / L``) an atom that is used with power ``|z_k|^2`` is rounded with step ``1 / |z_k|``.
Steps of atoms are powers of two, hence products of integers exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..runtime.sqf_codec import chunk_rows, ideal_bits
from ..runtime.sqf_factors import FINE, Factors, Term, log_scale, nearest_log_scale
from ..runtime.sqf_memory import trim
from .dependent import FINE_STEP, chunk_along_trellis
from .gradient import Descent, Inner, gradient_step, gram, least_squares_codes, nearest_atom, projected_gradient, weigh
from .grid import RESOLUTION, grid_scales, narrow
from .metric import Metric
from .prediction import atoms_that_pay
from .prices import prices_of, round_at_price
from .projections import Everything, Grid, OneHot, PricedGrid, Projection, RowSparse, TopK
from .rate import factors_bits
from .rounding import interference
from .solution import Problem, Solution
from .starts import kmeans_plus_plus, principal_of_moments, principal_of_rows

SAMPLE = 1 << 20
"""Entries of a large weight that a dictionary is learned on (more where the dictionary is wide)."""
_CHUNK = 1 << 19  # entries that are encoded at a time
_DRAWS = 1 << 15  # blocks that k-means draws its start from
ITERATIONS = 6
"""Most iterations on the grid: from least-squares codes, the first few do nearly all."""
LLOYD = 20
"""Most iterations of k-means."""
TOLERANCE = 1e-4
"""Least relative fall of the objective for which a descent goes on."""
LARGEST_CODEBOOK = 4096


class Blocks:
    """A weight in units of the noise step, cut into blocks: the matrix X (m', d) of which it gives parts.

    Args:
        problem: the weight (m, n), the metric and the noise step.
        width: d, at most n; None for n.
    """

    def __init__(self, problem: Problem, width: int | None = None) -> None:
        self.problem = problem
        self.weight, metric = problem.weight, problem.metric
        self.width = min(width or self.weight.shape[1], self.weight.shape[1])
        self.count = math.ceil(self.weight.shape[1] / self.width)
        self.rows = self.weight.shape[0] * self.count
        self.population = self.rows * problem.stands_for  # blocks of all rows that will share the dictionary
        self.scales = grid_scales(Metric(g=metric.g), problem.step)
        self.seen = metric.of_blocks(self.width, self.count)
        self.H = None if self.seen.H is None else self.seen.H.double()
        self._unit = (self.scales.step_values().double() * self.scales.row_values().double())[:, None]

    def part(self, rows: slice) -> Tensor:
        """Return the blocks of the weight's rows, float64 (rows * count, d), the last ones padded with zeros."""
        x = self.weight[rows].double() / (self._unit if len(self._unit) == 1 else self._unit[rows])
        x = torch.nn.functional.pad(x, (0, self.count * self.width - x.shape[1]))
        return x.reshape(-1, self.width)

    def chunks(self) -> Iterator[Tensor]:
        """Yield all blocks in order."""
        rows = max(1, _CHUNK // self.weight.shape[1])
        for at in range(0, self.weight.shape[0], rows):
            yield self.part(slice(at, at + rows))

    def sample(self) -> Tensor:
        """Return the blocks of evenly spaced rows: all of them unless the weight is large."""
        entries = max(SAMPLE, 4 * self.width * self.width)
        return self.part(slice(None, None, math.ceil(self.weight.numel() / entries)))

    @cached_property
    def moments(self) -> Tensor:
        """``X^T X``, (d, d)."""
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        for x in self.chunks():
            total += x.T @ x
        return total

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor]:
        """The right singular vectors (r, d) in the metric, as atoms, and s^2 (r,); see :mod:`.starts`."""
        if self.rows < self.width:
            atoms, power = principal_of_rows(self.part(slice(None)), self.H)
        else:
            atoms, power = principal_of_moments(self.moments, None if self.H is None else self.seen.cholesky())
        return atoms, power * self.problem.stands_for

    @cached_property
    def power_of_columns(self) -> Tensor:
        """The squared norms of X's columns in the metric, (d,)."""
        power = torch.zeros(self.width, dtype=torch.float64)
        for x in self.chunks():
            power += x.square().sum(0)
        power *= self.problem.stands_for
        return power if self.H is None else power * self.seen.cholesky().diagonal().square()


CountAtoms = Callable[[Tensor, float, int], int]
"""(s^2 of all atoms, rows of the codes, width of the atoms) -> how many of the atoms to take."""
Start = Callable[[Blocks, Tensor, CountAtoms], "tuple[Tensor, Tensor]"]
"""(the blocks, a sample X of them, count) -> codes (m, K) or (m,) of the sample, and atoms (K, d)."""


def svd_start(blocks: Blocks, x: Tensor, count: CountAtoms) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors, ``count`` of them."""
    atoms, power = blocks.principal
    atoms = atoms[: count(power, blocks.population, blocks.width)]
    return weigh(x, blocks.H) @ atoms.T, atoms


def kmeans_start(blocks: Blocks, x: Tensor, count: CountAtoms) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from rows drawn by k-means++: ``2^(d R)``, where R is the rate of rounding entry by entry."""
    few = x[:: math.ceil(len(x) / _DRAWS)]
    lower = None if blocks.H is None else blocks.seen.cholesky()
    atoms = kmeans_plus_plus(few, min(codebook_size(few), len(few)), blocks.problem.seed, lower)
    codes = nearest_atom(x, x, atoms, OneHot(), blocks.H)
    lloyd = projected_gradient(x, codes, atoms, OneHot(), Everything(), blocks.H, nearest_atom, LLOYD, TOLERANCE)
    return lloyd.codes, lloyd.dictionary


def codebook_size(x: Tensor) -> int:
    """Return how many atoms spend as many bits on the rows of x (m, d) as rounding their entries would."""
    rate = ideal_bits(torch.round(x).to(torch.int32).numpy()) / x.numel()
    return max(2, min(LARGEST_CODEBOOK, round(2.0 ** min(x.shape[1] * rate, 60.0))))


@dataclass(frozen=True)
class Structure:
    """What tells one structure from another.

    Attributes:
        start: where the descent starts.
        codes: the set that holds the codes, given those of the start (over atoms of norm 1, in noise steps).
        inner: the step on the codes.
        free: any integers are codes, paths of a trellis too.
    """

    start: Start
    codes: Callable[[Tensor], Projection]
    inner: Inner = gradient_step
    free: bool = False


def k_per_row(codes: Tensor) -> Projection:
    """The set of ``sparse_pca``: integers, as many of each row as are worth their bits on average."""
    k = torch.count_nonzero(round_at_price(codes, prices_of(codes))) / len(codes)
    return Grid(1.0) @ RowSparse(max(1, round(float(k))))


def top_k(codes: Tensor) -> Projection:
    """The set of ``pgd``: the integers of the whole matrix that are worth their bits, at their price."""
    prices = prices_of(codes)
    return PricedGrid(prices) @ TopK(int(torch.count_nonzero(round_at_price(codes, prices))))


STRUCTURES = {
    "svd": Structure(svd_start, lambda codes: Grid(1.0), free=True),
    "sparse_pca": Structure(svd_start, k_per_row),
    "pgd": Structure(svd_start, top_k, free=True),
    "vq": Structure(kmeans_start, lambda codes: OneHot(), nearest_atom),
}


def solve_two_factor(blocks: Blocks, structure: str, count: CountAtoms = atoms_that_pay) -> Solution:
    """Find the codes and the dictionary of one of :data:`STRUCTURES`.

    Args:
        blocks: the problem, cut into blocks.
        structure: a key of :data:`STRUCTURES`.
        count: how many atoms an SVD starts with.
    """
    kind = STRUCTURES[structure]
    H, x = blocks.H, blocks.sample()
    codes, atoms = kind.start(blocks, x, count)
    if len(atoms) == 0:
        codes, atoms = x.new_zeros(len(x), 1), x.new_zeros(1, blocks.width)
    steps = _atom_steps(codes, len(atoms), blocks.population / len(x))
    grid = Grid(log_scale(steps, 1).double()[:, None])
    if kind.inner is gradient_step:
        codes = least_squares_codes(x, grid(atoms), H)
    found = projected_gradient(x, codes, atoms, kind.codes(codes), grid, H, kind.inner, ITERATIONS, TOLERANCE)
    codes, atoms = found.codes, found.dictionary
    if len(x) < blocks.rows:
        codes = torch.cat([_encode(part, atoms, kind, H) for part in blocks.chunks()])
    terms = [_term(codes, atoms, steps, blocks)]
    del codes
    if blocks.problem.trellis and kind.free and terms[0].nonzeros:
        terms.append(_along_trellis(blocks, terms[0]))
        if len(x) < blocks.rows:
            del terms[0]  # a trellis pays on large weights, and two solutions of one take memory
            trim()
    return blocks.problem.least(_solution(blocks, structure, term, found, kind) for term in terms)


def _solution(blocks: Blocks, structure: str, term: Term, found: Descent, kind: Structure) -> Solution:
    factors = Factors((blocks.weight.shape[0], blocks.weight.shape[1]), structure, (term,))
    return Solution(
        factors,
        blocks.problem.metric.distance(blocks.weight, factors),
        factors_bits(factors),
        found.status,
        found.trace,
        len(found.trace) - 1,
        "k-means" if kind.start is kmeans_start else "svd",
    )


def _along_trellis(blocks: Blocks, term: Term) -> Term:
    """Return a term with the same dictionary and codes along a trellis: nearest in the dictionary's metric D H D^T."""
    assert term.atoms is not None
    finer = round(FINE * math.log2(FINE_STEP))
    dictionary = term.atoms.double() * log_scale(term.steps, 1).double()[:, None]
    couplings = interference(Metric(blocks.H).in_dictionary(dictionary).cholesky(), torch.ones(1))
    fine = float(log_scale(torch.tensor(finer), FINE))
    targets = (least_squares_codes(x, dictionary, blocks.H).float() / fine for x in blocks.chunks())
    height = chunk_rows(blocks.rows, term.atom_count)
    codes = [chunk_along_trellis(part, couplings, blocks.problem.trellis) for part in _in_heights(targets, height)]
    return replace(term, codes=torch.cat(codes), scale=term.scale + finer, trellis=blocks.problem.trellis)


def _in_heights(parts: Iterable[Tensor], height: int) -> Iterator[Tensor]:
    """Yield the rows of all parts in pieces of ``height`` rows, the last one of what is left."""
    rest: Tensor | None = None
    for part in parts:
        rest = part if rest is None else torch.cat([rest, part])
        while len(rest) >= height:
            yield rest[:height]
            rest = rest[height:]
    if rest is not None and len(rest):
        yield rest


def _encode(x: Tensor, atoms: Tensor, kind: Structure, H: Tensor | None) -> Tensor:
    """Return integer codes of x over a dictionary that stays."""
    if kind.inner is nearest_atom:
        return nearest_atom(x, x, atoms, OneHot(), H)
    codes = least_squares_codes(x, atoms, H)
    return narrow(kind.codes(codes)(codes))


def _atom_steps(codes: Tensor, count: int, scale: float) -> Tensor:
    """Return log2 of the atoms' steps, ``1 / |z_k|`` rounded to powers of two, int32 (K,).

    Args:
        codes: of a sample of the rows.
        count: K.
        scale: rows over rows of the sample.
    """
    moments = gram(codes, count)
    power = scale * (moments if moments.dim() == 1 else moments.diagonal())
    return nearest_log_scale(power.clamp_min(1e-4).rsqrt(), 1)


def _powers(codes: Tensor) -> Tensor:
    """Return the squared norms of integer codes' columns, float64 (K,): exact, some rows at a time."""
    parts = codes.split(max(1, _CHUNK // codes.shape[1]))
    return torch.stack([part.double().square().sum(0) for part in parts]).sum(0)


def _term(codes: Tensor, atoms: Tensor, steps: Tensor, blocks: Blocks) -> Term:
    """Return the term with the atoms that are used, the most used (or most powerful) first."""
    integers = torch.round(atoms / log_scale(steps, 1).double()[:, None])
    one_hot = codes.dim() == 1
    usage = torch.bincount(codes, minlength=len(atoms)) if one_hot else _powers(codes)
    order = usage.argsort(descending=True, stable=True)
    order = order[(usage[order] > 0) & (one_hot | integers[order].any(1))]
    if len(order) == 0:
        order = torch.zeros(1, dtype=torch.int64)
    if one_hot:
        place = torch.empty(len(atoms), dtype=torch.int64)
        place[order] = torch.arange(len(order))
        codes = place[codes].to(torch.int32)
    else:
        codes = narrow(codes[:, order])
    rows = blocks.scales.rows
    if rows.numel() > 1:
        rows = rows.repeat_interleave(blocks.count)
    return Term(
        codes,
        blocks.scales.scale,
        steps[order],
        rows,
        narrow(integers[order]),
        step_resolution=1,
        row_resolution=RESOLUTION,
        one_hot=one_hot,
    )
