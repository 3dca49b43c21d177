"""Sequences of indices <-> bytes: the codes of one-hot rows, drawn from K atoms.

An index is split into a symbol of at most 8 bits and a plane of plain low bits. The symbols' probabilities are
either equal or come from a table of eighths of an octave, whichever takes fewer bytes.
"""

from __future__ import annotations

import numpy as np
import torch

from .sqf_bytes import Reader, Writer, pack_bits, packed_size, unpack_bits
from .sqf_codec import decode_integers, encode_integers
from .sqf_decoders import decode
from .sqf_jit import HAVE_NUMBA
from .sqf_models import SYMBOLS, TOTAL
from .sqf_rans import Contexts, encode
from .sqf_streams import SYMBOLS_PER_BYTE, lanes_for, read_sizes, read_stream, write_sizes, write_stream
from .sqf_symbols import CHUNK

_FLAT, _TABLE = 0, 1
_EQUAL_LIMIT = 1 << 24  # the most indices into a dictionary of one atom
_UNUSED = 127  # the table's entry of an index that does not occur; others are below
_RARE = 96  # a level that beside 0 has two slots
_EIGHTHS = tuple(float(x) for x in (
    1.0, 0.9170040432046712, 0.8408964152537145, 0.7711054127039704,
    0.7071067811865476, 0.6484197773255048, 0.5946035575013605, 0.5452538663326288,
))  # 2^(-i / 8)  # fmt: skip


def _frequencies(levels: np.ndarray) -> np.ndarray:
    """Return int32 (K,), summing up to 4096: every used symbol has 1 and its share of the rest."""
    used = levels < _UNUSED
    weight = np.where(used, np.ldexp(np.array(_EIGHTHS)[levels % 8], -(levels // 8)), 0.0)
    shares = np.cumsum(weight)
    bounds = np.floor(shares / shares[-1] * (TOTAL - int(used.sum())) + 0.5).astype(np.int64)
    return (np.diff(bounds, prepend=0) + used).astype(np.int32)


def _levels(counts: np.ndarray) -> np.ndarray:
    """Return the table, int64 (K,), that suits these counts."""
    target = np.maximum(counts / counts.sum() * TOTAL - 1, 0.25)
    used = np.count_nonzero(counts)
    rarest = _UNUSED - 1 if used > 2 else _RARE  # so that nothing has more than the 4094 slots that readers expect
    levels = np.clip(np.rint(8 * np.log2(target.max() / target)), 0, rarest)
    levels = np.where(counts > 0, levels, _UNUSED).astype(np.int64)
    if used == 1:
        levels[int(counts[0] > 0)] = rarest
    return levels


def _contexts(frequencies: np.ndarray, count: int) -> Contexts:
    table = np.zeros((1, 1, SYMBOLS), np.int32)
    table[0, 0, : len(frequencies)] = frequencies
    return Contexts(np.zeros(1, np.int32), np.zeros(count, np.int32), table)


def _split(atoms: int) -> tuple[int, int]:
    """Return the number of low bits and the number of symbols for indices below ``atoms``."""
    shift = max(0, (atoms - 1).bit_length() - 8)
    return shift, (atoms - 1 >> shift) + 1


def encode_indices(indices: np.ndarray, atoms: int, compiled: bool = HAVE_NUMBA) -> bytes:
    """Return the bytes of indices (r,), each in 0..atoms - 1.

    Raises:
        ValueError: an index is out of range.
    """
    indices = np.asarray(indices)
    if indices.ndim != 1 or (len(indices) and (indices.min() < 0 or indices.max() >= atoms)):
        raise ValueError(f"indices must be 1-D and lie in 0..{atoms - 1}")
    out = Writer()
    if atoms == 1 or not len(indices):
        return b""
    shift, symbols = _split(atoms)
    high = (indices >> shift).astype(np.int64)
    counts = np.bincount(high, minlength=symbols)
    choices = []
    for kind, levels in ((_FLAT, np.zeros(symbols, np.int64)), (_TABLE, _levels(counts))):
        frequencies = _frequencies(levels)
        bits = float(counts @ (12 - np.log2(np.maximum(frequencies, 1))))
        table = encode_integers(np.diff(levels, prepend=0)[None], compiled=compiled) if kind == _TABLE else b""
        choices.append((bits + 8 * len(table), kind, frequencies, table))
    bits, kind, frequencies, table = min(choices, key=lambda c: c[0])
    out.byte(kind)
    if kind == _TABLE:
        out.block(table)
    streams, planes = [], []
    for first in range(0, len(indices), CHUNK):
        part = high[first : first + CHUNK]
        lanes = lanes_for(bits * len(part) / len(indices), len(part))
        contexts = _contexts(frequencies, len(part))
        streams.append(encode((part - 128).astype(np.int8), None, contexts, lanes, compiled))
        planes.append(pack_bits(indices[first : first + CHUNK] & (1 << shift) - 1, shift))
    for stream in streams:
        write_sizes(out, stream)
    for stream, plane in zip(streams, planes, strict=True):
        write_stream(out, stream)
        out.raw(plane)
    return bytes(out)


def decode_indices(
    data: bytes | memoryview,
    count: int,
    atoms: int,
    backend: str = "auto",
    rows: slice | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return the indices of :func:`encode_indices`: int16, or int32 where ``atoms`` asks for it.

    Args:
        data: exactly the bytes of one sequence.
        count: its length.
        atoms: number of atoms K.
        backend: implementation, one of :data:`hf_sqf.runtime.sqf_decoders.BACKENDS`.
        rows: decode only the chunks that hold this range of the indices, and return the range.
        device: where the torch backend works.

    Raises:
        ValueError: the bytes are damaged.
    """
    dtype = np.int16 if atoms <= 1 << 15 else np.int32
    start, stop = (0, count) if rows is None else (rows.start, rows.stop)
    reader = Reader(data)
    if atoms == 1 or count == 0:
        reader.end()
        if count > _EQUAL_LIMIT:
            raise ValueError(f"{count} equal indices")
        return np.zeros(stop - start, dtype)
    if atoms < 1 or count > reader.left * SYMBOLS_PER_BYTE:
        raise ValueError(f"{reader.left} bytes cannot hold {count} indices")
    shift, symbols = _split(atoms)
    frequencies = _frequencies(_read_levels(reader, symbols))
    chunks = [(first, min(CHUNK, count - first)) for first in range(0, count, CHUNK)]
    sizes = [read_sizes(reader, length, length) for _, length in chunks]
    parts = [np.zeros(0, np.int64)]
    for (first, length), size in zip(chunks, sizes, strict=True):
        stream, plane = read_stream(reader, size), reader.raw(packed_size(shift, length))
        if first < stop and first + length > start:
            decoded, _ = decode(stream, _contexts(frequencies, length), None, backend, device)
            indices = decoded.astype(np.int64) + 128 << shift | unpack_bits(plane, shift, length)
            parts.append(indices[max(start - first, 0) : stop - first])
    reader.end()
    found = np.concatenate(parts)
    if found.max(initial=0) >= atoms:
        raise ValueError("an index is out of range")
    return found.astype(dtype)


def _read_levels(reader: Reader, symbols: int) -> np.ndarray:
    kind = reader.byte()
    if kind == _FLAT:
        return np.zeros(symbols, np.int64)
    if kind != _TABLE:
        raise ValueError("indices are coded in a way that this version does not know")
    levels = np.cumsum(decode_integers(reader.block(), (1, symbols))[0].astype(np.int64))
    if levels.min() < 0 or levels.max() > _UNUSED or levels.min() == _UNUSED:
        raise ValueError("a table of frequencies is damaged")
    return levels
