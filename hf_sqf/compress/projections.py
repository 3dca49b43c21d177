"""Constraint sets of codes and dictionary, as projections onto them.

Each maps a matrix to the nearest one of its set. They compose by ``@``, read from the right:
``Grid(0.1) @ TopK(500)`` keeps the 500 largest entries, then rounds them; it is the nearest point of the
set of matrices with at most 500 nonzeros, all multiples of 0.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .prices import price_of_codes, round_at_price


class Projection(ABC):
    """The nearest point of a set."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return the point of the set nearest to the matrix ``x`` in the Euclidean norm."""

    def penalty(self, x: Tensor) -> float:
        """Return what the point ``x`` of the set costs beside its distance: nothing, for a mere constraint."""
        return 0.0

    def __matmul__(self, first: Projection) -> Projection:
        """Return the composition: ``first``, then this one."""
        return Composition(self, first)


@dataclass(frozen=True)
class Composition(Projection):
    """``last`` after ``first``."""

    last: Projection
    first: Projection

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``last(first(x))``."""
        return self.last(self.first(x))

    def penalty(self, x: Tensor) -> float:
        """Return the sum of both."""
        return self.last.penalty(x) + self.first.penalty(x)


@dataclass(frozen=True)
class Everything(Projection):
    """No constraint."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


@dataclass(frozen=True, eq=False)
class Grid(Projection):
    """Multiples of a step.

    Attributes:
        step: positive; a number, or a tensor that broadcasts against the matrix ((K, 1): one step a row).
    """

    step: float | Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the nearest multiples."""
        return torch.round(x / self.step) * self.step


@dataclass(frozen=True, eq=False)
class PricedGrid(Projection):
    """Integers, each at its price: the set ``Grid(1)`` with the penalty ``lambda * bits``.

    Attributes:
        prices: what the step from magnitude k to k + 1 costs, (K,), never falling; see :mod:`.prices`.
    """

    prices: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the proximal map of the penalty: the integers z of least ``(x - z)^2 + penalty``."""
        return round_at_price(x, self.prices)

    def penalty(self, x: Tensor) -> float:
        """Return the price of the integers ``x``, but for what zeros cost."""
        return price_of_codes(x, self.prices)


@dataclass(frozen=True)
class TopK(Projection):
    """At most ``k`` nonzeros in the whole matrix. Ties are kept in row-major order."""

    k: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` with all but its k largest magnitudes set to zero."""
        return _keep_largest(x.reshape(1, -1), self.k).reshape(x.shape)


@dataclass(frozen=True)
class RowSparse(Projection):
    """At most ``k`` nonzeros in each row. Ties are kept from left to right."""

    k: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` with all but the k largest magnitudes of each row set to zero."""
        return _keep_largest(x, self.k)


@dataclass(frozen=True)
class OneHot(Projection):
    """A single 1 in each row, zeros elsewhere."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the one-hot rows nearest to those of ``x``: the 1 where the row is largest."""
        return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)


def _keep_largest(x: Tensor, k: int) -> Tensor:
    """Keep k magnitudes in each row: all above the k-th largest, and of those equal to it the first."""
    if k >= x.shape[-1]:
        return x
    if k <= 0:
        return torch.zeros_like(x)
    size = x.abs()
    least = size.kthvalue(x.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above, equal = size > least, size == least
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(-1) <= room)), x, 0.0)
