"""Rounding a whole weight along a trellis."""

import math

import numpy as np
import pytest
import torch

from hf_sqf.compress.dependent import PRICE, Prices, along_paths, chunk_rows, contexts_of, solve_dependent
from hf_sqf.compress.grid import solve_grid
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.rounding import BLOCK, cancel_and_round, column_by_column, interference
from hf_sqf.compress.trellis import sources, viterbi
from hf_sqf.runtime.sqf_container import pack, unpack


def correlated_metric(n: int, m: int) -> Metric:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return Metric(x.T @ x / len(x), 0.5 + torch.rand(m, generator=generator))


def equivalent_rate(found, weight) -> float:
    """Bits that a solution would need at an error of 1: of two, the lower one is better."""
    bits = 8 * pack([found.factors]).numel() / weight.numel()
    return bits + 0.5 * math.log2(found.distortion / weight.numel())


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (50, 1), (37, 23)])
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("states", [4, 64])
def test_factors_pack_and_come_back(shape, with_metric, states):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    metric = correlated_metric(shape[1], shape[0]) if with_metric else Metric.relative(weight)
    found = solve_dependent(weight, metric, 0.7, states)
    (back,) = unpack(pack([found.factors]))
    assert back.terms[0].trellis == states
    assert torch.equal(back.dense(), found.factors.dense())
    assert found.distortion == pytest.approx(metric.distance(weight, found.factors.dense()))


@pytest.mark.parametrize("with_metric", [False, True])
def test_saves_bits_over_scalar_rounding_and_more_with_more_states(with_metric):
    weight = torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    metric = correlated_metric(96, 400) if with_metric else Metric.relative(weight)
    step = 0.6 * float(metric.distance(weight, None) / weight.numel()) ** 0.5 * (0.3 if with_metric else 1.0)
    rates = [equivalent_rate(solve_grid(weight, metric, step), weight)]
    rates += [equivalent_rate(solve_dependent(weight, metric, step, states), weight) for states in (4, 64)]
    assert rates[1] < rates[0] - 0.1
    assert rates[2] < rates[1]


def test_error_and_slope_match_those_of_the_scalar_step():
    weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    metric = Metric.relative(weight)
    scalar, along = solve_grid(weight, metric, 0.4), solve_dependent(weight, metric, 0.4, 8)
    assert along.distortion == pytest.approx(scalar.distortion, rel=0.12)


def test_the_machine_starts_anew_with_each_chunk_of_the_codec():
    weight = torch.randn(60_000, 20, generator=torch.Generator().manual_seed(0))
    assert chunk_rows(60_000, 20) < 60_000
    found = solve_dependent(weight, Metric.relative(weight), 0.5, 4)
    (back,) = unpack(pack([found.factors]))
    assert torch.equal(back.dense(), found.factors.dense())


def test_same_codes_on_any_number_of_threads():
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        codes = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes.append(solve_dependent(weight, Metric.relative(weight), 0.5, 8).factors.terms[0].codes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*codes)


def test_zeros():
    found = solve_dependent(torch.zeros(30, 12), Metric.relative(torch.zeros(30, 12)), 0.5, 8)
    assert found.distortion == 0.0 and not found.factors.dense().any()


@pytest.mark.parametrize("shape", [(1, 1), (9, BLOCK), (40, 2 * BLOCK + 3)])
def test_compiled_blocks_round_as_column_by_column(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    lower = correlated_metric(shape[1], shape[0]).cholesky()
    couplings = interference(lower, torch.ones(1))
    values = weight / 0.4
    contexts = contexts_of(values.round().to(torch.int32).numpy(), trellis=0)
    prices = Prices.of(contexts)

    def column(targets, j):
        classes = np.clip(prices.rows + prices.cols[j], 0, len(prices.rates) - 1).astype(np.int32)
        out = np.empty(len(targets), np.int32)
        viterbi(targets.numpy(), classes, prices.rates, np.float32(PRICE), sources(8), out)
        return torch.from_numpy(out)

    expected = cancel_and_round(values, couplings, column_by_column(column)).to(torch.int32).numpy()
    got = along_paths(values, couplings, prices, 8)
    # Sums of float32 in another order: where a target lies on the border of two paths, a row may go another way.
    assert (got == expected).all(1).mean() >= 0.9
