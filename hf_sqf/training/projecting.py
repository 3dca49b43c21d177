"""Projection of latents onto the sets of codes, at no more bits than the weight had.

Sets are those of the solvers: integers of which at most k are not zero (``grid``, ``pgd``), at most k in a row
(``sparse_pca``), any (``svd``), one-hot rows (``vq``), paths of the machine of dependent quantization (a ``trellis``).
What they project keeps its rate by a *strength* s in [0, 1) that makes cheap codes nearer, found anew at each step:

=========  ===================================================================================
integers   a dead zone: |z| is rounded to ``floor(|z| + 1/2 - s/2)``
one-hot    the atom of least ``|x - d_k|^2 + s a^2 bits(k)``, where atoms lie about a apart
trellis    the path of least ``|v - u|^2 + s bits(u)``, by Viterbi's algorithm
=========  ===================================================================================

At s = 0 codes project to themselves. Where no strength that is tried meets the limit, the codes stay what they were:
they met it. So the limit holds after every step, whatever the gradients do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..compress.dependent import nearest_paths
from ..compress.grid import narrow
from ..compress.projections import RowSparse, TopK
from ..compress.rate import index_bits
from ..runtime.sqf_codec import ideal_bits
from ..runtime.sqf_factors import Term

_TRIALS = 5  # strengths that are tried, each twice the one before
_LEAST = 0.01  # strength above none
_MOST = 0.95
_DECAY = 0.7  # of the strength from one step to the next, so that it falls again where it can
_TABLE = 1 << 22  # entries of a table of distances

Support = Literal["tensor", "row", "any"]
"""Over what nonzeros are counted, where their number is limited."""


def coded_bits(term: Term) -> float:
    """Return the bits of a term's codes and dictionary: what training codes may change, apart from scales."""
    if term.one_hot:
        codes = index_bits(torch.bincount(term.codes.long(), minlength=term.atom_count))
    else:
        codes = ideal_bits(term.codes.cpu().numpy(), trellis=term.trellis)
    return codes + (0.0 if term.atoms is None else ideal_bits(term.atoms.cpu().numpy()))


def support_of(structure: str, term: Term) -> Support:
    """Return how a term of a structure limits the number of its nonzeros."""
    if term.one_hot or term.trellis:
        return "any"
    if term.atoms is None or "pgd" in structure:
        return "tensor"
    return "row" if "sparse_pca" in structure else "any"


def nonzeros_of(term: Term, support: Support) -> int:
    """Return the number of nonzeros that a term has, the most in a row for ``"row"``."""
    if support == "row":
        return int(torch.count_nonzero(term.codes, dim=1).max())
    return term.nonzeros


@dataclass
class Limits:
    """What a term may never exceed, and the strength that keeps it there.

    Attributes:
        bits: most bits of codes and dictionary together.
        support: over what nonzeros are counted.
        nonzeros: most of them.
        strength: s.
    """

    bits: float
    support: Support
    nonzeros: int
    strength: float = 0.0

    @classmethod
    def of(cls, term: Term, structure: str) -> Limits:
        """Return the limits that a term just meets."""
        support = support_of(structure, term)
        return cls(coded_bits(term), support, nonzeros_of(term, support))

    def project(self, term: Term, latent: Tensor, atoms: Tensor | None) -> Term:
        """Return the term with codes (and dictionary) projected from their latents; updates the strength.

        Args:
            term: as it is; its scales are not looked at, but for one-hot codes.
            latent: what codes are projected from: like the codes, but (m', d) for one-hot ones, in units of the steps.
            atoms: what the dictionary is projected from, (K, d), or None where it stays.
        """
        moved = term if atoms is None else replace(term, atoms=narrow(torch.round(atoms)))
        closest = _CLOSEST["one_hot" if term.one_hot else "trellis" if term.trellis else "integers"]
        strength = _DECAY * self.strength
        if strength < _LEAST:
            strength = 0.0
        for _ in range(_TRIALS):
            found = replace(moved, codes=closest(self, moved, latent, strength))
            if _same(found, term):
                self.strength = strength
                return term
            if coded_bits(found) <= self.bits:
                self.strength = strength
                return found
            strength = min(max(2.0 * strength, _LEAST), _MOST)
        self.strength = strength
        return term


def foremost(latent: Tensor, current: Tensor, share: float) -> Tensor:
    """Return the latents that have gone furthest, and in place of the others what they were projected to.

    An optimizer such as Adam moves all latents about as fast, those whose gradients are noise back and forth. Projected
    at once, very many would change in the same step; so those go first whose gradients agreed.

    Args:
        latent: like codes, or (m', d) blocks.
        current: what the codes stand for now, of the same shape.
        share: of the codes that may change.
    """
    if share >= 1.0:
        return latent
    away = (latent - current).abs()
    count = away.numel()
    least = away.reshape(-1).kthvalue(count - max(1, round(share * count)) + 1).values
    return torch.where(away >= least, latent, current)


def _same(one: Term, other: Term) -> bool:
    atoms = one.atoms is other.atoms or (one.atoms is not None and torch.equal(one.atoms, other.atoms))  # type: ignore[arg-type]
    return bool(atoms and torch.equal(one.codes, other.codes))


def _integers(limits: Limits, term: Term, latent: Tensor, strength: float) -> Tensor:
    codes = torch.floor(latent.abs() + (0.5 - 0.5 * min(strength, 0.98))).mul_(latent.sign())
    if limits.support == "tensor" and int(torch.count_nonzero(codes)) > limits.nonzeros:
        codes = torch.where(TopK(limits.nonzeros)(torch.where(codes != 0, latent, 0.0)) != 0, codes, 0.0)
    elif limits.support == "row":
        codes = torch.where(RowSparse(limits.nonzeros)(torch.where(codes != 0, latent, 0.0)) != 0, codes, 0.0)
    return narrow(codes)


def _paths(limits: Limits, term: Term, latent: Tensor, strength: float) -> Tensor:
    return nearest_paths(latent.cpu(), term.codes.cpu(), term.trellis, strength).to(latent.device)


def _one_hot(limits: Limits, term: Term, latent: Tensor, strength: float) -> Tensor:
    atoms = term.dictionary().float()
    usage = torch.bincount(term.codes.long(), minlength=len(atoms)).float()
    power = atoms.square().sum(1)
    bits = torch.log2(usage.sum() / usage.clamp_min(0.5))
    rate = float((usage * bits).sum() / usage.sum())
    apart = power.mean() * 2.0 ** (-2.0 * rate / atoms.shape[1])  # squared, about, of atoms of a Gaussian's codebook
    cost = power + strength * apart * bits
    rows = max(1, _TABLE // len(atoms))
    found = [torch.addmm(cost, some, atoms.T, alpha=-2.0).argmin(1) for some in latent.split(rows)]
    return torch.cat(found).to(term.codes.dtype)


_CLOSEST: dict[str, Callable[[Limits, Term, Tensor, float], Tensor]] = {
    "integers": _integers,
    "trellis": _paths,
    "one_hot": _one_hot,
}
