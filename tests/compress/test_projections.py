"""Projections are idempotent, meet their constraint exactly, and no point of their set lies nearer."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sqf.compress.prices import prices_of, round_at_price
from hf_sqf.compress.projections import Everything, Grid, OneHot, PricedGrid, RowSparse, TopK

CASES = {
    "everything": Everything(),
    "grid": Grid(0.3),
    "top_k": TopK(4),
    "row_sparse": RowSparse(2),
    "one_hot": OneHot(),
    "grid_top_k": Grid(0.3) @ TopK(4),
    "grid_row_sparse": Grid(0.3) @ RowSparse(2),
}
MATRICES = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
)


def belongs(name, x):
    """Whether a matrix lies in the set of the case."""
    counts = {
        "top_k": lambda: torch.count_nonzero(x) <= 4,
        "row_sparse": lambda: bool(((x != 0).sum(1) <= 2).all()),
        "one_hot": lambda: bool(((x != 0).sum(1) == 1).all()) and bool((x.sum(1) == 1).all()),
        "grid": lambda: torch.allclose((x / 0.3).round() * 0.3, x, atol=1e-12),
    }
    return all(check() for part, check in counts.items() if part in name)


@pytest.mark.parametrize("name", CASES)
@given(x=MATRICES)
@settings(max_examples=30, deadline=None)
def test_idempotent_and_exact(name, x):
    once = CASES[name](x)
    assert belongs(name, once)
    assert torch.equal(CASES[name](once), once)


@pytest.mark.parametrize("name", CASES)
@given(x=MATRICES, other=MATRICES)
@settings(max_examples=30, deadline=None)
def test_nearest(name, x, other):
    project = CASES[name]
    assert (x - project(x)).norm() <= (x - project(other)).norm() + 1e-12


def test_composition_is_nearest_of_all():
    """Against every point of a small set: two nonzeros at most, multiples of one half."""
    x = torch.tensor([[0.9, -0.6, 0.55, 0.26]], dtype=torch.float64)
    points = [torch.tensor([p]) / 2 for p in itertools.product(range(-3, 4), repeat=4)]
    allowed = [p for p in points if torch.count_nonzero(p) <= 2]
    best = min(float((x - p).norm()) for p in allowed)
    assert float((x - (Grid(0.5) @ TopK(2))(x)).norm()) == pytest.approx(best)


def test_ties_do_not_exceed_the_limit():
    x = torch.ones(3, 4)
    assert torch.count_nonzero(TopK(5)(x)) == 5
    assert (RowSparse(2)(x) != 0).sum(1).tolist() == [2, 2, 2]
    assert torch.count_nonzero(TopK(0)(x)) == 0


@given(seed=st.integers(0, 1000), scale=st.floats(0.05, 8.0))
@settings(max_examples=40, deadline=None)
def test_priced_rounding_is_the_cheapest(seed, scale):
    targets = scale * torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prices = prices_of(targets)
    assert (prices.diff() >= 0).all() and float(prices[0]) >= 0 and float(prices[-1]) <= 1
    table = torch.cat([prices.new_zeros(1), prices.cumsum(0)])
    levels = torch.arange(-60, 61, dtype=torch.float64)
    size = levels.abs()
    past = (size - len(prices)).clamp_min(0) * prices[-1]
    cost = (targets[:, None] - levels) ** 2 + table[size.clamp(max=len(prices)).long()] + past
    chosen = round_at_price(targets, prices)
    reached = cost.gather(1, (chosen[:, None] + 60).long())[:, 0]
    assert torch.allclose(reached, cost.min(1).values, atol=1e-12)
    grid = PricedGrid(prices)
    assert grid.penalty(chosen) == pytest.approx(float((reached - (targets - chosen) ** 2).sum()), abs=1e-9)


def test_zero_has_a_dead_zone_where_codes_are_rare():
    targets = 0.4 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    prices = prices_of(targets)
    assert float(round_at_price(torch.tensor([0.6]), prices)) == 0.0
    assert float(round_at_price(torch.tensor([-0.99]), prices)) == -1.0
