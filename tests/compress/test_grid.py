"""Grid: steps follow the metric; the identity metric is plain rounding; codes at a price cost less."""

import pytest
import torch

from hf_sqf.compress.grid import grid_scales, narrow, solve_grid
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.solution import slope


def gaussian(m=200, n=80, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def test_identity_metric_is_plain_rounding_with_one_step():
    weight = gaussian()
    found = solve_grid(weight, Metric(), 0.25)
    (term,) = found.factors.terms
    assert term.steps.tolist() == [0] and term.rows.tolist() == [0]
    assert torch.equal(found.factors.dense(), torch.round(weight / 0.25) * 0.25)
    assert found.distortion == pytest.approx(weight.numel() * 0.25**2 / 12, rel=0.02)


def test_steps_follow_the_metric():
    n = 5
    lower = torch.eye(n, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    g = torch.tensor([1.0, 0.5, 0.25])
    scales = grid_scales(Metric(lower @ lower.T, g), 0.1)
    step = scales.step_values()[None] * scales.row_values()[:, None]
    assert torch.allclose(step, (0.1 / (lower.diagonal()[None] * g[:, None])).float(), rtol=2e-3)


def test_slope_is_what_a_bit_buys():
    weight, step = gaussian(400, 200), 0.3
    fine, coarse = (solve_grid(weight, Metric(), step * f) for f in (0.84, 1.19))
    assert (coarse.distortion - fine.distortion) / (fine.bits - coarse.bits) == pytest.approx(slope(step), rel=0.05)


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0, 1.6, 2.5])
@pytest.mark.parametrize("metric", [False, True])
def test_codes_at_their_price_cost_less(step, metric):
    weight = gaussian()
    lower = torch.randn(80, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tril() / 9
    lower += torch.eye(80, dtype=torch.float64)
    how = Metric(lower @ lower.T if metric else None)
    plain, priced = solve_grid(weight, how, step), solve_grid(weight, how, step, sparse=True)
    assert priced.cost(step) < plain.cost(step)
    assert priced.factors.structure == "pgd" and priced.factors.terms[0].atoms is None


def test_codes_take_the_narrowest_type():
    assert narrow(torch.tensor([-127.0, 0.0])).dtype == torch.int8
    assert narrow(torch.tensor([32767.0])).dtype == torch.int16
    assert narrow(torch.tensor([32768.0])).dtype == torch.int32
    with pytest.raises(ValueError, match="32 bits"):
        narrow(torch.tensor([2.0**31]))


def test_zeros():
    found = solve_grid(torch.zeros(3, 4), Metric.relative(torch.zeros(3, 4)), 0.5, sparse=True)
    assert found.distortion == 0.0 and not found.factors.dense().any()
