"""Codes times a dictionary: ``svd``, ``sparse_pca``, ``vq`` and ``pgd`` are one solver with other constraint sets.

    minimise  tr(G (W - Z D) H (W - Z D)^T)   over  Z in the structure's set,  D on a grid

Everything is computed in units of the noise step: with ``X = diag(g) W / c``, codes are plain integers and a bit is
worth ``slope(1)``. Atoms have norm 1 in the metric H, so that the noise of a code does not depend on its atom;
by the same rule (``step = c / L``) an atom that is used with power ``|z_k|^2`` is rounded with step ``1 / |z_k|``.
Steps of atoms are powers of two, hence products of integers exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.sqf_codec import ideal_bits
from ..runtime.sqf_factors import Factors, Term, log_scale, nearest_log_scale
from .dead_zone import count_significant
from .gradient import Inner, gram, gradient_step, nearest_atom, projected_gradient, weigh
from .grid import RESOLUTION, grid_scales, narrow
from .metric import Metric
from .prediction import atoms_that_pay
from .projections import Everything, Grid, OneHot, Projection, RowSparse, TopK
from .rate import factors_bits
from .solution import Solution
from .starts import kmeans_plus_plus, principal_atoms

SAMPLE = 1 << 20
"""Entries of a large weight that a dictionary is learned on (more where the dictionary is wide)."""
_CHUNK = 1 << 21  # entries that are encoded at a time
_DRAWS = 1 << 15  # blocks that k-means draws its start from
ITERATIONS = 20
"""Most iterations of a descent."""
TOLERANCE = 1e-4
"""Least relative fall of the objective for which a descent goes on."""
LARGEST_CODEBOOK = 4096


class Blocks:
    """A weight in units of the noise step, cut into blocks: the matrix X (m', d) of which it gives parts.

    Args:
        weight: (m, n).
        metric: the distance.
        step: c.
        width: d, at most n.
    """

    def __init__(self, weight: Tensor, metric: Metric, step: float, width: int) -> None:
        self.weight, self.width = weight, width
        self.count = math.ceil(weight.shape[1] / width)
        self.scales = grid_scales(Metric(g=metric.g), step)
        self.H = metric.of_blocks(width, self.count).H
        self.lower = None if self.H is None else metric.of_blocks(width, self.count).cholesky()
        self.rows = weight.shape[0] * self.count
        unit = self.scales.step_values().double() * self.scales.row_values().double()
        self._unit = unit[:, None]

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
        entries = max(SAMPLE, 8 * self.width * self.width)
        return self.part(slice(None, None, math.ceil(self.weight.numel() / entries)))

    def moments(self) -> Tensor:
        """Return ``X^T X``, (d, d)."""
        return sum((x.T @ x for x in self.chunks()), torch.zeros(self.width, self.width, dtype=torch.float64))


Start = Callable[[Blocks, Tensor, int], "tuple[Tensor, Tensor]"]
"""(the blocks, a sample X of them, seed) -> codes (m, K) or (m,) of the sample, and atoms (K, d)."""


def svd_start(blocks: Blocks, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors: as many as pay for themselves."""
    atoms, power = principal_atoms(blocks.moments(), blocks.lower)
    atoms = atoms[: atoms_that_pay(power, blocks.rows, blocks.width)]
    return weigh(x, blocks.H) @ atoms.T, atoms


def kmeans_start(blocks: Blocks, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from rows drawn by k-means++: ``2^(d R)``, where R is the rate of rounding entry by entry."""
    few = x[:: math.ceil(len(x) / _DRAWS)]
    atoms = kmeans_plus_plus(few, min(codebook_size(few), len(few)), seed, blocks.lower)
    codes = nearest_atom(x, x, atoms, OneHot(), blocks.H)
    lloyd = projected_gradient(x, codes, atoms, OneHot(), Everything(), blocks.H, nearest_atom, ITERATIONS, TOLERANCE)
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
        sparsity: the set that holds the codes, given those of the start.
        inner: the step on the codes.
    """

    start: Start
    sparsity: Callable[[Tensor], Projection]
    inner: Inner = gradient_step


STRUCTURES = {
    "svd": Structure(svd_start, lambda Z: Everything()),
    "sparse_pca": Structure(svd_start, lambda Z: RowSparse(max(1, round(count_significant(Z) / len(Z))))),
    "pgd": Structure(svd_start, lambda Z: TopK(count_significant(Z))),
    "vq": Structure(kmeans_start, lambda Z: OneHot(), nearest_atom),
}


def solve_two_factor(
    weight: Tensor, metric: Metric, step: float, structure: str, width: int | None = None, seed: int = 0
) -> Solution:
    """Find the codes and the dictionary of one of :data:`STRUCTURES`.

    Args:
        weight: float (m, n).
        metric: the distance.
        step: c, in the metric's units.
        structure: a key of :data:`STRUCTURES`.
        width: d of the blocks; None for n.
        seed: of starts that draw at random.
    """
    kind = STRUCTURES[structure]
    blocks = Blocks(weight, metric, step, min(width or weight.shape[1], weight.shape[1]))
    H, x = blocks.H, blocks.sample()
    codes, atoms = kind.start(blocks, x, seed)
    if len(atoms) == 0:
        codes, atoms = x.new_zeros(len(x), 1), x.new_zeros(1, blocks.width)
    sparsity = kind.sparsity(codes)
    steps = _atom_steps(codes, len(atoms), blocks.rows / len(x))
    grid = Grid(log_scale(steps, 1).double()[:, None])
    found = projected_gradient(x, codes, atoms, Grid(1.0) @ sparsity, grid, H, kind.inner, ITERATIONS, TOLERANCE)
    codes, atoms = found.codes, found.dictionary
    if len(x) < blocks.rows:
        codes = torch.cat([_encode(part, atoms, kind, H) for part in blocks.chunks()])
    factors = Factors(
        (weight.shape[0], weight.shape[1]), structure, (_term(codes, atoms, steps, blocks),)
    )
    return Solution(
        factors,
        metric.distance(weight, factors.dense()),
        factors_bits(factors),
        found.status,
        found.trace,
        len(found.trace) - 1,
        "k-means" if kind.start is kmeans_start else "svd",
    )


def _encode(x: Tensor, atoms: Tensor, kind: Structure, H: Tensor | None) -> Tensor:
    """Return integer codes of x over a dictionary that stays."""
    if kind.inner is nearest_atom:
        return nearest_atom(x, x, atoms, OneHot(), H)
    weighted = weigh(atoms, H)
    codes = torch.linalg.lstsq(weighted @ atoms.T, (x @ weighted.T).T, driver="gelsd").solution.T
    sets = Grid(1.0) @ kind.sparsity(codes)
    return narrow(projected_gradient(x, codes, atoms, sets, None, H, kind.inner, ITERATIONS, TOLERANCE).codes)


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


def _term(codes: Tensor, atoms: Tensor, steps: Tensor, blocks: Blocks) -> Term:
    """Return the term with the atoms that are used, the most used (or most powerful) first."""
    integers = torch.round(atoms / log_scale(steps, 1).double()[:, None])
    one_hot = codes.dim() == 1
    usage = torch.bincount(codes, minlength=len(atoms)) if one_hot else codes.double().square().sum(0)
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
