"""Integer arrays <-> bytes: exact for any integers of any shape, close to the ideal length, the same bytes anywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hf_sqf.runtime import sqf_symbols
from hf_sqf.runtime.sqf_bytes import Reader, Writer, pack_bits, packed_size, unpack_bits
from hf_sqf.runtime.sqf_codec import chunk_rows, contexts_of, decode_integers, encode_integers, ideal_bits
from hf_sqf.runtime.sqf_decoders import BACKENDS
from hf_sqf.runtime.sqf_indices import decode_indices, encode_indices
from hf_sqf.runtime.sqf_paths import codes_of_points, points_of_codes
from hf_sqf.runtime.sqf_trellis import TRELLIS_STATES, machine
from tests.runtime.conftest import walk

DECODERS = [name for name in BACKENDS if name != "auto"]
LOW, HIGH = -(1 << 31), (1 << 31) - 1


def laplacian(m, n, scale=1.5, seed=0, spread=0.0):
    rng = np.random.default_rng(seed)
    rows = np.exp(spread * rng.normal(size=(m, 1)))
    return np.rint(rng.laplace(scale=scale, size=(m, n)) * rows).astype(np.int32)


shapes = st.tuples(st.integers(0, 40), st.integers(0, 40))
elements = st.one_of(
    st.integers(-2, 2),
    st.integers(-200, 200),
    st.sampled_from([0, 0, 0, 0, LOW, HIGH, -128, -127, -126, 126, 127, 128]),
    st.integers(LOW, HIGH),
)
quarters = elements.map(lambda v: v // 4)


@st.composite
def arrays(draw):
    width = draw(st.sampled_from([np.int8, np.int16, np.int32, np.int64]))
    limits = np.iinfo(width)
    inside = elements.filter(lambda v: limits.min <= v <= limits.max)
    return draw(npst.arrays(width, draw(shapes), elements=inside))


@settings(max_examples=80, deadline=None)
@given(values=arrays(), data=st.data())
def test_any_array_comes_back(values, data):
    m, n = values.shape
    priors = st.one_of(st.none(), st.integers(-1000, 1000))
    row_prior = data.draw(priors.map(lambda p: None if p is None else np.arange(m) * 3 + p))
    col_prior = data.draw(priors.map(lambda p: None if p is None else np.full(n, p)))
    coded = encode_integers(values, row_prior, col_prior)
    assert coded == encode_integers(values, row_prior, col_prior, compiled=False)
    for backend in DECODERS:
        decoded = decode_integers(coded, (m, n), row_prior, col_prior, backend=backend)
        assert decoded.shape == values.shape
        assert np.array_equal(decoded, values)


@settings(max_examples=40, deadline=None)
@given(
    codes=npst.arrays(np.int32, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=quarters),
    states=st.sampled_from([4, 8, 256]),
)
def test_any_path_of_a_machine_comes_back(codes, states):
    points = walk(codes.astype(np.int64), states)
    coded = encode_integers(points, trellis=states)
    assert coded == encode_integers(points, trellis=states, compiled=False)
    for backend in DECODERS:
        assert np.array_equal(decode_integers(coded, codes.shape, trellis=states, backend=backend), points)


@pytest.mark.parametrize("states", TRELLIS_STATES)
def test_points_and_codes_are_inverse(states, random_path):
    points = random_path(np.random.default_rng(1), (50, 20), states)
    for compiled in (True, False):
        codes, visited = codes_of_points(points, machine(states), compiled)
        grids = machine(states).grid[visited].astype(np.uint8)
        for width in (np.int8, np.int64):
            again = points_of_codes(codes.astype(width).reshape(-1), grids.reshape(-1), compiled)
            assert np.array_equal(again.reshape(points.shape), points)
        assert (visited[0] == 0).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_no_path_is_refused_with_its_place(compiled):
    points = np.zeros((5, 3), np.int32)
    points[3, 2] = 1  # state 0 is on the grid of even points
    with pytest.raises(ValueError, match="value 1 at row 3, column 2"):
        codes_of_points(points, machine(8), compiled)
    with pytest.raises(ValueError, match="row 3, column 2"):
        encode_integers(points, trellis=8)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((0, 7), np.int8),
        np.zeros((7, 0), np.int8),
        np.zeros((1, 1), np.int8),
        np.full((300, 400), -3),
        np.zeros((400, 300), np.int8),
        np.array([[LOW]]),
        np.array([[LOW, HIGH]]),
        np.array([[LOW], [HIGH]]),
        np.arange(1000)[:, None] % 3,
        np.where(np.arange(6000).reshape(60, 100) == 1234, HIGH, 0),
        np.arange(-128, 128, dtype=np.int8)[None],
        np.arange(-128, 128, dtype=np.int8)[:, None],
    ],
    ids=lambda v: f"{v.shape} {v.min(initial=0)} to {v.max(initial=0)}",
)
def test_corners(values):
    coded = encode_integers(values)
    for backend in DECODERS:
        assert np.array_equal(decode_integers(coded, values.shape, backend=backend), values)


def test_width_is_the_least_that_holds_the_values():
    for high, width in ((127, np.int8), (128, np.int16), (32768, np.int32)):
        values = laplacian(20, 30)
        values[3, 4] = high
        assert decode_integers(encode_integers(values), values.shape).dtype == width


@pytest.mark.parametrize("trellis", [0, 8])
def test_chunks_and_rows_of_them(trellis, random_path, monkeypatch):
    monkeypatch.setattr(sqf_symbols, "CHUNK", 1000)
    values = random_path(np.random.default_rng(2), (100, 64), 8) if trellis else laplacian(100, 64)
    assert chunk_rows(100, 64) == 15
    coded = encode_integers(values, trellis=trellis)
    for backend in DECODERS:
        assert np.array_equal(decode_integers(coded, values.shape, trellis=trellis, backend=backend), values)
    for first, last in ((0, 0), (0, 1), (14, 16), (15, 30), (99, 100), (7, 93)):
        part = decode_integers(coded, values.shape, trellis=trellis, rows=slice(first, last))
        assert np.array_equal(part, values[first:last])


def test_rows_outside_are_refused():
    coded = encode_integers(laplacian(10, 10))
    with pytest.raises(ValueError, match="rows 5..11"):
        decode_integers(coded, (10, 10), rows=slice(5, 11))


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.5, 3.0, 6.0, 40.0])
@pytest.mark.parametrize("kind", ["laplace", "normal"])
def test_length_is_near_the_entropy(scale, kind):
    values = np.rint(getattr(np.random.default_rng(0), kind)(scale=scale, size=(600, 500))).astype(np.int32)
    share = np.unique(values, return_counts=True)[1] / values.size
    entropy = float(-(share * np.log2(share)).sum()) * values.size
    assert 8 * len(encode_integers(values)) < 1.01 * entropy + 200
    assert ideal_bits(values) < 1.004 * entropy + 100
    assert ideal_bits(values) <= 8 * len(encode_integers(values)) < 1.006 * ideal_bits(values) + 200


def test_scales_of_rows_and_columns_are_found():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=(300, 1)) * 0.7 + rng.normal(size=(1, 400)) * 0.7)
    values = np.rint(rng.normal(size=(300, 400)) * scale * 2).astype(np.int32)
    shuffled = rng.permutation(values.reshape(-1)).reshape(values.shape)
    assert len(encode_integers(values)) < 0.9 * len(encode_integers(shuffled))


def test_priors_are_worth_what_they_say():
    rng = np.random.default_rng(0)
    steps = np.rint(8 * rng.normal(size=40)).astype(int)
    values = np.rint(rng.normal(size=(8, 40)) * 4 * 2.0 ** (-steps / 4)).astype(np.int32)
    with_prior, without = encode_integers(values, None, steps), encode_integers(values)
    assert len(with_prior) < len(without) - 10
    assert np.array_equal(decode_integers(with_prior, values.shape, None, steps), values)


def test_a_vector_of_steps_costs_little_more_than_its_entropy():
    steps = np.rint(np.random.default_rng(0).normal(scale=9, size=384) - 300).astype(np.int32)
    entropy = 384 * np.log2(9 * np.sqrt(2 * np.pi * np.e))
    assert len(encode_integers(steps[None])) < entropy / 8 + 16


def test_constants_take_two_bytes():
    assert len(encode_integers(np.zeros((1, 5000), np.int32))) == 2


def test_nothing_but_zeros_costs_next_to_nothing():
    assert len(encode_integers(np.zeros((1000, 1000), np.int8))) < 200


def test_wide_values_cost_their_entropy():
    values = np.rint(np.random.default_rng(0).normal(scale=3000, size=(300, 300))).astype(np.int32)
    assert len(encode_integers(values)) * 8 < values.size * (np.log2(3000 * np.sqrt(2 * np.pi * np.e)) + 0.05)


def test_a_sample_of_rows_tells_the_bits_of_all():
    values = laplacian(2000, 300, spread=0.3)
    assert ideal_bits(values[::10], rows=2000) == pytest.approx(ideal_bits(values), rel=0.02)


def test_contexts_of_are_those_of_the_stream():
    values = laplacian(200, 100)
    contexts = contexts_of(values)
    counts = contexts.table[0][contexts.class_index(), values.reshape(-1) + 128]
    bits = 12 - np.log2(np.maximum(counts, 1))  # an escape costs 12 and its value
    assert float(bits.sum()) == pytest.approx(ideal_bits(values), rel=0.01)


@pytest.mark.parametrize(
    "values", [np.zeros(3, np.int8), np.zeros((2, 2)), np.array([[1 << 31]]), np.array([[LOW - 1]])]
)
def test_what_is_no_array_of_integers_is_refused(values):
    with pytest.raises(ValueError, match=r"2-D array of integers|32 bits"):
        encode_integers(values)


def test_unknown_machine_is_refused():
    with pytest.raises(ValueError, match="5"):
        encode_integers(np.zeros((2, 300), np.int8) + np.arange(300), trellis=5)


@pytest.mark.parametrize("shape", [(64, 64), (41, 100), (39, 100), (4100, 1), (1 << 30, 1 << 30), (0, 0)])
def test_bytes_of_another_shape_are_refused(shape):
    coded = encode_integers(laplacian(40, 100))
    with pytest.raises(ValueError, match="."):
        decode_integers(coded, shape)


def test_every_truncation_is_refused():
    coded = encode_integers(laplacian(20, 30, scale=60))
    for length in range(len(coded)):
        with pytest.raises(ValueError, match="."):
            decode_integers(coded[:length], (20, 30))
    with pytest.raises(ValueError, match="follow the end"):
        decode_integers(coded + b"\0", (20, 30))


def test_threads_decode_the_same():
    values = laplacian(3000, 700)
    coded, threads = encode_integers(values), torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert np.array_equal(decode_integers(coded, values.shape), values)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------- indices


@settings(max_examples=80, deadline=None)
@given(data=st.data(), atoms=st.sampled_from([1, 2, 3, 7, 255, 256, 257, 1000, 5000, 70_000]))
def test_any_indices_come_back(data, atoms):
    indices = np.array(data.draw(st.lists(st.integers(0, atoms - 1), max_size=300)), np.int64)
    coded = encode_indices(indices, atoms)
    assert coded == encode_indices(indices, atoms, compiled=False)
    for backend in DECODERS:
        assert np.array_equal(decode_indices(coded, len(indices), atoms, backend), indices)


@pytest.mark.parametrize("atoms", [16, 256, 1000, 4096])
def test_indices_cost_their_entropy(atoms):
    rng = np.random.default_rng(0)
    for indices in (rng.integers(0, atoms, 40_000), np.minimum(rng.geometric(8 / atoms, 40_000) - 1, atoms - 1)):
        share = np.unique(indices, return_counts=True)[1] / len(indices)
        entropy = float(-(share * np.log2(share)).sum()) * len(indices)
        # A table of 4096 entries cannot follow the sample's own noise, which lowers its entropy.
        assert 8 * len(encode_indices(indices, atoms)) < 1.02 * entropy + 8 * atoms / 2 + 400


@pytest.mark.parametrize("count", [200, 1 << 20])
@pytest.mark.parametrize("atoms", [2, 5, 9])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_indices_that_are_nearly_all_the_same(count: int, atoms: int, others: int):
    for most in (0, atoms - 1):
        indices = np.full(count, most)
        indices[:others] = 1 - most if atoms == 2 else 1
        coded = encode_indices(indices, atoms)
        assert np.array_equal(decode_indices(coded, count, atoms), indices)
        assert len(coded) < 200


def test_indices_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        encode_indices(np.array([0, 4]), 4)
    coded = encode_indices(np.arange(100) % 200, 257)
    with pytest.raises(ValueError, match="."):
        decode_indices(coded, 100, 256)


# ---------------------------------------------------------------------------------------------- fields


@given(value=st.integers(0, 1 << 48), signed=st.integers(-(1 << 32), 1 << 32), block=st.binary(max_size=300))
def test_fields_come_back(value, signed, block):
    out = Writer()
    out.unsigned(value)
    out.signed(signed)
    out.block(block)
    reader = Reader(bytes(out))
    assert (reader.unsigned(), reader.signed(), bytes(reader.block())) == (value, signed, block)
    reader.end()


def test_fields_have_limits():
    with pytest.raises(ValueError, match="exceeds 5"):
        Reader(b"\x06").unsigned(5)
    with pytest.raises(ValueError, match="too early"):
        Reader(b"\xff").unsigned()
    with pytest.raises(ValueError, match="."):
        Reader(b"\x80" * 20).unsigned()


@given(width=st.integers(0, 40), data=st.data())
def test_planes_come_back(width, data):
    values = np.array(data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=50)), np.int64)
    packed = pack_bits(values, width)
    assert len(packed) == packed_size(width, len(values))
    assert np.array_equal(unpack_bits(packed, width, len(values)), values)
