"""A matrix of small integers with a step per column and a factor per row, in few bits, ready to be multiplied.

    W = diag(rows) . Z . diag(steps)

Z lies in memory as a dense part of 4, 8, 16 or 32 bits and, where a few codes do not fit it, their excess as a sparse
remainder; or as a sparse matrix alone. The compiled kernels of :mod:`sqf_kernels` multiply it as it lies; where there
are none, some rows of W at a time are decoded and multiplied by torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .sqf_calls import BFLOAT16, FLOAT32, LARGEST_INT4, PAIRED, SLACK
from .sqf_jit import HAVE_NUMBA
from .sqf_kernels import Kernels, few_of, kernels
from .sqf_vectors import FEATURES, INT4, INT6, INT8, INT16, LANES, NONE, PAIRS

INT32 = 32
_DTYPES = {INT4: torch.int8, INT6: torch.int8, INT8: torch.int8, INT16: torch.int16, INT32: torch.int32}
_RANGES = {INT4: LARGEST_INT4, INT6: 31, INT8: 127, INT16: 32767}
_REMAINDER = {INT4: 0.025, INT6: 0.0025, INT8: 0.01}
"""Share of codes that may go to the remainder, at four bytes each."""
_SPARSE = 0.04
"""Share of nonzeros up to which a sparse product is the faster one."""
_TILE = 1 << 21
"""Entries that are decoded at a time: fewer make more and slower matrix products, more are new memory in each call."""
_TILE_ROWS = 64
"""Rows in a tile are a multiple of it: torch's products are slower where their outputs begin within a vector."""
_BLOCK = 1 << 20  # codes that are put into storage at a time
_COMPILED = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_BFLOAT16_ROWS = LANES if PAIRS else 32 if FEATURES.get("avx512bf16") or FEATURES.get("amx-bf16") else None
"""Rows of a bfloat16 input from which products in bfloat16 are the faster ones: where the processor multiplies it
itself, at twice the rate of float32. They are our own where it does so in PAIRS, else torch's."""


class _Scratch(threading.local):
    """Room for products with many rows, a few MB for each thread that calls: new memory would have to be mapped."""

    def __init__(self) -> None:
        self.room = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        """Return ``size`` bytes or more, whatever is in them; the next call may return the same."""
        if self.room.numel() < size:
            self.room = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.room


_scratch = _Scratch()


def kind_for(codes: Tensor, smallest: int, columns: int, sparse: bool = False) -> int:
    """Return the storage for integer codes (m, n), of no fewer than ``smallest`` bits.

    Args:
        codes: (m, n).
        smallest: INT4 or INT8.
        columns: n of the matrix as it will be multiplied.
        sparse: prefer the smaller of sparse and dense storage to the faster.
    """
    indexed = columns <= 1 << 16
    largest = max(-int(codes.min()), int(codes.max())) if codes.numel() else 0
    nonzeros = int(torch.count_nonzero(codes))
    for kind in (INT4, INT6, INT8, INT16):
        if kind < smallest:
            continue
        bound = _RANGES[kind]
        outside = 0 if largest <= bound else int(torch.count_nonzero((codes > bound) | (codes < -bound)))
        if not outside or (indexed and largest <= 32767 and outside <= _REMAINDER.get(kind, 0.0) * codes.numel()):
            break
    else:
        kind = INT32
    limit = (INT8 if kind == INT6 else kind) / 32 if sparse else _SPARSE
    return NONE if indexed and largest <= 32767 and nonzeros < limit * codes.numel() else kind


def store(codes: Tensor, kind: int) -> dict[str, Tensor]:
    """Return the arrays of integer codes (m, n) in a storage that :func:`kind_for` gave: see :class:`Integers`."""
    m, n = codes.shape
    arrays = {}
    if kind != NONE:
        bound = min(_RANGES.get(kind, 2**31 - 1), torch.iinfo(codes.dtype).max)
        width = (n + 1) // 2 if kind == INT4 else n
        dtype = _DTYPES[kind]
        arrays["codes"] = codes.new_zeros(m * width + SLACK // dtype.itemsize, dtype=dtype)
    outside = []
    rows = max(1, _BLOCK // max(n, 1))
    for at in range(0, max(m, 1), rows):  # some at a time: what is in between takes no memory to speak of
        excess = part = codes[at : at + rows]
        if kind != NONE:
            inside = part.clamp(-bound, bound)
            excess = part - inside
            kept = _two_a_byte(inside) if kind == INT4 else inside
            arrays["codes"][at * width : (at + len(part)) * width] = kept.reshape(-1)
        row, column = torch.nonzero(excess, as_tuple=True)
        counts = torch.bincount(row, minlength=len(part))
        outside.append((counts, column.to(torch.int32), excess[row, column].to(torch.int16)))
    counts, columns, values = (torch.cat(parts) for parts in zip(*outside, strict=True))
    if kind == NONE or len(columns):
        arrays["starts"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        arrays["columns"], arrays["values"] = columns.to(torch.uint16), values
    return arrays


def _two_a_byte(codes: Tensor) -> Tensor:
    """Return int8 (m, ceil(n / 2)): the first half of the columns low, the other high."""
    half = (codes.shape[1] + 1) // 2
    high = codes.new_zeros(len(codes), half, dtype=torch.int8)
    high[:, : codes.shape[1] - half] = codes[:, half:]
    return high.mul_(16).add_(codes[:, :half])


def check_ids(ids: Tensor, count: int) -> None:
    """Raise IndexError unless all ``ids`` are in [0, count)."""
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < count):
        raise IndexError(f"index out of range: {int(ids.min())}..{int(ids.max())} of {count} rows")


def many_in_bfloat16(x: Tensor) -> bool:
    """Whether an input (..., n) has so many rows in bfloat16 that they are multiplied in bfloat16."""
    return x.dtype == torch.bfloat16 and _BFLOAT16_ROWS is not None and x.numel() >= _BFLOAT16_ROWS * x.shape[-1]


class Integers:
    """The matrix.

    Attributes:
        shape: (m, n).
        kind: storage of the dense part.
        arrays: ``codes``, of the kind's dtype, (m . n, or bytes of two codes for 4 bits: m . ceil(n / 2), the column k
            low and the column k + ceil(n / 2) high), with SLACK bytes behind it; and where there is a remainder
            ``starts`` int32 (m + 1), ``columns`` uint16 and ``values`` int16.
        steps: float32 (n,).
        rows: float32 (m,).
        scattered: whether so few codes are not zero that :meth:`add` is the way to multiply.
    """

    # One object and no dictionary: at batch 1 the caches hold other things, and each line of memory is waited for.
    __slots__ = (
        "_address",
        "_descriptor",
        "_kernels",
        "arrays",
        "device",
        "kind",
        "rows",
        "scattered",
        "shape",
        "steps",
    )

    def __init__(
        self, shape: tuple[int, int], kind: int, arrays: dict[str, Tensor], steps: Tensor, rows: Tensor
    ) -> None:
        self.shape, self.kind, self.arrays = shape, kind, arrays
        self.steps = steps.float().expand(shape[1]).contiguous()
        self.rows = rows.float().expand(shape[0]).contiguous()
        self.device = self.rows.device
        compiled = HAVE_NUMBA and self.device.type == "cpu" and kind != INT32 and shape[0] > 0 and shape[1] > 0
        self._kernels: Kernels | None = kernels() if compiled else None
        if self._kernels is not None:
            at = [arrays[name].data_ptr() if name in arrays else 0 for name in ("starts", "columns", "values")]
            first = arrays["codes"].data_ptr() if "codes" in arrays else 0
            forked = [self._kernels.gomp, self._kernels.rank, self._kernels.worker]
            fields = [first, kind, *shape, self.steps.data_ptr(), self.rows.data_ptr(), *at, *forked]
            self._descriptor = np.array(fields, np.int64)
            self._address = self._descriptor.ctypes.data
        self.scattered = compiled and kind == NONE and len(arrays["values"]) <= shape[0]

    def codes(self) -> Tensor:
        """Return Z, (m, n), in the narrowest dtype that holds it."""
        m, n = self.shape
        codes = self._dense_part(slice(None))
        if "starts" in self.arrays:
            codes = codes.to(torch.int16)
            counts = self.arrays["starts"].diff().long()
            row = torch.repeat_interleave(torch.arange(m, device=self.device), counts)
            codes[row, self.arrays["columns"].long()] += self.arrays["values"]
            low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
            codes = codes.to(torch.int8) if low >= -128 and high <= 127 else codes
        return codes

    def _dense_part(self, ids: Tensor | slice) -> Tensor:
        n = self.shape[1]
        if self.kind == NONE:
            count = self.rows[ids].numel()
            return torch.zeros(count, n, dtype=torch.int8, device=self.device)
        width = (n + 1) // 2 if self.kind == INT4 else n
        stored = self.arrays["codes"][: self.shape[0] * width].view(self.shape[0], width)[ids]
        if self.kind != INT4:
            return stored
        low = ((stored & 15) ^ 8) - 8
        high = torch.bitwise_right_shift(stored - low, 4)
        return torch.cat([low, high[:, : n - width]], 1)

    def quick(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return what :meth:`multiply` does where that takes a kernel or two; None for whatever else it is given.

        What x and bias are is checked here: this is all that there is between a module and a kernel.
        """
        compiled, (m, n), shape = self._kernels, self.shape, x.shape
        dtype, size = _COMPILED.get(x.dtype), x.numel()
        if compiled is None or dtype is None or shape[-1] != n or not size or not (x.is_cpu and x.is_contiguous()):
            return None
        if bias is not None and not (bias.is_cpu and bias.dtype == torch.float32 and bias.is_contiguous()):
            return None
        if size >= LANES * n:
            return self._many(compiled, x, bias, dtype)
        at = 0 if bias is None else bias.data_ptr()
        y = x.new_empty(*shape[:-1], m)  # sizes one by one: twice as soon as in a tuple
        compiled.multiply(self._address, x.data_ptr(), y.data_ptr(), at, size // n, dtype, torch.get_num_threads())
        return y

    def _many(self, compiled: Kernels, x: Tensor, bias: Tensor | None, dtype: int) -> Tensor:
        if dtype == BFLOAT16 and many_in_bfloat16(x):
            if not PAIRS:
                return self._in_bfloat16(compiled, x, bias)
            dtype = PAIRED
        m, n = self.shape
        y, batch = x.new_empty(*x.shape[:-1], m), x.numel() // n
        at = 0 if bias is None else bias.data_ptr()
        given, result, threads = x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        few = few_of(batch)
        many = batch - few
        most = self._address, given, result, at, many, dtype, threads
        if needed := compiled.multiply_many(*most, _scratch.room.data_ptr(), _scratch.room.numel()):
            compiled.multiply_many(*most, _scratch.of(needed).data_ptr(), needed)
        if few:
            given, result = given + many * n * x.itemsize, result + many * m * x.itemsize
            compiled.multiply(self._address, given, result, at, few, dtype, threads)
        return y

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Return x . W^T + bias, x (..., n) to (..., m), without decoding W; None where that is not the way.

        Args:
            x: contiguous, of n columns.
            bias: float32 (m,), contiguous.
        """
        if x.dtype != torch.float16:
            return self.quick(x, bias)
        y = self.quick(x.float(), bias)
        return None if y is None else y.to(x.dtype)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add x . W^T to y, where the matrix is :attr:`scattered`: each output is touched that has a nonzero, no other.

        Args:
            x: float32 (..., n), contiguous.
            y: float32 or bfloat16 (..., m), contiguous; changed in place.
        """
        assert self._kernels is not None and self.scattered
        batch, dtype = x.numel() // self.shape[1], _COMPILED[y.dtype]
        self._kernels.add(self._address, x.data_ptr(), y.data_ptr(), batch, dtype, torch.get_num_threads())

    def _in_bfloat16(self, compiled: Kernels, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return what :meth:`multiply` does, by torch: (x . diag(steps)) . (diag(rows) . Z)^T, each factor in bfloat16.

        Codes of 4 bits times their row's factor are but 15 numbers, which can be looked up; the entries of decoded
        rows, times the steps as well, must each be computed.
        """
        m, n = self.shape
        threads = torch.get_num_threads()
        batch = x.numel() // n
        scaled = x.new_empty(batch, n)

        def rounded(first: int, last: int) -> Tensor:
            size = (last - first) * n  # in use until the tile's product is there
            rows = _scratch.of(2 * size)[: 2 * size].view(torch.bfloat16).view(last - first, n)
            inputs = batch if first == 0 else 0  # with the first tile
            at = self._address, x.data_ptr(), inputs, scaled.data_ptr()
            compiled.round(*at, first, last - first, rows.data_ptr(), threads)
            return rows

        return in_tiles(self.shape, rounded, scaled, bias).view(*x.shape[:-1], m)

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the rows first..last of W, (last - first, n)."""
        if self._kernels is not None and dtype in _COMPILED:
            return self._decode(0, first, last - first, dtype)
        return self._torch_rows(torch.arange(first, last, device=self.device), dtype)

    def all(self) -> Tensor:
        """Return W, (m, n), in float32."""
        return self.decode(0, self.shape[0], torch.float32)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of W with the int64 indices ``ids`` (1-D), as (len(ids), n).

        Raises:
            IndexError: an index is out of range.
        """
        check_ids(ids, self.shape[0])
        if self._kernels is not None and dtype in _COMPILED:
            ids = ids.contiguous()
            return self._decode(ids.data_ptr(), 0, ids.numel(), dtype)
        return self._torch_rows(ids, dtype)

    def _torch_rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        codes = self._dense_part(ids).float()
        if "starts" in self.arrays:
            starts = self.arrays["starts"].long()
            first, counts = starts[ids], starts[ids + 1] - starts[ids]
            row = torch.repeat_interleave(counts)
            entry = first[row] + torch.arange(row.numel(), device=self.device) - (counts.cumsum(0) - counts)[row]
            codes[row, self.arrays["columns"].long()[entry]] += self.arrays["values"][entry].float()
        return (codes * self.steps * self.rows[ids, None]).to(dtype)

    def _decode(self, ids: int, first: int, count: int, dtype: torch.dtype) -> Tensor:
        compiled = self._kernels
        assert compiled is not None
        rows = torch.empty((count, self.shape[1]), dtype=dtype)
        compiled.decode(self._address, ids, first, count, rows.data_ptr(), _COMPILED[dtype], torch.get_num_threads())
        return rows


def _tile_rows(n: int) -> int:
    return max(_TILE // max(n, 1) // _TILE_ROWS, 1) * _TILE_ROWS


def in_tiles(
    shape: tuple[int, int], decode: Callable[[int, int], Tensor], x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return x . W^T + bias for W (m, n) that ``decode(first, last)`` gives row by row, some rows at a time."""
    m, n = shape
    step = _tile_rows(n)
    if m <= step:
        whole = decode(0, m)
        return torch.mm(x, whole.T) if bias is None else torch.addmm(bias.to(x.dtype), x, whole.T)
    y = x.new_empty((x.shape[0], m))
    for first in range(0, m, step):
        last = min(first + step, m)
        part = y[:, first:last]
        if bias is None:
            torch.mm(x, decode(first, last).T, out=part)
        else:
            torch.addmm(bias[first:last].to(x.dtype), x, decode(first, last).T, out=part)
    return y


def transposed_in_tiles(shape: tuple[int, int], decode: Callable[[int, int], Tensor], y: Tensor) -> Tensor:
    """Return y . W, (batch, m) to (batch, n), for W as in :func:`in_tiles`; sums of tiles are taken in float32."""
    m, n = shape
    step = _tile_rows(n)
    x = torch.zeros((y.shape[0], n), dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    for first in range(0, m, step):
        last = min(first + step, m)
        x += torch.mm(y[:, first:last], decode(first, last))
    return x.to(y.dtype)
