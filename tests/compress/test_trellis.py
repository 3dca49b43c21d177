"""Dependent quantization: the machine and the search for the best path."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sqf.compress.trellis import sources, viterbi
from hf_sqf.runtime.sqf_trellis import TRELLIS_STATES, machine


def geometric_rates(classes: int = 1, size: int = 40) -> np.ndarray:
    """Bits of a code that grow by one with its magnitude; nonzeros pay a bit for the sign."""
    bits = np.arange(size) + 0.5 + (np.arange(size) > 0)
    return np.tile(bits, (classes, 2, 1)).astype(np.float32)


def best_path(targets, price, states, rates=None, classes=None):
    targets = np.asarray(targets, np.float32)
    out = np.empty(len(targets), np.int32)
    rates = geometric_rates() if rates is None else rates
    classes = np.zeros(len(targets), np.int32) if classes is None else classes
    cost = viterbi(targets, classes, rates, np.float32(price), sources(states), out)
    return out, cost


def point(k: int, grid: int) -> int:
    return 2 * k - int(np.sign(k)) * grid


def codes_of(out, states):
    """Run the machine down the fine-grid integers; fail where one does not lie on its grid."""
    next_state, grid = machine(states)
    state, codes = 0, []
    for u in out.tolist():
        k = (abs(u) + int(grid[state])) // 2 * (1 if u > 0 else -1)
        assert point(k, grid[state]) == u
        codes.append((k, int(grid[state])))
        state = next_state[state, k & 1]
    return codes


def cost_of(targets, codes, price, rates):
    return sum(
        (float(t) - point(k, g)) ** 2 + price * float(rates[0, g, min(abs(k), rates.shape[2] - 1)])
        for t, (k, g) in zip(targets, codes, strict=True)
    )


def greedy_path(targets, price, states, rates):
    next_state, grid = machine(states)
    state, codes = 0, []
    for t in targets:
        g = int(grid[state])
        k = min(range(-60, 61), key=lambda k: cost_of([t], [(k, g)], price, rates))
        codes.append((k, g))
        state = next_state[state, k & 1]
    return codes


@pytest.mark.parametrize("states", TRELLIS_STATES)
def test_machine_reaches_every_state_two_ways_and_uses_both_grids_equally(states):
    next_state, grid = machine(states)
    assert np.array_equal(np.bincount(next_state.reshape(-1), minlength=states), np.full(states, 2))
    assert grid.sum() == states // 2


def test_unknown_number_of_states():
    with pytest.raises(ValueError, match="trellis must be one of"):
        machine(7)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.35, 2.0]),
    st.sampled_from(TRELLIS_STATES[:5]),
)
def test_path_is_valid_costs_what_it_says_and_beats_the_greedy_one(targets, price, states):
    out, cost = best_path(targets, price, states)
    codes = codes_of(out, states)
    assert cost == pytest.approx(cost_of(targets, codes, price, geometric_rates()), rel=1e-4, abs=1e-3)
    greedy = cost_of(targets, greedy_path(targets, price, states, geometric_rates()), price, geometric_rates())
    assert cost <= greedy * (1 + 1e-5) + 1e-4


@pytest.mark.parametrize("price", [0.0, 0.5, 3.0])
def test_no_path_of_small_codes_is_better(price):
    targets = np.random.default_rng(0).normal(0, 2, 5).astype(np.float32)
    next_state, grid = machine(8)
    best = np.inf
    for codes in product(range(-4, 5), repeat=len(targets)):
        state, path = 0, []
        for k in codes:
            path.append((k, int(grid[state])))
            state = next_state[state, k & 1]
        best = min(best, cost_of(targets, path, price, geometric_rates()))
    assert best_path(targets, price, 8)[1] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("states", TRELLIS_STATES)
def test_zeros_stay_zero(states):
    out, _ = best_path(np.zeros(50), 0.35, states)
    assert not out.any()


def test_more_states_cost_less():
    targets = np.random.default_rng(1).normal(0, 3, 20_000)
    costs = [best_path(targets, 0.35, states)[1] for states in TRELLIS_STATES]
    assert costs == sorted(costs, reverse=True)


def test_each_entry_uses_the_rates_of_its_class():
    rates = geometric_rates(2)
    rates[1, :, 1:] += 1000
    classes = np.arange(100, dtype=np.int32) % 2
    out, _ = best_path(np.full(100, 5.0), 1.0, 8, rates, classes)
    assert not out[1::2].any() and out[::2].all()


def test_targets_beyond_the_table_are_reached():
    out, _ = best_path([1e6, -1e6, 0.0], 0.35, 8)
    assert np.abs(np.abs(out[:2]) - 1e6).max() <= 2
