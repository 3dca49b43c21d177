"""Matrices of factors in the form that they run in: what multiplies an input.

A :class:`Running` matrix is multiplied directly where that is cheaper, and decoded some rows at a time where it is
not: for structures whose factors are no smaller than their product, and on devices without compiled kernels. Inputs
are contiguous, outputs have the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sqf_integers import Integers, check_ids, in_tiles, many_in_bfloat16, transposed_in_tiles
from .sqf_jit import HAVE_NUMBA
from .sqf_tables import sum_up


class Running:
    """A matrix (m, n) that can be multiplied.

    Attributes:
        shape: (m, n).
        device: where it lies.
    """

    shape: tuple[int, int]
    device: torch.device

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the rows first..last, (last - first, n)."""
        raise NotImplementedError

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows with the indices ``ids`` (1-D int64), (len(ids), n).

        Raises:
            IndexError: an index is out of range.
        """
        raise NotImplementedError

    def quick(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return what :meth:`multiply` does, by the shortest way; None where that is not open.

        Takes whatever a module is given.
        """
        return None

    def direct(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Return what :meth:`multiply` does, without decoding W; None where it had better be decoded."""
        return None

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x . W^T + bias, (..., n) to (..., m); bias float32 (m,)."""
        y = self.direct(x, bias)
        return self._decoded(x, bias) if y is None else y

    def _decoded(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        m, n = self.shape
        return in_tiles(self.shape, self._rows(x.dtype), x.view(-1, n), bias).view(*x.shape[:-1], m)

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """Return y . W, (batch, m) to (batch, n)."""
        return transposed_in_tiles(self.shape, self._rows(y.dtype), y)

    def _rows(self, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
        return lambda first, last: self.decode(first, last, dtype)


class Dense(Running):
    """Decoded once and kept."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape, self.device = weight, (weight.shape[0], weight.shape[1]), weight.device

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return self.weight[first:last].to(dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return self.weight[ids].to(dtype)

    def direct(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`Running`."""
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """See :class:`Running`."""
        return torch.mm(y, self.weight.to(y.dtype))


class Grid(Running):
    """Codes with a step per column and a factor per row."""

    def __init__(self, integers: Integers) -> None:
        self.integers, self.shape, self.device = integers, integers.shape, integers.device
        self.quick = integers.quick  # type: ignore[method-assign]  # a call less at batch 1; and so the others
        self.direct = integers.multiply  # type: ignore[method-assign]
        self.decode = integers.decode  # type: ignore[method-assign]
        self.pick = integers.pick  # type: ignore[method-assign]


class TwoFactor(Running):
    """Z . D, with blocks where D is narrower than the matrix.

    Args:
        shape: (m, n).
        codes: Z as (m, blocks . K) where all blocks of a row have the same factor, else as (m . blocks, K).
        atoms: D (K, d), steps and the term's scale included, in float32's reach.
    """

    def __init__(self, shape: tuple[int, int], codes: Integers, atoms: Integers) -> None:
        self.shape, self.device, self.codes, self.atoms = shape, codes.device, codes, atoms
        m, n = shape
        count, self.width = atoms.shape
        self.blocks = math.ceil(n / self.width)
        self.joined = codes.shape[0] == m
        self._by_codes, self._by_atoms = Grid(codes), Grid(atoms)
        self._directly = count * (n + m * self.blocks)  # multiplications for a row of input

    def _product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        count = self.atoms.shape[0]
        rows = torch.mm(codes.view(-1, count), self.atoms.all())
        return rows.view(-1, self.blocks * self.width)[:, : self.shape[1]].to(dtype)

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        per_row = 1 if self.joined else self.blocks
        return self._product(self.codes.decode(first * per_row, last * per_row, torch.float32), dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return self._product(self.codes.pick(_block_ids(ids, 1 if self.joined else self.blocks), torch.float32), dtype)

    def direct(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """See :class:`Running`: first x . D^T, then its product with Z, unless forming Z . D takes fewer steps."""
        m, n = self.shape
        batch = x.numel() // n
        decoded = m * n * (self.atoms.shape[0] + batch)
        if not self.joined or batch * self._directly > decoded or x.dtype == torch.float64:
            return None
        if n < self.blocks * self.width:
            x = torch.nn.functional.pad(x, (0, self.blocks * self.width - n))
        inner = self._by_atoms.multiply(x.view(-1, self.width).float()).view(*x.shape[:-1], self.codes.shape[1])
        return self._by_codes.multiply(inner.to(x.dtype) if many_in_bfloat16(x) else inner, bias).to(x.dtype)


class OneHot(Running):
    """Rows, or blocks of rows, out of a codebook: ``rows_i . D[index_i]``.

    Args:
        shape: (m, n).
        indices: unsigned integers (m . blocks,), below K.
        codebook: float32 (K, d).
        rows: float32 (m . blocks,) or (1,).
    """

    def __init__(self, shape: tuple[int, int], indices: Tensor, codebook: Tensor, rows: Tensor) -> None:
        self.shape, self.device = shape, indices.device
        self.indices, self.codebook, self.rows = indices, codebook, rows
        self.blocks = math.ceil(shape[1] / codebook.shape[1])

    def _lookup(self, chosen: Tensor | slice, dtype: torch.dtype) -> Tensor:
        blocks = self.codebook[self.indices[chosen].long()]
        blocks = blocks * (self.rows if self.rows.numel() == 1 else self.rows[chosen][:, None])
        return blocks.view(-1, self.blocks * self.codebook.shape[1])[:, : self.shape[1]].to(dtype)

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return self._lookup(slice(first * self.blocks, last * self.blocks), dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        check_ids(ids, self.shape[0])
        return self._lookup(_block_ids(ids, self.blocks), dtype)

    def direct(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """See :class:`Running`: products of x's blocks with all atoms, of which each row of W sums up its own."""
        (m, n), (count, width) = self.shape, self.codebook.shape
        compiled = HAVE_NUMBA and self.device.type == "cpu" and x.dtype != torch.float64
        if not compiled or x.numel() != n or count > m:  # the table would cost as much as the product
            return None
        single = torch.nn.functional.pad(x.float().view(-1), (0, self.blocks * width - n)).view(self.blocks, width)
        table = torch.mm(single, self.codebook.T)
        y = torch.empty(m)
        rows = self.rows.view(-1, 1 if self.rows.numel() == 1 else self.blocks)
        sum_up(table.numpy(), self.indices.view(m, self.blocks).numpy(), rows.numpy(), y.numpy())
        return (y if bias is None else y.add_(bias)).to(x.dtype).view(*x.shape[:-1], m)


class Sum(Running):
    """A sum of matrices."""

    def __init__(self, parts: Sequence[Running]) -> None:
        self.parts, self.shape, self.device = parts, parts[0].shape, parts[0].device
        self._scattered = [part for part in parts[1:] if isinstance(part, Grid) and part.integers.scattered]
        self._others = [part for part in parts if part not in self._scattered]

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return _total([p.decode(first, last, torch.float32) for p in self.parts]).to(dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return _total([p.pick(ids, torch.float32) for p in self.parts]).to(dtype)

    def direct(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """See :class:`Running`: parts that had better be decoded are decoded together, and sums are float32."""
        if x.dtype == torch.float64:
            return None
        given = x if many_in_bfloat16(x) else x.float()
        products, decoded = [], []
        for part in self._others:
            y = part.direct(given)
            if y is None:
                decoded.append(part)
            else:
                products.append(y)
        if not products:
            return None
        if decoded:
            products.append(Sum(decoded)._decoded(given.float()))
        if bias is not None:
            products.append(bias)
        total = _total([y.float() for y in products]) if len(products) > 1 else products[0]
        for scattered in self._scattered:
            scattered.integers.add(given.float(), total)
        return total.to(x.dtype)


def _block_ids(ids: Tensor, blocks: int) -> Tensor:
    return ids if blocks == 1 else (ids[:, None] * blocks + torch.arange(blocks, device=ids.device)).reshape(-1)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
