"""Factors <-> one tensor of bytes: every structure comes back, to the same bytes, and strangers are turned away."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from hf_sqf.runtime.sqf_bytes import Writer
from hf_sqf.runtime.sqf_container import VERSION, pack, records, unpack
from hf_sqf.runtime.sqf_decoders import BACKENDS
from hf_sqf.runtime.sqf_factors import Factors, Term


def signed(body: bytes, version: int = VERSION) -> bytes:
    """Return a body with the prefix that makes it valid."""
    return b"SQF" + bytes((version,)) + zlib.crc32(body).to_bytes(4, "little") + body


def test_factors_come_back(structure, factors_of, same_factors):
    factors = factors_of(structure)
    for backend in BACKENDS:
        assert same_factors(unpack(pack([factors]), backend=backend)[0], factors)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (24, 1), (24, 3)])
def test_small_shapes(structure, shape, factors_of, same_factors):
    factors = factors_of(structure, *shape)
    assert same_factors(unpack(pack([factors]))[0], factors)


def test_packing_what_was_unpacked_gives_the_same_bytes(structure, factors_of):
    data = pack([factors_of(structure)])
    assert torch.equal(pack(unpack(data)), data)
    assert torch.equal(pack([factors_of(structure)]), data)


def test_experts_are_records_of_one_tensor(factors_of, same_factors):
    experts = [factors_of("grid", seed=i) for i in range(5)]
    data = pack(experts)
    assert len(records(data)) == 5
    assert all(same_factors(a, b) for a, b in zip(unpack(data), experts, strict=True))
    assert same_factors(records(data)[3].factors(), experts[3])


def test_an_unusual_structure_keeps_its_name(factors_of):
    factors = factors_of("grid")
    renamed = Factors(factors.shape, "grid+grid", factors.terms * 2)
    assert unpack(pack([renamed]))[0].structure == "grid+grid"


def test_rows_alone_are_those_of_the_whole(structure, factors_of):
    factors = factors_of(structure)
    record, dense = records(pack([factors]))[0], factors.dense()
    for first, last in ((0, 0), (0, 24), (5, 6), (7, 20)):
        assert torch.equal(record.rows(first, last).dense(), dense[first:last])
    with pytest.raises(ValueError, match="weight: rows"):
        record.rows(20, 25)


def test_reading_headers_decodes_nothing(factors_of):
    record = records(pack([factors_of("svd+grid")]), "w")[0]
    assert (record.shape, record.structure, len(record.terms)) == ((24, 30), "svd+grid", 2)
    assert record.terms[0].atom_count == 5
    assert record.terms[1].width == 30


def test_steps_help_where_magnitudes_follow_them(factors_of):
    factors = factors_of("grid", 60, 200)
    term = factors.terms[0]
    codes = torch.round(torch.randn(60, 200) * 3 * 2.0 ** (-term.steps / 16)).to(torch.int32)
    plain = Factors((60, 200), "grid", (Term(codes, 0, torch.zeros(1, dtype=torch.int32), term.rows),))
    known = Factors((60, 200), "grid", (Term(codes, 0, term.steps, term.rows),))
    bits = [8 * len(records(pack([f]))[0].terms[0].codes) for f in (plain, known)]
    assert bits[1] < bits[0] - 200


def test_a_newer_version_says_so(factors_of):
    data = pack([factors_of("grid")]).numpy().tobytes()
    with pytest.raises(ValueError, match="layer.3.weight_factors: .* version 2, newer than the 1 .* update hf_sqf"):
        unpack(data[:3] + b"\x02" + data[4:], "layer.3.weight_factors")


def test_sections_that_are_optional_are_skipped(factors_of, same_factors):
    factors = factors_of("grid")
    body = pack([factors]).numpy().tobytes()[8:]
    extra = Writer()
    extra.unsigned(2)
    extra.block(b"something of the future")
    assert same_factors(unpack(signed(body + bytes(extra)))[0], factors)


def test_sections_that_are_not_optional_are_named(factors_of):
    body = pack([factors_of("grid")]).numpy().tobytes()[8:]
    extra = Writer()
    extra.unsigned(77)
    extra.block(b"")
    with pytest.raises(ValueError, match="feature 77"):
        unpack(signed(body + bytes(extra)))


def test_another_shape_than_the_model_expects_is_refused(factors_of):
    data = pack([factors_of("grid")])
    assert records(data, expected_shape=(24, 30))
    with pytest.raises(ValueError, match=r"h.0.weight_factors: .*\(24, 30\).*\(30, 24\)"):
        records(data, "h.0.weight_factors", expected_shape=(30, 24))


@pytest.mark.parametrize("data", [b"", b"SQF", b"not a weight at all", bytes(1000)])
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError, match="w: .*not a compressed weight"):
        unpack(data, "w")


@pytest.mark.parametrize("data", [torch.zeros(10), torch.zeros((2, 2), dtype=torch.uint8)])
def test_other_tensors_are_refused(data):
    with pytest.raises(ValueError, match="w: expected a 1-D uint8 tensor"):
        unpack(data, "w")


def test_every_flipped_bit_is_noticed(factors_of):
    data = pack([factors_of("vq")]).numpy().copy()
    for at in range(0, len(data), 7):
        damaged = data.copy()
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match="^w: "):
            unpack(torch.from_numpy(damaged), "w")


def test_overhead_is_small():
    factors_bytes = []
    for size in (1, 384):
        one = torch.zeros(1, dtype=torch.int32)
        term_codes = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (size, size)).astype(np.int8))
        factors = Factors((size, size), "grid", (Term(term_codes, -100, one, one),))
        factors_bytes.append(pack([factors]).numel())
    assert factors_bytes[0] < 40
    assert factors_bytes[1] < 1.012 * 384 * 384 * np.log2(3) / 8 + 60


MADE = """
import hashlib, torch, numpy as np
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_factors import Factors, Term
rng = np.random.default_rng(0)
t = lambda a: torch.from_numpy(np.rint(a).astype(np.int32))
term = Term(t(rng.laplace(size=(3000, 700))), -5, t(rng.normal(size=700) * 9), t(rng.normal(size=3000) * 4))
digest = hashlib.sha256(pack([Factors((3000, 700), "grid", (term,))]).numpy().tobytes()).hexdigest()
"""


def test_bytes_do_not_depend_on_process_or_threads():
    digests, threads = set(), torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            made: dict[str, str] = {}
            exec(MADE, made)
            digests.add(made["digest"])
    finally:
        torch.set_num_threads(threads)
    child = [sys.executable, "-c", MADE + "print(digest)"]
    done = subprocess.run(child, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert digests == {done.stdout.split()[-1]}
