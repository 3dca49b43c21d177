"""The distance against its definition, its factor, and what it is in codes and in blocks."""

import logging

import pytest
import torch

from hf_sqf.compress.metric import Metric


def draw(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight, approx = torch.randn(2, m, n, generator=generator)
    return weight, approx, Metric(mix @ mix.T / n, torch.rand(m, generator=generator) + 0.1)


def test_distance_is_the_trace():
    weight, approx, metric = draw(7, 5)
    error = (weight - approx).double()
    expected = torch.trace(metric.g.double().square().diag() @ error @ metric.H @ error.T)
    assert metric.distance(weight, approx) == pytest.approx(float(expected))
    assert Metric().distance(weight, None) == pytest.approx(float(weight.double().square().sum()))


def test_relative_counts_energy_per_parameter():
    weight = 3.0 * torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    metric = Metric.relative(weight)
    assert metric.uniform and metric.distance(weight, None) == pytest.approx(200.0)
    assert Metric.relative(torch.zeros(2, 2)).distance(torch.ones(2, 2), None) == 4.0


def test_cholesky_gives_back_h():
    metric = draw(3, 6)[2]
    lower = metric.cholesky()
    assert torch.allclose(lower @ lower.T, metric.H) and torch.equal(lower, lower.tril())
    assert metric.cholesky() is lower


def test_singular_h_is_damped_and_said_so(caplog):
    row = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        lower = Metric(row.T @ row).cholesky()
    assert torch.isfinite(lower).all() and float(lower.diagonal().min()) > 0
    assert "singular" in caplog.text


@pytest.mark.parametrize("H", [torch.full((2, 2), torch.nan), -torch.eye(2), torch.tensor([[1.0, 3.0], [3.0, 1.0]])])
def test_impossible_h_is_refused(H):
    with pytest.raises(ValueError, match="semidefinite"):
        Metric(H).cholesky()


def test_identity_has_no_factor():
    with pytest.raises(ValueError, match="identity"):
        Metric().cholesky()


@pytest.mark.parametrize("identity", [False, True])
def test_metric_of_codes(identity):
    weight, _, metric = draw(7, 5)
    metric = Metric(None, metric.g) if identity else metric
    codes, dictionary = weight[:, :3], torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    inside = metric.in_dictionary(dictionary)
    expected = metric.distance(codes.double() @ dictionary.double(), None)
    assert inside.distance(codes, None) == pytest.approx(expected)


def test_blocks_see_the_mean_of_their_diagonal_blocks():
    first, second = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0, 6.0]))
    blocks = Metric(torch.block_diag(first, second), torch.tensor([1.0, 2.0])).of_blocks(2, 2)
    assert torch.allclose(blocks.H, ((first + second) / 2).double())
    assert blocks.g.tolist() == [1.0, 1.0, 2.0, 2.0]
    padded = Metric(torch.eye(3)).of_blocks(2, 2).H
    assert padded.diagonal().tolist() == [1.0, 0.5]
