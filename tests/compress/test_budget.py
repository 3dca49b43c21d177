"""The budget: rate curves, and the one noise step that meets a number of bits."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sqf.compress.budget import OCTAVES, ROUND, TOLERANCE, Budget, RateCurve, RateSum, interpolate, rounds, smallest
from hf_sqf.compress.grid import solve_grid
from hf_sqf.compress.metric import Metric
from hf_sqf.runtime.sqf_container import pack


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def curve_of(weight: torch.Tensor, overhead: float = 800.0) -> RateCurve:
    return RateCurve([weight], [Metric.relative(weight)], overhead)


def fit(curves: list[RateCurve], bits: float, solve: Callable) -> float:
    """Solve all weights in rounds; return what they cost."""
    budget = Budget(curves, bits)
    for indices in rounds([curve.count for curve in curves]):
        budget.solve(indices, solve)
    return budget.settle(solve)


class Codec:
    """Sizes as estimated, but for a factor for each weight; keeps the last result of each."""

    def __init__(self, curves: list[RateCurve], factors: list[float]):
        self.curves, self.factors = curves, factors
        self.sizes: dict[int, int] = {}
        self.steps: dict[int, float] = {}
        self.calls = 0

    def __call__(self, asked: list[tuple[int, float]]) -> list[int]:
        return [self.solve(index, step) for index, step in asked]

    def solve(self, index: int, step: float) -> int:
        self.calls += 1
        self.steps[index] = step
        self.sizes[index] = round(interpolate(self.curves[index], math.log2(step)) * self.factors[index])
        return self.sizes[index]


def test_curve_of_a_gaussian_is_its_entropy():
    curve = curve_of(gaussian(500, 100), overhead=0.0)
    for octave in (-4, -3, -2):  # fine steps: differential entropy less log2 of the step
        expected = 0.5 * math.log2(2 * math.pi * math.e) - octave
        assert curve.at(4 * octave) / curve.count == pytest.approx(expected, abs=0.03)


def test_curve_falls_and_ends_in_side_information():
    curve = curve_of(gaussian(64, 64), overhead=800.0)
    bits = [curve.at(quarter) for quarter in range(4 * int(OCTAVES[0]), 4 * int(OCTAVES[1]) + 1)]
    assert all(b < a + 0.02 * curve.count for a, b in zip(bits, bits[1:], strict=False))  # but for sampling
    assert bits[-1] == 800.0


def test_curve_of_zeros_is_side_information():
    assert curve_of(torch.zeros(8, 8), overhead=100.0).at(-40) == 100.0


def test_curve_sees_what_the_metric_weighs():
    weight = gaussian(64, 64)
    plain, rows, columns = (
        RateCurve([weight], [metric], 0.0)
        for metric in (
            Metric(g=torch.ones(1)),
            Metric(g=torch.full((64,), 8.0)),
            Metric(H=64.0 * torch.eye(64, dtype=torch.float64)),
        )
    )
    for quarter in (-16, -8, 0):  # three octaves more
        assert rows.at(quarter) == columns.at(quarter) == plain.at(quarter - 12)


def test_rows_that_count_much_are_sampled_in_their_share():
    weight, g = gaussian(4000, 64), torch.ones(4000)
    g[::400] = 1000.0  # ten rows, at places that an even sample of rows would hit all or none of
    curve = RateCurve([weight], [Metric(g=g)], 0.0)
    every = RateCurve([weight[:400]], [Metric(g=g[:400])], 0.0)
    assert curve.at(8) / curve.count == pytest.approx(every.at(8) / every.count, abs=0.05)


def test_all_matrices_of_a_stack_are_sampled():
    small, large = gaussian(64, 512), 32 * gaussian(64, 512)
    metric = Metric(g=torch.ones(1))
    both = RateCurve([small, large], [metric] * 2, 0.0)
    assert both.count == 2 * small.numel()
    assert RateCurve([small], [metric], 0.0).at(0) < both.at(0) / 2 < RateCurve([large], [metric], 0.0).at(0)


def test_sum_and_removal():
    curves = [curve_of(gaussian(16, 16, seed)) for seed in range(3)]
    total = RateSum(curves)
    assert total.at(-8) == pytest.approx(sum(c.at(-8) for c in curves))
    total.remove(curves[1])
    for quarter in (-8, -3):
        assert total.at(quarter) == pytest.approx(curves[0].at(quarter) + curves[2].at(quarter))


def test_step_for_inverts_the_sum():
    total = RateSum([curve_of(gaussian(32, 32, seed)) for seed in range(3)])
    for share in (0.2, 0.5, 0.9):
        bits = share * total.at(-24) + (1 - share) * total.at(0)
        assert interpolate(total, total.step_for(bits)) == pytest.approx(bits, rel=1e-9)
    assert total.step_for(0.0) == OCTAVES[1]
    assert total.step_for(1e12) == OCTAVES[0]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(8, 200), st.integers(8, 200)), min_size=1, max_size=8),
    factors=st.lists(st.floats(0.8, 1.25), min_size=8, max_size=8),
    bits=st.floats(1.0, 10.0),
)
def test_total_lies_in_the_window(shapes: list, factors: list, bits: float):
    curves = [curve_of(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
    codec = Codec(curves, factors)
    budget = bits * sum(c.count for c in curves) + 2 * smallest(curves)
    total = fit(curves, budget, codec)
    assert total == sum(codec.sizes.values())
    assert (1 - TOLERANCE) * budget <= total <= budget
    assert sorted(codec.sizes) == list(range(len(curves)))


@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=80))
def test_rounds_are_all_weights_the_largest_first(counts: list[int]):
    cut = rounds(counts)
    flat = [index for indices in cut for index in indices]
    assert sorted(flat) == list(range(len(counts)))
    assert [counts[i] for i in flat] == sorted(counts, reverse=True)
    left = sum(counts)
    for indices in cut:
        taken = sum(counts[i] for i in indices)
        assert len(indices) == 1 or (len(indices) <= ROUND and 2 * taken <= left)
        left -= taken


def test_many_equal_weights_make_few_rounds():
    assert [len(indices) for indices in rounds([1000] * 100)] == [16, 16, 16, 16, 16, 10, 5, 2, 1, 1, 1]


@pytest.mark.parametrize("error", [0.8, 1.25])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 60])
def test_estimates_that_are_wrong_alike_are_made_up_for(count: int, error: float):
    """A whole round is solved before its true sizes are known; the next ones still pay for what it took."""
    curves = [curve_of(gaussian(64, 64, seed)) for seed in range(count)]
    codec = Codec(curves, [error] * count)
    budget = 4.0 * sum(c.count for c in curves)
    assert (1 - TOLERANCE) * budget <= fit(curves, budget, codec) <= budget
    assert codec.calls <= 3 * count + 4


def test_equal_weights_get_equal_steps():
    curves = [curve_of(gaussian(64, 64, seed)) for seed in range(10)]
    codec = Codec(curves, [1.03] * 10)
    fit(curves, 4.0 * sum(c.count for c in curves), codec)
    steps = [math.log2(step) for step in codec.steps.values()]
    assert max(steps) - min(steps) < 0.25


def test_result_that_is_kept_is_the_one_counted():
    """Sizes in coarse leaps, so that the window cannot be met: the best below stands."""
    curves = [curve_of(gaussian(64, 64, seed)) for seed in range(2)]
    sizes: dict[int, int] = {}

    def leaping(asked: list[tuple[int, float]]) -> list[int]:
        found = {index: 4096 * 2 ** max(0, round(-math.log2(step))) for index, step in asked}
        sizes.update(found)
        return list(found.values())

    budget = 3.0 * 2 * 4096
    total = fit(curves, budget, leaping)
    assert total == sum(sizes.values()) <= budget


def test_nothing_below_the_budget_is_an_error():
    curves = [curve_of(gaussian(64, 64))]
    with pytest.raises(ValueError, match="no noise step meets 4096 bits; the closest costs 9000"):
        fit(curves, 4096.0, lambda asked: [9000] * len(asked))


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0, 8.0])
def test_true_codec_needs_few_trials(bits: float):
    weights = [gaussian(256, 128, seed) * 10.0**seed for seed in range(4)] + [gaussian(512, 128) ** 3]
    metrics = [Metric.relative(w) for w in weights]
    curves = [curve_of(w) for w in weights]
    sizes: dict[int, int] = {}
    calls: list[int] = []

    def solve(asked: list[tuple[int, float]]) -> list[int]:
        for index, step in asked:
            calls.append(index)
            sizes[index] = 8 * pack([solve_grid(weights[index], metrics[index], step).factors]).numel()
        return [sizes[index] for index, _ in asked]

    count = sum(c.count for c in curves)
    total = fit(curves, bits * count, solve)
    assert (1 - TOLERANCE) * bits <= total / count <= bits
    assert len(calls) <= 3 * len(weights)


def fit_twice(make: Callable[[], list[RateCurve]]) -> list[dict[int, float]]:
    steps = []
    for _ in range(2):
        curves = make()
        codec = Codec(curves, [1.1, 0.9, 1.2])
        fit(curves, 3.0 * sum(c.count for c in curves), codec)
        steps.append(codec.steps)
    return steps


def test_same_input_same_steps():
    first, second = fit_twice(lambda: [curve_of(gaussian(40, 50, seed)) for seed in range(3)])
    assert first == second
