"""Interference cancellation against a slow reference, and the identities that it rests on."""

import pytest
import torch

from hf_sqf.compress.rounding import BLOCK, cancel_and_round, column_by_column, interference, nearest, round_in_metric


def problem(m, n, seed=0, correlated=True):
    """A weight, a Cholesky factor and steps c / L_jj."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=draw)
    mix = torch.randn(n, n, generator=draw) / n**0.5
    H = mix @ mix.T + 0.05 * torch.eye(n) if correlated else torch.diag(torch.rand(n, generator=draw) + 0.1)
    lower = torch.linalg.cholesky(H.double())
    return weight, H.double(), lower, (0.3 / lower.diagonal()).float()


def reference(weight, steps, rows, lower):
    """The recursion as it is written, one column at a time, in float64."""
    w, steps, rows = weight.double(), steps.double(), rows.double()
    codes, error = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(w.shape[1] - 1, -1, -1):
        target = w[:, j] + error[:, j + 1 :] @ lower[j + 1 :, j] / lower[j, j]
        codes[:, j] = (target / (steps[j] * rows)).round()
        error[:, j] = w[:, j] - codes[:, j] * steps[j] * rows
    return codes


@pytest.mark.parametrize("n", [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_equals_the_recursion_column_by_column(n):
    weight, _, lower, steps = problem(9, n)
    rows = torch.linspace(0.5, 2.0, 9)
    got = round_in_metric(weight, steps, rows, lower)
    expected = reference(weight, steps, rows, lower)
    # Where a target lies on the border of two cells, float32 may fall to the other side: from there on a row differs.
    same_rows = (got == expected).all(1)
    assert same_rows.double().mean() >= 0.75
    assert torch.equal(got, got.round())


def test_distance_is_the_sum_of_squared_residuals():
    weight, H, lower, steps = problem(6, 80)
    residuals = {}

    def keep(targets, column):
        codes = nearest(targets, column)
        residuals[column] = (targets - codes) * steps[column]
        return codes

    codes = round_in_metric(weight, steps, torch.ones(1), lower, keep)
    error = weight.double() - codes.double() * steps.double()
    distance = ((error @ H) * error).sum()
    residual = torch.stack([residuals[j] for j in range(80)], 1).double()
    torch.testing.assert_close((residual * lower.diagonal()).square().sum(), distance, rtol=1e-4, atol=0)


def test_nearer_in_the_metric_than_plain_rounding():
    weight, H, lower, steps = problem(32, 96)

    def distance(codes):
        error = weight.double() - codes.double() * steps.double()
        return float(((error @ H) * error).sum())

    plain = (weight / steps).round()
    assert distance(round_in_metric(weight, steps, torch.ones(1), lower)) < 0.8 * distance(plain)


def test_diagonal_metric_is_plain_rounding():
    weight, _, lower, steps = problem(7, 70, correlated=False)
    plain = (weight / steps).round()
    assert torch.equal(round_in_metric(weight, steps, torch.ones(1), lower), plain)
    assert torch.equal(round_in_metric(weight, steps, torch.ones(1), None), plain)
    assert torch.equal(round_in_metric(weight, steps, torch.ones(1), None, nearest), plain)


def test_rows_do_not_touch():
    weight, _, lower, steps = problem(40, 130)
    rows = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    every = round_in_metric(weight, steps, rows, lower)
    some = torch.tensor([3, 17, 39])
    assert (round_in_metric(weight[some], steps, rows[some], lower) == every[some]).double().mean() > 0.99


def test_a_common_factor_of_the_steps_does_not_change_the_interference():
    _, _, lower, steps = problem(1, 20)
    torch.testing.assert_close(interference(lower, steps), interference(lower, 7.0 * steps))
    assert torch.equal(interference(lower, steps).diagonal(), torch.ones(20))


def test_rounder_sees_every_column_once_from_the_last_to_the_first():
    weight, _, lower, steps = problem(3, BLOCK + 5)
    seen = []

    def note(targets, column):
        seen.append(column)
        assert targets.shape == (3,) and targets.is_contiguous()
        return nearest(targets, column)

    cancel_and_round(weight / steps, interference(lower, steps), column_by_column(note))
    assert seen == list(range(BLOCK + 4, -1, -1))
