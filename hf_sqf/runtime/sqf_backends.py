"""Where a weight's bytes are kept and how they run: ``runtime=``.

==========  ============================================  ==================================================
runtime     in memory                                     a product
==========  ============================================  ==================================================
``int4``    4 bits a code where nearly all fit, else 8    multiplies the codes
``int8``    8 bits a code, 16 where they do not fit       the same
``stream``  the bytes of the file                         decodes the layer for each call
``dense``   the bytes of the file and the dense weight    an ordinary one
``auto``    ``int4`` where kernels are compiled for the device, else ``dense``
==========  ============================================  ==================================================

Codes of two-factor structures, and indices of codebooks, take the room that theirs take. Where another device's
kernels for codes would go: in :class:`~.sqf_integers.Integers`, beside the compiled ones.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .sqf_codec import chunk_rows
from .sqf_container import Record, pack, records, weight_name
from .sqf_factors import Factors
from .sqf_jit import HAVE_NUMBA
from .sqf_memory import trim
from .sqf_resident import is_resident, lay_out, resident_backend, resident_factors, resident_matrices, resident_name
from .sqf_running import Dense, Running

_RESIDENT = ("int8", "int4")
_LARGE = 1 << 24
"""Entries of a weight whose decoding takes memory that the C library would keep."""


def choose(runtime: str, device: torch.device) -> str:
    """Return the runtime that ``auto`` stands for on a device, and any other as it is."""
    if runtime != "auto":
        return runtime
    return "int4" if HAVE_NUMBA and device.type == "cpu" else "dense"


def keeps_bytes(data: Tensor, runtime: str) -> bool:
    """Whether a weight's bytes are what it keeps under a runtime, so that :func:`bytes_for` has nothing to make."""
    runtime = choose(runtime, data.device)
    if runtime not in _RESIDENT:
        return not is_resident(data)
    return is_resident(data) and resident_backend(data)[0] == runtime


def factors_in(data: Tensor, name: str = "weight") -> list[Factors]:
    """Return the factors in packed or resident bytes, on the device of the bytes.

    Raises:
        ValueError: the bytes are damaged; names the tensor.
    """
    matrices = resident_factors(data) if is_resident(data) else [r.factors() for r in records(data, name)]
    return [f.to(data.device) for f in matrices]


def name_in(data: Tensor, name: str = "weight") -> str:
    """Return the name that a weight was packed with, from packed or resident bytes.

    Raises:
        ValueError: the bytes are damaged; names the tensor.
    """
    return resident_name(data) if is_resident(data) else weight_name(data, name)


_packed_again: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed_bytes(data: Tensor) -> Tensor:
    """Return packed bytes as they are, and for resident ones those that they came from, bit for bit.

    Resident bytes are packed once for as long as somebody holds the result, so that tied weights are saved as one.
    """
    if not is_resident(data):
        return data
    known = _packed_again.get(data)
    packed = known[1]() if known is not None and known[0] == _state(data) else None
    if packed is None:
        matrices = [f.to("cpu") for f in resident_factors(data.detach())]
        packed = pack(matrices, resident_name(data.detach())).to(data.device)
        _packed_again[data] = _state(data), weakref.ref(packed)
    return packed


def bytes_for(data: Tensor, runtime: str, name: str = "weight") -> Tensor:
    """Return the bytes that a weight keeps under a runtime, made from packed or resident ones.

    Raises:
        ValueError: the bytes are damaged; names the tensor.
    """
    runtime = choose(runtime, data.device)
    if keeps_bytes(data, runtime):
        return data
    if runtime not in _RESIDENT:
        return packed_bytes(data)
    if is_resident(data):
        size = resident_backend(data)[1]
        matrices, weight = resident_factors(data), resident_name(data)
    else:
        found, size = records(data, name), data.numel()
        matrices, weight = [record.factors() for record in found], next((r.weight for r in found), "")
    return lay_out([f.to("cpu") for f in matrices], runtime, size, weight).to(data.device)


class Streamed(Running):
    """Decoded from its packed bytes for each call."""

    def __init__(self, record: Record, device: torch.device) -> None:
        self.record, self.shape, self.device = record, record.shape, device

    def _whole(self) -> Running:
        return resident_matrices(lay_out([self.record.factors()], "int8").to(self.device))[0]

    def decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`."""
        return self.record.rows(first, last).dense(dtype).to(self.device)

    def pick(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`Running`; decodes the chunks of rows that the ids lie in."""
        m, n = self.shape
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < m:
            raise IndexError(f"index out of range of {m} rows")
        picked = torch.empty((ids.numel(), n), dtype=dtype, device=self.device)
        size = chunk_rows(m, n)
        for chunk in torch.unique(ids // size).tolist():
            here = (ids // size == chunk).nonzero()[:, 0]
            factors = self.record.rows(chunk * size, min((chunk + 1) * size, m))
            picked[here] = factors.dense(dtype, rows=(ids[here] - chunk * size).cpu()).to(self.device)
        return picked

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`Running`."""
        return self._given_back(self._whole().multiply(x, bias))

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """See :class:`Running`."""
        return self._given_back(self._whole().multiply_transposed(y))

    def _given_back(self, product: Tensor) -> Tensor:
        """Return a product once the system has back what decoding a large weight took."""
        if self.shape[0] * self.shape[1] >= _LARGE:
            trim()
        return product


_prepared: WeakIdKeyDictionary = WeakIdKeyDictionary()
_by_address: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def _state(data: Tensor) -> tuple[int, int, int]:
    return data.data_ptr(), data.numel(), 0 if data.is_inference() else data._version


def matrices_in(data: Tensor, runtime: str, dtype: torch.dtype, name: str = "weight") -> list[Running]:
    """Return the matrices in packed or resident bytes in the form in which they run.

    They are prepared once for as long as the tensor lives and stays what it is. Modules with a common (tied)
    parameter share them, and so does another tensor with the same memory, as compiled programs pass on.

    Args:
        data: uint8, 1-D.
        runtime: what to do with packed bytes; resident ones run as they are.
        dtype: of the dense weight that the runtime ``dense`` keeps.
        name: for messages.

    Raises:
        ValueError: the bytes are damaged; names the tensor.
    """
    state = (*_state(data), runtime, dtype)
    known = _prepared.get(data)
    if known is not None and known[0] == state:
        return known[1]
    twin = _by_address.get(data.data_ptr())
    if twin is not None and twin is not data and _state(twin) == state[:3]:
        return matrices_in(twin, runtime, dtype, name)
    built = _prepare(data.detach(), choose(runtime, data.device), dtype, name)
    _prepared[data] = state, built
    _by_address[data.data_ptr()] = data
    return built


def _prepare(data: Tensor, runtime: str, dtype: torch.dtype, name: str) -> list[Running]:
    if is_resident(data):
        return resident_matrices(data)
    if runtime == "stream":
        return [Streamed(record, data.device) for record in records(data, name)]
    if runtime == "dense":
        return [Dense(f.dense(dtype)) for f in factors_in(data, name)]
    return resident_matrices(bytes_for(data, runtime, name))
