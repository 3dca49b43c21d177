"""Interleaved rANS: the four decoders agree with the encoder and each other, and notice damage."""

import numpy as np
import pytest

from hf_sqf.runtime.sqf_decoders import BACKENDS, decode
from hf_sqf.runtime.sqf_models import CLASSES, EVEN, INTEGERS, ODD, Q0, Q1, SHAPES, ZEROS, frequencies, slots
from hf_sqf.runtime.sqf_rans import LOWEST, Contexts, Stream, encode, tail_lanes
from hf_sqf.runtime.sqf_trellis import TRELLIS_STATES, machine

DECODERS = [name for name in BACKENDS if name != "auto"]


def sample(m, n, states=0, seed=0, planes=False):
    """Return symbols drawn from their models, their groups, contexts and what drives the machine."""
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(-4, 5, m).astype(np.int32), rng.integers(12, 24, n).astype(np.int32)
    parity = rng.integers(0, 2, m * n).astype(np.uint8) if planes else None
    if not states:
        contexts = Contexts(rows, cols, frequencies(5, 4, INTEGERS)[None])
        groups = np.zeros(m * n, np.uint8)
    else:
        made = machine(states)
        table = np.stack([frequencies(5, 4, Q0), frequencies(6, 3, Q1)])
        contexts = Contexts(rows, cols, table, made)
    index = contexts.class_index()
    expanded = [slots(table) for table in contexts.table]
    symbols, column = np.empty(m * n, np.int8), np.zeros(n, np.int64)
    if states:
        groups = np.empty(m * n, np.uint8)
    for t in range(m * n):
        j = t % n
        group = int(made.grid[column[j]]) if states else 0
        entry = int(expanded[group][index[t], rng.integers(4096)])
        symbols[t] = (entry & 255) - 256 * (entry & 255 > 127)
        if states:
            groups[t] = group
            column[j] = made.next_state[column[j], symbols[t] & 1 if parity is None else parity[t]]
    return symbols, groups if states else None, contexts, parity


def check(decoded, symbols, groups):
    assert np.array_equal(decoded[0], symbols)
    assert (decoded[1] is None) == (groups is None)
    assert groups is None or np.array_equal(decoded[1], groups)


@pytest.mark.parametrize("backend", DECODERS)
@pytest.mark.parametrize("lanes", [1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("states", [0, 4, 8])
def test_every_decoder_returns_the_symbols(backend, lanes, states):
    symbols, groups, contexts, _ = sample(37, 110, states)
    stream = encode(symbols, groups, contexts, lanes)
    check(decode(stream, contexts, backend=backend), symbols, groups)


@pytest.mark.parametrize("states", TRELLIS_STATES)
def test_machines_of_any_size(states):
    symbols, groups, contexts, _ = sample(40, 9, states)
    stream = encode(symbols, groups, contexts, 9)
    for backend in DECODERS:
        check(decode(stream, contexts, backend=backend), symbols, groups)


@pytest.mark.parametrize("backend", DECODERS)
def test_a_plane_of_low_bits_drives_the_machine(backend):
    symbols, groups, contexts, parity = sample(30, 40, 8, planes=True)
    stream = encode(symbols, groups, contexts, 33)
    check(decode(stream, contexts, parity, backend), symbols, groups)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 7)])
@pytest.mark.parametrize("states", [0, 8])
def test_shapes_at_the_edge(shape, states):
    symbols, groups, contexts, _ = sample(*shape, states)
    for lanes in {1, min(shape[1], 40)}:
        stream = encode(symbols, groups, contexts, lanes)
        for backend in DECODERS:
            check(decode(stream, contexts, backend=backend), symbols, groups)


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("lanes", [1, 31, 110])
def test_both_encoders_write_the_same_stream(states, lanes):
    symbols, groups, contexts, _ = sample(37, 110, states)
    streams = [encode(symbols, groups, contexts, lanes, compiled) for compiled in (True, False)]
    assert np.array_equal(streams[0].states, streams[1].states)
    assert np.array_equal(streams[0].words, streams[1].words)
    assert streams[0].tail == streams[1].tail


def test_lanes_cost_little_because_their_first_states_carry_the_tail():
    symbols, _, contexts, _ = sample(300, 300)
    plain, laned = encode(symbols, None, contexts, 1), encode(symbols, None, contexts, 100)
    bits = [32 * len(s.states) + 16 * len(s.words) for s in (plain, laned)]
    assert laned.tail > 0
    assert bits[1] - bits[0] < 14 * 100  # instead of 24 a lane


def test_stream_is_near_the_ideal_length():
    symbols, _, contexts, _ = sample(300, 300)
    counts = contexts.table[0][contexts.class_index(), symbols.astype(np.int64) + 128]
    ideal = float((12 - np.log2(counts)).sum())
    stream = encode(symbols, None, contexts, 1)
    assert ideal <= 32 + 16 * len(stream.words) <= 1.001 * ideal + 48


@pytest.mark.parametrize("backend", DECODERS)
def test_damage_is_noticed(backend):
    symbols, _, contexts, _ = sample(20, 60)
    stream = encode(symbols, None, contexts, 20)
    fewer, more = stream.words[:-1], np.append(stream.words, np.uint16(7))
    flipped, states = stream.words.copy(), stream.states.copy()
    flipped[5] ^= 1
    states[3] ^= 1 << 20
    for broken in (
        Stream(stream.states, fewer, stream.tail),
        Stream(stream.states, more, stream.tail),
        Stream(stream.states, flipped, stream.tail),
        Stream(states, stream.words, stream.tail),
        Stream(stream.states, stream.words, stream.tail + 1),
        Stream(stream.states, stream.words, 0),
    ):
        with pytest.raises(ValueError, match="damaged"):
            decode(broken, contexts, backend=backend)


def test_unknown_backend_is_named():
    symbols, _, contexts, _ = sample(2, 3)
    with pytest.raises(ValueError, match="cuda"):
        decode(encode(symbols, None, contexts, 1), contexts, backend="cuda")


@pytest.mark.parametrize("grid", [INTEGERS, Q0, Q1])
def test_models_are_distributions(grid):
    for shape in range(SHAPES):
        for zero in (0, 4, ZEROS - 1):
            table = frequencies(shape, zero, grid)
            assert table.shape == (CLASSES, 256)
            assert (table.sum(1) == 4096).all()
            assert (table >= 0).all()
            assert (table[:, 128] >= 1).all()
            assert (table[:, [EVEN + 128, ODD + 128]] == 1).all()
            assert np.array_equal(table[:, 2:128], table[:, :128:-1][:, 1:127])  # symmetric


def test_models_widen_with_their_class():
    magnitude = np.abs(np.arange(256) - 128) * (np.abs(np.arange(256) - 128) <= 126)
    for shape in range(SHAPES):
        means = frequencies(shape, 4, INTEGERS) @ magnitude / 4096
        assert (np.diff(means) >= -1e-3).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_slots_follow_from_frequencies(compiled):
    table = frequencies(3, 6, INTEGERS)
    expanded = slots(table, compiled)
    symbols = (expanded & 255).astype(np.uint8).view(np.int8).astype(int) + 128
    for c in (0, 20, CLASSES - 1):
        assert np.array_equal(np.bincount(symbols[c], minlength=256), table[c])
        assert (np.diff(symbols[c]) >= 0).all()
        assert np.array_equal(expanded[c] >> 8 & 4095, table[c][symbols[c]])
        starts = np.cumsum(table[c]) - table[c]
        assert np.array_equal(starts[symbols[c]] + (expanded[c] >> 20), np.arange(4096))


def test_tail_lanes_leave_room_for_words():
    assert all(2 * tail_lanes(lanes) < lanes for lanes in range(3, 5000))
    assert LOWEST == 1 << 16
