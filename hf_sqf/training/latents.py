"""Where latents of codes start: as near to the original as the codes let them.

A code is what its set had nearest to a number, and training goes on from the number: from the middle of its cell each
code would have to go half a step before anything changes, and a zero would not know the weight that it came from. So
a latent is put at the original's value where that lies within the cell of the code, and else at the cell's edge on the
way there. The codes as they are remain the projection of the latents.

Calibration does not choose the nearest integers: each makes up for the errors of others. Where too many lie outside of
their cells, latents start at the codes: from the edges codes would flip for any gradient, each for itself, and what
they had made up for would be lost.

=========  =====================================================================================
integers   the cell of z is ``|z| - 1/2 + s/2 <= |x| < |z| + 1/2 + s/2`` with a dead zone of strength s
trellis    ``|x - u| < 1/2``: no integers, on a path or not, are nearer than those of the path
one-hot    where the atom is the nearest
=========  =====================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compress.gradient import least_squares_codes
from ..runtime.sqf_factors import Factors, Term
from .projecting import MOST

_INSIDE = 0.98  # of the way to the edge of a cell
_OUTSIDE = 0.125  # of the nonzeros, at most: solvers of products stop somewhat short of the nearest codes
_TABLE = 1 << 22  # entries of a table of distances


def wanted_of(factors: Factors, original: Tensor) -> list[Tensor]:
    """Return what each term is to stand for, float32 (m', d): itself and all that the factors leave.

    Args:
        factors: of a matrix.
        original: the matrix (m, n) that they approximate.
    """
    left = original.float() - factors.dense()
    found = []
    for term in factors.terms:
        part = term.dense()
        padding = -left.shape[1] % term.width
        found.append(part + torch.nn.functional.pad(left, (0, padding)).reshape(part.shape))
    return found


def nearest_latents(term: Term, wanted: Tensor) -> tuple[Tensor, float] | None:
    """Return latents that project to the codes as they are, and the strength at which they do.

    Args:
        term: with codes (m', K), or (m',) where one-hot.
        wanted: what the term is to stand for, float32 (m', d).

    Returns:
        Float32 of the shape of the codes, in steps; of one-hot ones (m', d), in units of the dictionary. None where
        integers are not about the nearest to what they stand for, as those chosen with data are not.
    """
    blocks = wanted / term.row_values()[:, None]
    if term.one_hot:
        return _in_cells_of_atoms(term, blocks / term.scale_value()), 0.0
    if term.atoms is None:
        numbers = blocks / term.step_values()
    else:
        numbers = least_squares_codes(blocks.double(), term.dictionary() * term.scale_value(), None).float()
    strength = 0.0 if term.trellis else _dead_zone(term, numbers)
    codes = term.codes.float()
    sign = torch.where(codes != 0, codes, numbers).sign()
    size, middle = numbers * sign, codes.abs()
    if not _about_nearest(term, size - middle, strength):
        return None
    half = 0.5 * _INSIDE
    low = torch.where(codes != 0, middle - half + 0.5 * strength, 0.0)
    return size.clamp_min(low).clamp_max(middle + half + 0.5 * strength) * sign, strength


def _about_nearest(term: Term, further_out: Tensor, strength: float) -> bool:
    """Return whether most nonzeros lie in their cells, from how much further out than they the wanted numbers lie."""
    half = 1.0 if term.trellis else 0.5  # on a trellis the points of a state lie two steps apart
    away = further_out[term.codes != 0]
    outside = (away < -half) | (away > half + 0.5 * strength)
    return int(outside.sum()) <= _OUTSIDE * away.numel()


def _dead_zone(term: Term, numbers: Tensor) -> float:
    """Return the strength that leaves as many codes zero as are."""
    zeros = numbers.numel() - term.nonzeros
    largest = float(numbers.abs().reshape(-1).kthvalue(zeros).values) if zeros else 0.0
    return min(max(2.0 * largest - 1.0, 0.0), MOST)


def _in_cells_of_atoms(term: Term, wanted: Tensor) -> Tensor:
    """Go from each block's atom towards ``wanted`` (m', d), to the edge of the atom's cell at most."""
    atoms = term.dictionary().float()
    half_power = 0.5 * atoms.square().sum(1)
    found = []
    rows = max(1, _TABLE // len(atoms))
    for some, indices in zip(wanted.split(rows), term.codes.long().split(rows), strict=True):
        mine = atoms[indices]
        towards = some - mine
        edge = half_power + half_power[indices][:, None] - mine @ atoms.T  # |d_k - d|^2 / 2
        along = towards @ atoms.T - (towards * mine).sum(1, keepdim=True)  # towards . (d_k - d)
        along.scatter_(1, indices[:, None], -torch.inf)
        share = torch.where(along > edge, edge.clamp_min(0.0) / along, 1.0).amin(1)
        found.append(mine + _INSIDE * share[:, None] * towards)
    return torch.cat(found)
