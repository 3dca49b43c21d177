"""Weights whose terms are trained.

A trained weight keeps the terms of its :class:`~hf_sqf.runtime.sqf_factors.Factors` as
:class:`~.terms.TrainedTerm`, multiplies with them, and packs them as they would be saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import repeat

import torch
from torch import Tensor, nn

from ..runtime.sqf_container import pack
from ..runtime.sqf_factors import Factors
from .latents import wanted_of
from .terms import Options, TrainedTerm


class TrainedWeight:
    """A weight, of one matrix or one for each expert, with parameters.

    Attributes:
        name: the packed tensor's full name, for messages.
        shapes: (m, n) of each matrix.
        terms: of each matrix.

    Args:
        name: see above.
        factors: of each matrix.
        options: how they are trained.
        weight: the name that is packed with the factors.
        originals: of each matrix, (m, n), where latents of codes start; without, they start at the codes.
    """

    def __init__(
        self,
        name: str,
        factors: list[Factors],
        options: Options,
        weight: str = "",
        originals: list[Tensor] | None = None,
    ) -> None:
        self.name, self._weight = name, weight
        self.structures = [f.structure for f in factors]
        self.shapes = [f.shape for f in factors]
        self.terms: list[list[TrainedTerm]] = []
        for i, f in enumerate(factors):
            wanted: Iterable[Tensor | None] = repeat(None) if originals is None else wanted_of(f, originals[i])
            self.terms.append([TrainedTerm(t, f.structure, options, w) for t, w in zip(f.terms, wanted, strict=False)])
        self._packed: tuple[tuple[int, ...], Tensor] | None = None
        self._moves = 0

    def all_terms(self) -> Iterator[TrainedTerm]:
        """Yield the terms of all matrices."""
        for terms in self.terms:
            yield from terms

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters, with names that are valid for attributes."""
        for i, terms in enumerate(self.terms):
            for j, term in enumerate(terms):
                for name, parameter in term.parameters.items():
                    yield f"{i}_{j}_{name}", parameter

    def read(self, factors: list[Factors]) -> None:
        """Take over the factors of a checkpoint.

        Raises:
            ValueError: they have another form than these; names the tensor.
        """
        self._moves += 1
        if [f.shape for f in factors] != self.shapes or [len(f.terms) for f in factors] != list(map(len, self.terms)):
            raise ValueError(f"{self.name}: the factors have another form than those that are trained")
        try:
            for matrix, terms in zip(factors, self.terms, strict=True):
                for term, trained in zip(matrix.terms, terms, strict=True):
                    trained.read(term)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def factors(self) -> list[Factors]:
        """Return the factors as they would be saved now."""
        return [
            Factors(shape, structure, tuple(t.current() for t in terms))
            for shape, structure, terms in zip(self.shapes, self.structures, self.terms, strict=True)
        ]

    def packed(self) -> Tensor:
        """Return the bytes of the file; the same tensor until something moves, so that tied weights are saved once."""
        state = (self._moves, *(p._version for _, p in self.parameters()))
        if self._packed is None or self._packed[0] != state:
            self._packed = state, pack([f.to("cpu") for f in self.factors()], self._weight)
        return self._packed[1]

    def project(self, step: int) -> None:
        """See :meth:`TrainedTerm.project`."""
        self._moves += 1
        for term in self.all_terms():
            term.project(step)

    def matrix(self, index: int) -> Tensor:
        """Return a matrix as float32 (m, n), with gradients."""
        m, n = self.shapes[index]
        return _total(term.matrix().reshape(m, -1)[:, :n] for term in self.terms[index])

    def _grid(self) -> TrainedTerm | None:
        term = self.terms[0][0]
        return term if len(self.terms[0]) == 1 and term.is_grid else None

    def product(self, x: Tensor) -> Tensor:
        """Return ``x W^T``, (..., n) to (..., m), in the dtype of x, with gradients."""
        grid = self._grid()
        return nn.functional.linear(x, self.matrix(0).to(x.dtype)) if grid is None else grid.product(x)

    def pick(self, ids: Tensor) -> Tensor:
        """Return the rows ``ids`` (k,), float32 (k, n), with gradients."""
        m, n = self.shapes[0]
        by_row = all(not t.term.one_hot and t.term.codes.shape[0] == m for t in self.terms[0])  # and not block by block
        if not by_row:
            return self.matrix(0)[ids]
        return _total(term.pick(ids)[:, :n] for term in self.terms[0])

    def to(self, device: torch.device) -> None:
        """Move all that is no parameter."""
        for term in self.all_terms():
            term.to(device)


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of one tensor or more; a single one as it is."""
    return reduce(torch.add, parts)
