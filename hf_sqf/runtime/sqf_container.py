"""Factors <-> one self-describing uint8 tensor. PLACEHOLDER until the codec lands."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from .sqf_factors import Factors, Term


def pack(factors: list[Factors]) -> Tensor:
    """Return the bytes of one weight (one matrix, or one per expert) as a 1-D uint8 tensor."""
    meta, blobs = [], []
    for f in factors:
        terms = []
        for t in f.terms:
            arrays = {}
            for name in ("codes", "steps", "rows", "atoms"):
                a = getattr(t, name)
                if a is not None:
                    a = a.cpu().numpy()
                    raw = zlib.compress(np.ascontiguousarray(a).tobytes(), 1)
                    arrays[name] = [a.dtype.str, list(a.shape), len(raw)]
                    blobs.append(raw)
            terms.append([arrays, t.scale, t.step_resolution, t.row_resolution, t.one_hot, t.trellis])
        meta.append([list(f.shape), f.structure, terms])
    head = json.dumps(meta).encode()
    return torch.frombuffer(bytearray(struct.pack("<I", len(head)) + head + b"".join(blobs)), dtype=torch.uint8)


def unpack(data: Tensor, name: str = "weight") -> list[Factors]:
    """Return what :func:`pack` was given. ``name`` is the tensor's, for error messages."""
    raw = data.cpu().numpy().tobytes()
    (size,) = struct.unpack("<I", raw[:4])
    at, out = 4 + size, []
    for shape, structure, terms in json.loads(raw[4:at]):
        built = []
        for arrays, scale, sr, rr, one_hot, trellis in terms:
            got = {}
            for key, (dtype, dims, count) in arrays.items():
                got[key] = torch.from_numpy(
                    np.frombuffer(zlib.decompress(raw[at : at + count]), dtype).reshape(dims).copy()
                )
                at += count
            built.append(Term(got["codes"], scale, got["steps"], got["rows"], got.get("atoms"), sr, rr, one_hot, trellis))
        out.append(Factors(tuple(shape), structure, tuple(built)))
    return out
