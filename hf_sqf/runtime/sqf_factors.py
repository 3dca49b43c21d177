"""Factors: a weight as a sum of products of sparse integer codes and an integer dictionary.

One term of a weight ``W`` (m x n) is (Kuzmin et al., arXiv 2207.11048, eq. 1, with explicit scales)

    W_t = diag(rows) . Z . diag(steps) . D

with integer codes ``Z`` (m' x K), an integer dictionary ``D`` (K x d, its rows are the atoms) and two
vectors of scales. Every structure of the method is this one form:

=============  =========================  ==============================  ==============
structure      codes Z                    dictionary D                    blocks
=============  =========================  ==============================  ==============
``grid``       sparse integers, m x n     identity (``atoms is None``)    d = n
``svd``        dense integers, K << n     quantized atoms                 d = n
``sparse_pca`` k nonzeros in each row     quantized atoms                 d <= n
``vq``         one-hot rows (indices)     codebook                        d << n
``pgd``        top-k over the tensor      quantized atoms                 d <= n
``svd+grid``   the sum of both
=============  =========================  ==============================  ==============

Blocks: where ``d < n``, a row of W is cut into ``ceil(n / d)`` blocks of d columns (the last one padded
with zeros), so that Z has ``m' = m * ceil(n / d)`` rows.

Scales are integers on a logarithmic scale, so that no ``.to(dtype)`` can change them and what a solver
rounded with is exactly what is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries of a product that are in float64 at a time
FINE = 4096
"""Divisions of an octave for the scale of a whole term."""


@lru_cache(maxsize=8)
def _mantissas(resolution: int) -> Tensor:
    return torch.tensor([2.0 ** (i / resolution) for i in range(resolution)], dtype=torch.float32)


def log_scale(q: Tensor, resolution: int) -> Tensor:
    """Return ``2 ** (q / resolution)`` in float32, the same bits on every machine.

    Args:
        q: integers of any shape.
        resolution: divisions of an octave (1: powers of two).

    The fraction comes from a table of correctly rounded mantissas and the exponent is applied exactly;
    a library's ``exp2`` may differ in its last bit from one processor to the next.
    """
    q = q.to(torch.int64)
    exponent = torch.div(q, resolution, rounding_mode="floor")
    mantissa = _mantissas(resolution).to(q.device)[q - exponent * resolution]
    return torch.ldexp(mantissa, exponent.to(torch.int32))


def nearest_log_scale(value: Tensor, resolution: int) -> Tensor:
    """Return the integers ``q`` whose :func:`log_scale` lies nearest (in ratio) to positive ``value``."""
    return torch.round(torch.log2(value.double()) * resolution).to(torch.int32)


@dataclass(frozen=True, eq=False)
class Term:
    """One product ``2^(scale/4096) . diag(rows) . Z . diag(steps) . D``.

    Attributes:
        codes: integers, (m', K); where ``one_hot``, the index of each row's single 1 instead, (m',).
        scale: the term's own scale in 1/4096 octaves.
        steps: int32 (K,) or (1,), logarithmic, ``step_resolution`` to an octave.
        rows: int32 (m',) or (1,), logarithmic, ``row_resolution`` to an octave.
        atoms: integers (K, d), or None for the identity dictionary.
        step_resolution: divisions of an octave in ``steps``. It must be 1 where steps that differ meet
            atoms that are summed: integers times powers of two add up exactly in float64, so that the
            product does not depend on the order (or the threads) of its summation.
        row_resolution: divisions of an octave in ``rows``.
        one_hot: the codes are indices.
        trellis: number of states of the machine that chose each code's grid; 0 for scalar rounding.
    """

    codes: Tensor
    scale: int
    steps: Tensor
    rows: Tensor
    atoms: Tensor | None = None
    step_resolution: int = 16
    row_resolution: int = 16
    one_hot: bool = False
    trellis: int = 0

    @property
    def width(self) -> int:
        """Columns that one row of codes stands for: the block width d."""
        return self.codes.shape[1] if self.atoms is None else self.atoms.shape[1]

    @property
    def atom_count(self) -> int:
        """K."""
        return self.codes.shape[-1] if self.atoms is None else self.atoms.shape[0]

    @property
    def nonzeros(self) -> int:
        """Number of codes that are not zero."""
        return self.codes.shape[0] if self.one_hot else int(torch.count_nonzero(self.codes))

    def step_values(self) -> Tensor:
        """float32 (K,) or (1,): the steps with the term's scale folded in (not for ``atoms``)."""
        return log_scale(self.steps, self.step_resolution) * self.scale_value()

    def row_values(self) -> Tensor:
        """float32 (m',) or (1,)."""
        return log_scale(self.rows, self.row_resolution)

    def scale_value(self) -> Tensor:
        """float32 scalar: ``2^(scale/4096)``."""
        return log_scale(torch.tensor(self.scale), FINE).to(self.codes.device)

    def dictionary(self) -> Tensor:
        """``diag(steps) . D`` in float64 (K, d), without the term's scale; exact."""
        assert self.atoms is not None
        return self.atoms.double() * log_scale(self.steps, self.step_resolution).double()[:, None]

    def dense(self, select: Tensor | slice = slice(None)) -> Tensor:
        """Return the float32 rows ``select`` of this term (of m'), each of width d."""
        codes = self.codes[select]
        rows = self.row_values()
        rows = (rows if rows.numel() == 1 else rows[select])[:, None]
        if self.atoms is None:
            return codes.float() * self.step_values() * rows
        dictionary, size = self.dictionary(), max(1, _CHUNK // max(self.atom_count, self.width))
        product = torch.empty(len(codes), self.width, device=codes.device)
        for at in range(0, len(codes), size):  # sums of integers, exact in float64 however they are cut
            part = codes[at : at + size]
            product[at : at + size] = dictionary[part.long()] if self.one_hot else part.double() @ dictionary
        return product.mul_(self.scale_value()).mul_(rows)

    def to(self, device: torch.device | str) -> Term:
        """Return the term with its tensors on ``device``."""
        atoms = None if self.atoms is None else self.atoms.to(device)
        return replace(
            self, codes=self.codes.to(device), steps=self.steps.to(device), rows=self.rows.to(device), atoms=atoms
        )


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix as a sum of :class:`Term`.

    Attributes:
        shape: (m, n), the true shape; padding of blocks is cut off.
        structure: the name of the structure, e.g. ``"grid"`` or ``"svd+grid"``.
        terms: the summands, all standing for the same matrix.
    """

    shape: tuple[int, int]
    structure: str
    terms: tuple[Term, ...]

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.terms[0].codes.device

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the codes; a one-hot row of K codes counts K - 1 of them."""
        total = sum(t.codes.shape[0] * t.atom_count for t in self.terms)
        return 1.0 - sum(t.nonzeros for t in self.terms) / max(total, 1)

    def dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """Return the matrix, or the rows with the indices ``rows`` (1-D) of it.

        Terms are summed in float32 in their order, then rounded to ``dtype``: the same bits whatever the
        device's number of threads.
        """
        m, n = self.shape
        count = m if rows is None else rows.numel()
        total: Tensor | None = None
        for term in self.terms:
            blocks = math.ceil(n / term.width) if n else 0
            select: Tensor | slice = slice(None)
            if rows is not None:
                select = (rows[:, None] * blocks + torch.arange(blocks, device=rows.device)).reshape(-1)
            part = term.dense(select).reshape(count, blocks * term.width)[:, :n]
            total = part if total is None else total + part
        assert total is not None
        return total.to(dtype)

    def to(self, device: torch.device | str) -> Factors:
        """Return the factors with their tensors on ``device``."""
        return Factors(self.shape, self.structure, tuple(t.to(device) for t in self.terms))
