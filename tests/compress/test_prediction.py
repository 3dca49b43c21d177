"""Predicted costs against numerical integration and against what solving really takes."""

import pytest
import torch

from hf_sqf.compress.prediction import (
    ENTRY_COSTS,
    atoms_before_grid,
    atoms_that_pay,
    columns_cost,
    entry_cost,
    low_rank_cost,
)
from hf_sqf.compress.solution import slope


def rounded_gaussian(sigma, dead_zone):
    """Distortion + lambda entropy of a Gaussian rounded with step 1 and a dead zone, by integration."""
    x = torch.linspace(-12 * sigma, 12 * sigma, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * (x / sigma) ** 2)
    density /= density.sum()
    codes = torch.where(x.abs() > dead_zone, x.round(), 0.0)
    p = torch.bincount((codes - codes.min()).long(), density)
    p = p[p > 0]
    return float((density * (x - codes) ** 2).sum() - slope(1.0) * (p * p.log2()).sum())


@pytest.mark.parametrize("octave", [-4, -2, 0, 3, 6])
def test_table_is_the_best_dead_zone(octave):
    costs = [rounded_gaussian(2.0 ** (octave / 2), 0.5 + 0.05 * i) for i in range(15)]
    best = min([*costs, 2.0**octave])  # or nothing is kept
    assert ENTRY_COSTS[octave + 4] == pytest.approx(best, rel=2e-3)


def test_between_and_beyond_the_table():
    energy = torch.tensor([0.0, 0.01, 1.0, 2.0**0.5, 2.0, 64.0, 256.0])
    cost = entry_cost(energy)
    assert cost[0] == 0.0 and float(cost[1]) == pytest.approx(0.01)
    assert bool((cost.diff() > 0).all())
    assert float(cost[6] - cost[5]) == pytest.approx(slope(1.0), rel=1e-2)  # two octaves of energy: a bit


def test_low_rank_and_noise():
    strong, weak = torch.full((4,), 4000.0), torch.full((60,), 1.0)
    power = torch.cat([strong, weak]).double()
    assert atoms_that_pay(power, 64, 64) == 4
    assert low_rank_cost(power, 64, 64) < float(power.sum())
    count, saving = atoms_before_grid(power, 64, 64)
    assert count == 4 and saving > 0
    flat = torch.full((64,), 64.0, dtype=torch.float64)
    assert atoms_before_grid(flat, 64, 64) == (0, 0.0)
    assert columns_cost(flat, 64) < low_rank_cost(flat, 64, 64)
