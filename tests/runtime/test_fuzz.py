"""Damaged and forged weights: an error that names the tensor, or the right answer; never more memory than they declare.

A damaged file fails its checksum. A forger can make the checksum right, so that most of these cases have a valid one:
then the bytes may well mean another matrix, but reading them must neither crash, nor hang, nor take memory that the
shapes they declare do not justify.
"""

import math
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_sqf.runtime.sqf_bytes import Reader, Writer
from hf_sqf.runtime.sqf_codec import decode_integers, encode_integers
from hf_sqf.runtime.sqf_container import pack, records, unpack
from hf_sqf.runtime.sqf_decoders import BACKENDS
from hf_sqf.runtime.sqf_indices import decode_indices, encode_indices
from hf_sqf.runtime.sqf_size import size_report

STRUCTURES = ("grid", "grid_one_step", "trellis", "svd", "sparse_pca", "vq", "pgd", "svd+grid")
NAME = "layers.7.weight_factors"
PREFIX = 8
SLACK = 48 << 20  # what decoding a chunk takes beside its result, and the tables of the models
ABSURD = (0, 1, 127, 1 << 14, (1 << 20) + 1, (1 << 31) - 1, 1 << 32, (1 << 40) - 1, 1 << 47, (1 << 63) - 1)


def signed(data: bytes) -> bytes:
    """Make the checksum right."""
    return data[:4] + zlib.crc32(data[PREFIX:]).to_bytes(4, "little") + data[PREFIX:]


def flip(rng, data, _):
    damaged = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        damaged[at] ^= 1 << rng.integers(8)
    return bytes(damaged)


def truncate(rng, data, _):
    return data[: rng.integers(0, len(data))]


def overwrite(rng, data, _):
    damaged = bytearray(data)
    at = int(rng.integers(0, len(data)))
    run = rng.integers(0, 256, rng.integers(1, 40), dtype=np.uint8).tobytes()
    damaged[at : at + len(run)] = run
    return bytes(damaged)


def header(rng, data, _):
    """Only the first bytes, where shapes, numbers and sizes are."""
    damaged = bytearray(data)
    for at in rng.integers(PREFIX, min(len(data), PREFIX + 40), rng.integers(1, 4)):
        damaged[at] = rng.integers(0, 256)
    return bytes(damaged)


def absurd(rng, data, _):
    """A number of many bytes in place of one byte of the header."""
    out = Writer()
    out.unsigned(int(rng.choice(np.array(ABSURD, dtype=object))))
    at = int(rng.integers(PREFIX, min(len(data), PREFIX + 40)))
    return data[:at] + bytes(out) + data[at + 1 :]


def splice(rng, data, others):
    """The beginning of one weight and the end of another."""
    other = others[rng.integers(len(others))]
    return data[: rng.integers(PREFIX, len(data))] + other[rng.integers(PREFIX, len(other)) :]


def shift(rng, data, _):
    at = int(rng.integers(PREFIX, len(data)))
    extra = rng.integers(0, 256, rng.integers(1, 5), dtype=np.uint8).tobytes()
    return data[:at] + extra + data[at:] if rng.integers(2) else data[:at] + data[at + len(extra) :]


ATTACKS = (flip, truncate, overwrite, header, absurd, splice, shift)


@pytest.fixture(scope="module")
def originals(factors_of):
    """Pairs of bytes and what they mean."""
    made = []
    for name in STRUCTURES:
        for factors in ([factors_of(name)], [factors_of(name, 9, 17, seed=i) for i in range(3)]):
            made.append((pack(factors).numpy().tobytes(), factors))
    return made


def read(data, expected_shape=None):
    """Unpack; return the factors, or None where the reader refused, naming the tensor."""
    try:
        return unpack(data, NAME, expected_shape)
    except ValueError as error:
        assert str(error).startswith(f"{NAME}: "), error
        return None


def declared_bytes(data):
    """Return what a reader may need for what the headers declare: the codes and the factors around them."""
    total = 0
    for record in records(data, NAME):
        for term in record.terms:
            lines = record.shape[0] * math.ceil(record.shape[1] / max(term.width, 1))
            codes = lines if term.one_hot else lines * term.atom_count
            total += 4 * (codes + lines + term.atom_count + (term.atom_count * term.width if term.atoms else 0))
    return total


def attack(rng, originals, count, refused):
    """Read ``count`` forged weights; each must be refused or decode to something of its declared shape."""
    others = [data for data, _ in originals]
    for i in range(count):
        data, _ = originals[rng.integers(len(originals))]
        forged = signed(ATTACKS[i % len(ATTACKS)](rng, data, others))
        start = time.perf_counter()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        found = read(forged)
        peak = tracemalloc.get_traced_memory()[1] - before
        if found is None:
            refused[0] += 1
            # The most that a refused weight can have cost is what its headers declared.
            assert peak < SLACK or peak < 2 * declared_bytes(forged) + SLACK
        else:
            assert peak < 2 * declared_bytes(forged) + SLACK
            for factors in found:
                assert all(len(term.codes) % max(factors.shape[0], 1) == 0 for term in factors.terms)
        assert time.perf_counter() - start < 20


@pytest.mark.parametrize("seed", range(4))
def test_forged_weights_with_a_right_checksum(seed, originals):
    refused = [0]
    tracemalloc.start()
    try:
        attack(np.random.default_rng(seed), originals, 500, refused)
    finally:
        tracemalloc.stop()
    assert refused[0] > 350


@pytest.mark.slow
def test_ten_thousand_forged_weights(originals):
    refused = [0]
    tracemalloc.start()
    try:
        attack(np.random.default_rng(99), originals, 10_000, refused)
    finally:
        tracemalloc.stop()
    assert refused[0] > 7_000


def test_damaged_weights_are_refused_or_right(originals, same_factors):
    rng, others = np.random.default_rng(5), [data for data, _ in originals]
    for i in range(2000):
        data, factors = originals[rng.integers(len(originals))]
        damaged = ATTACKS[i % len(ATTACKS)](rng, data, others)
        found = read(damaged)
        if found is not None:
            assert damaged == data or damaged[PREFIX:] == data[PREFIX:]
            assert all(same_factors(a, b) for a, b in zip(found, factors, strict=True))


def test_swapped_tensors_are_refused_where_the_shape_is_known(originals):
    for data, factors in originals:
        assert read(data, factors[0].shape) is not None
        assert read(data, (factors[0].shape[0], factors[0].shape[1] + 1)) is None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "auto"])
def test_every_decoder_withstands_forged_streams(backend, random_path):
    rng = np.random.default_rng(3)
    plain = np.rint(rng.laplace(scale=30, size=(40, 70))).astype(np.int32)
    coded = [(encode_integers(plain), 0), (encode_integers(random_path(rng, (40, 70), 8), trellis=8), 8)]
    for _ in range(150):
        data, trellis = coded[rng.integers(2)]
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 5)):
            damaged[at] = rng.integers(256)
        try:
            found = decode_integers(bytes(damaged), (40, 70), trellis=trellis, backend=backend)
        except ValueError:
            continue
        assert found.shape == (40, 70)
        reference = decode_integers(bytes(damaged), (40, 70), trellis=trellis, backend="reference")
        assert np.array_equal(found, reference)


def test_forged_indices_stay_in_range():
    rng = np.random.default_rng(3)
    data = encode_indices(np.minimum(rng.geometric(0.01, 5000) - 1, 299), 300)
    for _ in range(500):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 5)):
            damaged[at] = rng.integers(256)
        try:
            found = decode_indices(bytes(damaged), 5000, 300)
        except ValueError:
            continue
        assert found.min() >= 0
        assert found.max() < 300


def test_absurd_shapes_are_refused_before_they_are_allocated(factors_of):
    data = pack([factors_of("grid")]).numpy().tobytes()
    reader = Reader(data[PREFIX:])
    count, size = reader.unsigned(), reader.unsigned()
    record = bytes(reader.raw(size))
    assert count == 1
    for m in ABSURD[5:]:
        for n in (1, 30, *ABSURD[5:]):
            body = Writer()
            body.raw(record[:1])
            body.unsigned(m)
            body.unsigned(n)
            body.raw(record[3:])
            out = Writer()
            out.unsigned(1)
            out.block(bytes(body))
            tracemalloc.start()
            try:
                assert read(signed(data[:PREFIX] + bytes(out))) is None
                assert tracemalloc.get_traced_memory()[1] < 1 << 20
            finally:
                tracemalloc.stop()


def test_files_are_named(tmp_path: Path, factors_of):
    data = pack([factors_of("grid")])
    file = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = data.clone()
        damaged[rng.integers(len(data))] ^= int(1 << rng.integers(7))
        save_file({NAME: damaged, "norm.weight": torch.ones(3)}, file)
        with pytest.raises(ValueError, match="model.safetensors: layers.7.weight_factors: "):
            size_report(tmp_path)


def test_spreads_cannot_be_nested():
    inner = b"\x30" + bytes(3)
    for _ in range(5000):  # each level names a spread of its own: a recursion without end
        out = Writer()
        out.raw(b"\x20\x00\x54")
        out.block(inner)
        inner = bytes(out)
    for shape in ((1, 40), (40, 1), (40, 40)):
        with pytest.raises(ValueError, match="."):
            decode_integers(inner, shape)
