"""Projection of latents onto the sets of codes, at no more bits than the weight had.

Sets are those of the solvers: integers of which at most k are not zero (``grid``, ``pgd``), at most k in a row
(``sparse_pca``), any (``svd``), one-hot rows (``vq``), paths of the machine of dependent quantization (a ``trellis``).
What they project keeps its rate by a *strength* s in [0, 1) that makes cheap codes nearer:

=========  ===================================================================================
integers   a dead zone: |z| is rounded to ``floor(|z| + 1/2 - s/2)``; of dictionaries, too
one-hot    the atom of least ``|x - d_k|^2 + s a^2 bits(k)``, where atoms lie about a apart
trellis    the path of least ``|v - u|^2 + s bits(u)``, by Viterbi's algorithm
=========  ===================================================================================

The strength follows the rate from step to step, a little stronger where codes cost more than they may, a little weaker
where they cost less, so that hardly a code flips because of it. Integers project to themselves at any strength. A
dictionary that has become too dear waits; and where no strength that is tried meets the limit, codes stay what they
were, which met it. So the limit holds after every step, whatever the gradients do. Where the dictionary alone is
trained, it is rounded, and has a limit of its own.
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

MOST = 0.95
"""Largest strength."""
DEARER = 0.002
"""Share of its bits that a term may take more where the dictionary alone is trained, as trained scales do."""
_WAYS = (1.0, 0.5, 0.25)  # towards a dictionary that may be too dear
_TRIALS = 5  # strengths that are tried in a step
_AIM = 0.998  # of the bits allowed: what the strength is to bring them to, from either side
_SMALL, _LARGE = 0.005, 0.1  # changes of the strength at a time
_TABLE = 1 << 22  # entries of a table of distances

Support = Literal["tensor", "row", "any"]
"""Over what nonzeros are counted, where their number is limited."""


def coded_bits(term: Term) -> float:
    """Return the bits of a term's codes and dictionary: what training codes may change, apart from scales."""
    if term.one_hot:
        codes = index_bits(torch.bincount(term.codes.long(), minlength=term.atom_count))
    else:
        codes = ideal_bits(term.codes.cpu().numpy(), trellis=term.trellis)
    return codes + dictionary_bits(term)


def dictionary_bits(term: Term) -> float:
    """Return the bits of a term's dictionary."""
    return 0.0 if term.atoms is None else ideal_bits(term.atoms.cpu().numpy())


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
        dictionary: most bits of a dictionary whose codes stay as they are.
        support: over what nonzeros are counted.
        nonzeros: most of them.
        strength: s at the next projection.
        slope: bits that a strength of 1 would save, about: from the latest two that were tried.
    """

    bits: float
    dictionary: float
    support: Support
    nonzeros: int
    slope: float
    strength: float = 0.0

    @classmethod
    def of(cls, term: Term, structure: str) -> Limits:
        """Return the limits that a term just meets."""
        support, bits = support_of(structure, term), coded_bits(term)
        dictionary = dictionary_bits(term) + DEARER * bits
        return cls(bits, dictionary, support, nonzeros_of(term, support), max(bits, 1.0))

    def with_dictionary(self, term: Term, atoms: Tensor) -> Term:
        """Return the term with another dictionary, its codes as they are.

        Args:
            term: as it is.
            atoms: what the dictionary is projected from, (K, d); where that costs too much, less than the whole way
                there.
        """
        assert term.atoms is not None
        for share in _WAYS:
            found = replace(term, atoms=narrow(torch.lerp(term.atoms.float(), atoms, share).round_()))
            if dictionary_bits(found) <= self.dictionary:
                return found
        return term

    def project(self, term: Term, latent: Tensor, atoms: Tensor | None) -> Term:
        """Return the term with codes (and dictionary) projected from their latents; updates the strength.

        Args:
            term: as it is; its scales are not looked at, but for one-hot codes.
            latent: what codes are projected from: like the codes, but (m', d) for one-hot ones, in units of the steps.
            atoms: what the dictionary is projected from, (K, d), or None where it stays.
        """
        strength, last, least = self.strength, None, _SMALL
        for _ in range(_TRIALS):
            found = self._projected(term, latent, atoms, strength)
            bits = coded_bits(found)
            if last is not None:
                self.slope = max((last[1] - bits) / (strength - last[0]), 0.05 * self.bits, 1.0)
            change = (bits - _AIM * self.bits) / self.slope
            if bits <= self.bits:
                self.strength = max(strength + min(max(change, -_LARGE), 0.0), 0.0)
                return found
            if atoms is not None:  # a dictionary that has become too dear waits until codes have made room for it
                found = self.project(term, latent, None)
                self.strength = min(self.strength + min(change, _SMALL), MOST)
                return found
            if strength == MOST:
                break
            last = strength, bits
            strength = min(strength + min(max(change, least), _LARGE), MOST)
            least *= 2.0
        self.strength = strength
        return term

    def _projected(self, term: Term, latent: Tensor, atoms: Tensor | None, strength: float) -> Term:
        if atoms is not None:
            term = replace(term, atoms=narrow(with_dead_zone(atoms, strength)))
        closest = _CLOSEST["one_hot" if term.one_hot else "trellis" if term.trellis else "integers"]
        return replace(term, codes=closest(self, term, latent, strength))


def with_dead_zone(latent: Tensor, strength: float) -> Tensor:
    """Round to integers, of which zero takes more than its share and all others lie as much further out."""
    return torch.floor(latent.abs() + (0.5 - 0.5 * strength)).mul_(latent.sign())


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


def _integers(limits: Limits, term: Term, latent: Tensor, strength: float) -> Tensor:
    codes = with_dead_zone(latent, strength)
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
