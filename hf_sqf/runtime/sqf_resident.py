"""Factors laid out to run: one uint8 tensor that needs no decoding, as the packed one needs no room.

A module holds one uint8 tensor in either case. Packed (:mod:`sqf_container`), a weight is as small as it is on disk;
resident, its codes lie in 4 or 8 bits a weight, as :mod:`sqf_running` multiplies them. Both hold the same integers,
and packing is deterministic: from resident bytes the packed ones come back as they were.

Resident bytes stay in memory (or travel between processes of one machine); they are no file format and have no version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sqf_factors import Factors, Term
from .sqf_integers import Integers, kind_for, store
from .sqf_running import Grid, OneHot, Running, Sum, TwoFactor
from .sqf_vectors import INT4, INT6

MAGIC = b"SQF-resident\0\0\0\0"
_ALIGNED = 64
_BACKENDS = {"int4": INT4, "int8": INT6}
_DTYPES = {str(d): d for d in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)}


def is_resident(data: Tensor) -> bool:
    """Whether bytes are resident rather than packed."""
    size = len(MAGIC)
    return data.numel() >= size and not data.is_meta and bytes(data[:size].cpu().numpy()) == MAGIC


def lay_out(matrices: Sequence[Factors], backend: str, packed_size: int = 0, weight: str = "") -> Tensor:
    """Return the resident bytes of a weight: one matrix, or one per expert.

    Args:
        matrices: with their codes on the CPU.
        backend: ``"int4"`` (two codes a byte where nearly all of them fit, else a byte each) or ``"int8"``.
        packed_size: bytes that the weight takes when packed, to remember.
        weight: the name that was packed with it, to remember.
    """
    arrays: list[Tensor] = []
    records = [_record(f, _BACKENDS[backend], arrays) for f in matrices]
    header = json.dumps(
        {"backend": backend, "packed_size": packed_size, "weight": weight, "matrices": records}
    ).encode()
    start = _rounded(len(MAGIC) + 8 + len(header))
    ends, size = [], start
    for array in arrays:
        ends.append(size)
        size = _rounded(size + array.numel() * array.element_size())
    data = torch.zeros(size, dtype=torch.uint8)
    prefix = MAGIC + len(header).to_bytes(8, "little") + header
    data[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
    for at, array in zip(ends, arrays, strict=True):
        raw = array.contiguous().view(torch.uint8).reshape(-1)
        data[at : at + raw.numel()] = raw
    return data


def _rounded(size: int) -> int:
    return (size + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def _record(factors: Factors, smallest: int, arrays: list[Tensor]) -> dict[str, Any]:
    m, n = factors.shape

    def keep(array: Tensor) -> list[Any]:
        arrays.append(array)
        return [str(array.dtype), array.numel()]

    terms = []
    for t in factors.terms:
        blocks = math.ceil(n / t.width) if n else 0
        record: dict[str, Any] = {
            "scale": t.scale,
            "resolutions": [t.step_resolution, t.row_resolution],
            "trellis": t.trellis,
            "steps": keep(_narrow(t.steps)),
            "rows": keep(_narrow(t.rows)),
        }
        if t.one_hot:
            record["indices"] = keep(_unsigned(t.codes))
        else:
            # Where a row's blocks share their factor, they are columns of one row: (m, blocks . K).
            joined = t.atoms is not None and t.rows.numel() in (1, m) and (blocks == 1 or t.rows.numel() == 1)
            codes = t.codes.reshape(m, blocks * t.atom_count) if joined else t.codes
            kind = kind_for(codes, smallest, codes.shape[1], sparse=codes.numel() > m * n)
            stored = {k: keep(v) for k, v in store(codes, kind).items()}
            record["codes"] = [list(codes.shape), kind, stored]
        if t.atoms is not None:
            kind = kind_for(t.atoms, INT6, t.atoms.shape[1])
            record["atoms"] = [list(t.atoms.shape), kind, {k: keep(v) for k, v in store(t.atoms, kind).items()}]
        terms.append(record)
    return {"shape": [m, n], "structure": factors.structure, "terms": terms}


def _narrow(scale: Tensor) -> Tensor:
    fits = not scale.numel() or (int(scale.min()) >= -32768 and int(scale.max()) <= 32767)
    return scale.to(torch.int16) if fits else scale


def _unsigned(indices: Tensor) -> Tensor:
    largest = int(indices.max()) if indices.numel() else 0
    return indices.to(torch.uint8 if largest < 256 else torch.uint16 if largest < 65536 else torch.int64)


class _Reader:
    """Hands out the arrays in the order in which they were laid out."""

    def __init__(self, data: Tensor) -> None:
        start = len(MAGIC) + 8
        length = int.from_bytes(bytes(data[len(MAGIC) : start].cpu().numpy()), "little")
        self.header = json.loads(bytes(data[start : start + length].cpu().numpy()))
        self.data, self.at = data, _rounded(start + length)

    def take(self, name: str, count: int) -> Tensor:
        dtype = _DTYPES[name]
        size = count * dtype.itemsize
        array = self.data[self.at : self.at + size].view(dtype)
        if array.numel() != count:
            raise ValueError("resident factors are cut short")
        self.at = _rounded(self.at + size)
        return array

    def integers(self, stored: list[Any], steps: Tensor, rows: Tensor) -> Integers:
        shape, kind, arrays = stored
        return Integers((shape[0], shape[1]), kind, {k: self.take(*v) for k, v in arrays.items()}, steps, rows)


def resident_backend(data: Tensor) -> tuple[str, int]:
    """Return the backend that bytes were laid out for, and their size when packed."""
    header = _Reader(data).header
    return header["backend"], header["packed_size"]


def resident_name(data: Tensor) -> str:
    """Return the name that was packed with a weight."""
    return str(_Reader(data).header["weight"])


def resident_factors(data: Tensor) -> list[Factors]:
    """Return what :func:`lay_out` was given."""
    reader = _Reader(data)
    matrices = []
    for record in reader.header["matrices"]:
        terms = []
        for t in record["terms"]:
            steps, rows = reader.take(*t["steps"]).to(torch.int32), reader.take(*t["rows"]).to(torch.int32)
            one = torch.ones(1, device=data.device)
            atoms = None
            if "indices" in t:
                codes = reader.take(*t["indices"])
                codes = codes if codes.dtype == torch.uint8 else codes.to(torch.int64)
            else:
                codes = reader.integers(t["codes"], one, one).codes()
            if "atoms" in t:
                atoms = reader.integers(t["atoms"], one, one).codes()
                codes = codes if "indices" in t else codes.reshape(-1, atoms.shape[0])
            by_step, by_row = t["resolutions"]
            terms.append(Term(codes, t["scale"], steps, rows, atoms, by_step, by_row, "indices" in t, t["trellis"]))
        shape = record["shape"]
        matrices.append(Factors((shape[0], shape[1]), record["structure"], tuple(terms)))
    return matrices


def resident_matrices(data: Tensor) -> list[Running]:
    """Return the matrices of a weight, ready to be multiplied; they read from ``data``, which they keep."""
    reader = _Reader(data)
    return [_running(record, reader) for record in reader.header["matrices"]]


def _running(record: dict[str, Any], reader: _Reader) -> Running:
    shape = (record["shape"][0], record["shape"][1])
    parts = [_part(t, shape, reader) for t in record["terms"]]
    return parts[0] if len(parts) == 1 else Sum(parts)


def _part(t: dict[str, Any], shape: tuple[int, int], reader: _Reader) -> Running:
    steps, rows = reader.take(*t["steps"]).to(torch.int32), reader.take(*t["rows"]).to(torch.int32)
    scales = Term(steps, t["scale"], steps, rows, None, *t["resolutions"])  # its codes are not looked at
    one = torch.ones(1, device=steps.device)
    row_values = scales.row_values()
    if "indices" in t:
        indices = reader.take(*t["indices"])
        return OneHot(shape, indices, reader.integers(t["atoms"], one, scales.step_values()).all(), row_values)
    if "atoms" not in t:
        return Grid(reader.integers(t["codes"], scales.step_values(), row_values))
    codes = reader.integers(t["codes"], one, row_values)
    return TwoFactor(shape, codes, reader.integers(t["atoms"], one, scales.step_values()))
