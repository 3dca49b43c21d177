"""Factors <-> one self-describing uint8 tensor. The format is described field by field in FORMAT.md.

A weight is a list of records: one matrix, or one for each expert. A record holds the terms of its
:class:`~hf_sqf.runtime.sqf_factors.Factors`, and every array of integers in them is entropy-coded.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .sqf_bytes import Reader, Writer
from .sqf_codec import decode_integers, encode_integers, ideal_bits
from .sqf_factors import Factors, Term
from .sqf_indices import decode_indices, encode_indices

MAGIC = b"SQF"
VERSION = 1
"""The format that this package writes, and the newest it reads."""
_PREFIX = len(MAGIC) + 1 + 4  # magic, version, CRC
_STRUCTURES = ("", "grid", "svd", "sparse_pca", "vq", "pgd", "svd+grid")  # 0: the name follows
_ONE_HOT, _ATOMS, _ONE_STEP, _ONE_ROW, _TRELLIS, _COL_PRIOR, _ROW_PRIOR = (1 << i for i in range(7))
_WEIGHT_NAME = 2  # tag of a section
_SIZE = 1 << 40  # above any dimension
_PRIOR_SAMPLE = 64  # rows by which to judge whether a prior helps


@dataclass(frozen=True)
class TermHeader:
    """The fields of a term and where its arrays lie; ``sizes`` are their bytes."""

    flags: int
    scale: int
    step_resolution: int
    row_resolution: int
    trellis: int
    atom_count: int
    width: int
    codes: memoryview
    steps: memoryview
    rows: memoryview
    atoms: memoryview

    @property
    def one_hot(self) -> bool:
        """Whether the codes are indices."""
        return bool(self.flags & _ONE_HOT)

    def priors(self, rows: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return what the codes' models know of the scales: quarter octaves of the rows and of the columns."""
        return (
            _quarter_octaves(rows, self.row_resolution) if self.flags & _ROW_PRIOR else None,
            _quarter_octaves(steps, self.step_resolution) if self.flags & _COL_PRIOR else None,
        )


@dataclass(frozen=True)
class Record:
    """One matrix as it lies in the bytes, not decoded yet; ``weight`` is the name that it was packed with."""

    shape: tuple[int, int]
    structure: str
    terms: tuple[TermHeader, ...]
    size: int
    name: str = field(repr=False)
    weight: str = ""

    def factors(self, backend: str = "auto", device: torch.device | str = "cpu") -> Factors:
        """Decode the whole matrix, to the CPU.

        Raises:
            ValueError: the bytes are damaged; names the tensor.
        """
        return self.rows(0, self.shape[0], backend, device)

    def rows(self, first: int, last: int, backend: str = "auto", device: torch.device | str = "cpu") -> Factors:
        """Decode the rows ``first..last`` alone, of shape (last - first, n); reads whole chunks of rows.

        Args:
            first: first row.
            last: one after the last row.
            backend: implementation of decoding, one of :data:`hf_sqf.runtime.sqf_decoders.BACKENDS`.
            device: where the torch backend works.

        Raises:
            ValueError: the bytes are damaged, or have no such rows; names the tensor.
        """
        if not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"{self.name}: rows {first}..{last} are not among {self.shape[0]}")
        try:
            terms = tuple(_decode_term(t, self.shape, slice(first, last), backend, device) for t in self.terms)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return Factors((last - first, self.shape[1]), self.structure, terms)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _quarter_octaves(scale: np.ndarray, resolution: int) -> np.ndarray:
    """Round integers on a logarithmic scale to quarter octaves."""
    return (8 * scale.astype(np.int64) + resolution) // (2 * resolution)


# ---------------------------------------------------------------------------------------------- writing


def pack(factors: Sequence[Factors], weight: str = "") -> Tensor:
    """Return the bytes of one weight (one matrix, or one per expert) as a 1-D uint8 tensor.

    The same factors give the same bytes, on any number of threads.

    Args:
        factors: of each matrix.
        weight: the weight's full name in its model, written down so that tensors that were swapped are found out.
    """
    out = Writer()
    records = [_encode_record(f) for f in factors]
    out.unsigned(len(records))
    for record in records:
        out.unsigned(len(record))
    for record in records:
        out.raw(record)
    if weight:
        out.unsigned(_WEIGHT_NAME)
        out.block(weight.encode())
    body = bytes(out)
    data = MAGIC + bytes((VERSION,)) + zlib.crc32(body).to_bytes(4, "little") + body
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _encode_record(factors: Factors) -> bytes:
    out = Writer()
    known = _STRUCTURES.index(factors.structure) if factors.structure in _STRUCTURES else 0
    out.unsigned(known)
    if not known:
        out.block(factors.structure.encode("ascii"))
    for size in factors.shape:
        out.unsigned(size)
    out.unsigned(len(factors.terms))
    for term in factors.terms:
        _encode_term(out, term)
    return bytes(out)


def _encode_term(out: Writer, term: Term) -> None:
    steps, rows, codes = _numpy(term.steps), _numpy(term.rows), _numpy(term.codes)
    row_prior = _quarter_octaves(rows, term.row_resolution)
    col_prior = _quarter_octaves(steps, term.step_resolution)
    flags = _ONE_HOT * term.one_hot | _ATOMS * (term.atoms is not None) | _TRELLIS * (term.trellis > 0)
    flags |= _ONE_STEP * (len(steps) == 1) | _ONE_ROW * (len(rows) == 1)
    if not term.one_hot:
        flags |= _useful_priors(codes, row_prior, col_prior, term.trellis)
    out.byte(flags)
    out.signed(term.scale)
    out.unsigned(term.step_resolution)
    out.unsigned(term.row_resolution)
    if term.trellis:
        out.unsigned(term.trellis)
    out.unsigned(term.atom_count)
    if term.atoms is not None:
        out.unsigned(term.width)
    out.block(encode_integers(steps[None]))
    out.block(encode_integers(rows[None]))
    if term.one_hot:
        out.block(encode_indices(codes, term.atom_count))
    else:
        priors = row_prior if flags & _ROW_PRIOR else None, col_prior if flags & _COL_PRIOR else None
        out.block(encode_integers(codes, *priors, trellis=term.trellis))
    if term.atoms is not None:
        out.block(encode_integers(_numpy(term.atoms)))


def _useful_priors(codes: np.ndarray, row_prior: np.ndarray, col_prior: np.ndarray, trellis: int) -> int:
    """Return the flags of the priors that make a sample of the codes cheaper."""
    m = len(codes)
    if not codes.size:
        return 0
    # Paths can be followed from the top alone; other rows may be picked from all over.
    some = np.arange(min(m, _PRIOR_SAMPLE)) if trellis else np.arange(0, m, max(1, m // _PRIOR_SAMPLE))
    choices = {0}
    for flag, prior in ((_ROW_PRIOR, row_prior), (_COL_PRIOR, col_prior)):
        if len(prior) > 1 and (prior != prior[0]).any():
            choices |= {c | flag for c in choices}
    if len(choices) == 1:
        return 0
    sample = codes[some]
    picked = row_prior if len(row_prior) == 1 else row_prior[some]

    def bits(flags: int) -> float:
        return ideal_bits(
            sample, picked if flags & _ROW_PRIOR else None, col_prior if flags & _COL_PRIOR else None, trellis, rows=m
        )

    return min(sorted(choices), key=bits)


# ---------------------------------------------------------------------------------------------- reading


def records(
    data: Tensor | bytes | memoryview, name: str = "weight", expected_shape: tuple[int, int] | None = None
) -> list[Record]:
    """Read the headers of what :func:`pack` made; decodes nothing and allocates nothing large.

    Args:
        data: uint8, 1-D.
        name: the tensor's name, for messages.
        expected_shape: the shape that every matrix must have, where it is known.

    Raises:
        ValueError: not such bytes, damaged, newer than this version, or of another shape; names the tensor.
    """
    try:
        return _read(_view(data), name, expected_shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def weight_name(data: Tensor | bytes | memoryview, name: str = "weight") -> str:
    """Return the full name that a weight had when :func:`pack` was told it; else "".

    Raises:
        ValueError: not such bytes, damaged, or newer than this version; names the tensor.
    """
    return next((record.weight for record in records(data, name)), "")


def unpack(
    data: Tensor | bytes | memoryview,
    name: str = "weight",
    expected_shape: tuple[int, int] | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> list[Factors]:
    """Return what :func:`pack` was given. See :func:`records` and :meth:`Record.factors`."""
    return [record.factors(backend, device) for record in records(data, name, expected_shape)]


def _view(data: Tensor | bytes | memoryview) -> memoryview:
    if not isinstance(data, Tensor):
        return memoryview(data)
    if data.dtype != torch.uint8 or data.ndim != 1:
        raise ValueError(f"expected a 1-D uint8 tensor, not {data.dtype} of shape {tuple(data.shape)}")
    return np.ascontiguousarray(_numpy(data)).data


def _read(data: memoryview, name: str, expected_shape: tuple[int, int] | None) -> list[Record]:
    if len(data) < _PREFIX or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ValueError("this is not a compressed weight")
    if data[len(MAGIC)] > VERSION:
        raise ValueError(
            f"the weight has format version {data[len(MAGIC)]}, newer than the {VERSION} that this version of hf_sqf "
            "reads: update hf_sqf"
        )
    if data[len(MAGIC)] < 1 or zlib.crc32(data[_PREFIX:]) != int.from_bytes(data[len(MAGIC) + 1 : _PREFIX], "little"):
        raise ValueError("the weight is damaged (its checksum does not match)")
    reader = Reader(data[_PREFIX:])
    count = reader.unsigned()
    if count > reader.left:
        raise ValueError(f"{reader.left} bytes cannot hold {count} matrices")
    sizes = [reader.unsigned() for _ in range(count)]
    found = [_read_record(reader.raw(size), name) for size in sizes]
    weight = ""
    while reader.left:  # sections, to which later versions may add: odd tags must be understood, even ones need not
        tag, section = reader.unsigned(), reader.block()
        if tag == _WEIGHT_NAME:
            weight = str(section, "utf-8")
        elif tag % 2:
            raise ValueError(f"the weight needs feature {tag}, which this version of hf_sqf does not know: update it")
    for record in found:
        if expected_shape is not None and record.shape != tuple(expected_shape):
            raise ValueError(f"the weight has shape {record.shape}, but the model expects {tuple(expected_shape)}")
    return [replace(record, weight=weight) for record in found] if weight else found


def _read_record(data: memoryview, name: str) -> Record:
    reader = Reader(data)
    known = reader.unsigned(len(_STRUCTURES) - 1)
    structure = _STRUCTURES[known] if known else str(bytes(reader.block()), "ascii")
    shape = reader.unsigned(_SIZE), reader.unsigned(_SIZE)
    count = reader.unsigned(255)
    terms = tuple(_read_term(reader) for _ in range(count))
    reader.end()
    if not terms:
        raise ValueError("a matrix without terms")
    for term in terms:
        if not term.flags & _ATOMS and (term.atom_count != shape[1] or term.one_hot):
            raise ValueError(f"a grid of {term.atom_count} columns for a matrix of {shape[1]}")
    return Record(shape, structure, terms, len(data), name)


def _read_term(reader: Reader) -> TermHeader:
    flags = reader.byte()
    if flags > 127:
        raise ValueError("a term uses a feature that this version does not know")
    scale, step_resolution, row_resolution = reader.signed(), reader.unsigned(1 << 16), reader.unsigned(1 << 16)
    if not step_resolution or not row_resolution:
        raise ValueError("a resolution of 0")
    trellis = reader.unsigned(1 << 16) if flags & _TRELLIS else 0
    atom_count = reader.unsigned(_SIZE)
    width = reader.unsigned(_SIZE) if flags & _ATOMS else atom_count
    if flags & _ATOMS and (width == 0 or atom_count == 0):
        raise ValueError("a dictionary without atoms")
    steps, rows, codes = reader.block(), reader.block(), reader.block()
    atoms = reader.block() if flags & _ATOMS else memoryview(b"")
    return TermHeader(
        flags, scale, step_resolution, row_resolution, trellis, atom_count, width, codes, steps, rows, atoms
    )


def _decode_term(
    head: TermHeader, shape: tuple[int, int], select: slice, backend: str, device: torch.device | str
) -> Term:
    blocks = math.ceil(shape[1] / head.width) if shape[1] else 0
    lines = shape[0] * blocks if head.flags & _ATOMS else shape[0]
    per_row = blocks if head.flags & _ATOMS else 1
    chosen = slice(select.start * per_row, select.stop * per_row)
    steps = decode_integers(head.steps, (1, 1 if head.flags & _ONE_STEP else head.atom_count))[0].astype(np.int32)
    rows = decode_integers(head.rows, (1, 1 if head.flags & _ONE_ROW else lines))[0].astype(np.int32)
    if head.one_hot:
        codes = decode_indices(head.codes, lines, head.atom_count, backend, chosen, device)
    else:
        codes = decode_integers(
            head.codes,
            (lines, head.atom_count),
            *head.priors(rows, steps),
            head.trellis,
            backend,
            chosen,
            device,
        )
    atoms = None
    if head.flags & _ATOMS:
        atoms = torch.from_numpy(decode_integers(head.atoms, (head.atom_count, head.width), backend=backend))
    return Term(
        torch.from_numpy(codes),
        head.scale,
        torch.from_numpy(steps),
        torch.from_numpy(rows if head.flags & _ONE_ROW else rows[chosen].copy()),
        atoms,
        head.step_resolution,
        head.row_resolution,
        head.one_hot,
        head.trellis,
    )
