"""Sums, the choices that structures make, and auto, which must not do worse than any of them."""

import pytest
import torch

from hf_sqf.compress import auto
from hf_sqf.compress.auto import solve_auto
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.rate import atom_bits
from hf_sqf.compress.solution import Problem, slope
from hf_sqf.compress.structures import SOLVERS, solve_sum


def noise(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def weights(times=1):
    """Weights that call for one structure or another, ``times`` as many rows as they have at least."""
    book = noise(16, 4, 1)[torch.randint(16, (times * 64 * 16,), generator=torch.Generator().manual_seed(2))]
    basis = torch.linalg.qr(noise(24, 24, 3)).Q
    return {
        "white": noise(times * 96, 64),
        "low rank": noise(times * 96, 4, 1) @ noise(4, 64, 2),
        "low rank and noise": 4 * noise(times * 256, 1, 1) @ noise(1, 128, 2) + noise(times * 256, 128),
        "repeated blocks": book.reshape(times * 64, 64),
        "tall, few directions": noise(times * 4000, 24) * torch.logspace(0, -2, 24) @ basis,
    }


EXPECTED = {
    "white": {"pgd"},
    "low rank": {"svd", "pgd", "sparse_pca"},
    "low rank and noise": {"svd+grid"},
    "repeated blocks": {"vq"},
    "tall, few directions": {"pgd"},
}


@pytest.mark.parametrize("step", [0.1, 0.5, 1.8])
@pytest.mark.parametrize("name", EXPECTED)
def test_auto_is_never_worse_than_a_single_structure(name, step):
    weight = weights()[name]
    problem = Problem(weight, Metric.relative(weight), step)
    best = solve_auto(problem)
    for structure, solver in SOLVERS.items():
        assert best.cost(step) <= solver(problem).cost(step) * (1 + 1e-9), structure
    assert best.cost(step) <= solve_sum(problem, "svd", "grid").cost(step) * 1.002
    if step == 0.5:
        assert best.factors.structure in EXPECTED[name]


@pytest.mark.parametrize("step", [0.3, 1.2])
@pytest.mark.parametrize("name", EXPECTED)
def test_auto_compares_on_a_sample_of_large_weights(name, step, monkeypatch):
    weight = weights(times=6)[name]
    problem = Problem(weight, Metric.relative(weight), step)
    whole = solve_auto(problem)
    monkeypatch.setattr(auto, "SAMPLE", weight.numel() // 4)
    monkeypatch.setattr(auto, "ROWS_TO_COLUMNS", 0)
    sampled = solve_auto(problem)
    assert sampled.factors.shape == tuple(weight.shape)
    assert sampled.cost(step) <= whole.cost(step) * 1.02


def test_a_sample_of_a_problem():
    weight = torch.cat([noise(400, 1, 1) @ noise(1, 20, 2), noise(1, 20, 3)])
    metric = Metric(torch.eye(20), torch.linspace(0.5, 2.0, 401))
    problem = Problem(weight, metric, 0.3)
    few = problem.sample(2005)
    torch.testing.assert_close(few.weight, weight[::4])
    torch.testing.assert_close(few.metric.row_weights(), metric.row_weights()[::4])
    assert few.stands_for == pytest.approx(401 / 101)
    assert problem.sample(weight.numel()) is problem
    again = few.sample(1010)
    assert again.stands_for == pytest.approx(401 / 51)
    # Atoms serve all rows: a sample of them bears its share of their bits.
    found, share = SOLVERS["svd"](few), 1.0 / few.stands_for
    atoms = sum(atom_bits(term) for term in found.factors.terms)
    assert few.cost(found) == pytest.approx(found.cost(0.3) - slope(0.3) * (1.0 - share) * atoms)
    assert problem.cost(found) == found.cost(0.3)


def test_pgd_from_the_svd_of_tall_weights():
    weight = weights()["tall, few directions"]
    found = SOLVERS["pgd"](Problem(weight, Metric.relative(weight), 0.3))
    assert found.start == "svd"
    white = noise(96, 64)
    assert SOLVERS["pgd"](Problem(white, Metric.relative(white), 0.3)).start == "identity"


def test_sum_is_low_rank_plus_sparse():
    weight = weights()["low rank and noise"]
    problem = Problem(weight, Metric.relative(weight), 0.5)
    found = solve_sum(problem, "svd", "grid")
    low, sparse = found.factors.terms
    assert found.factors.structure == "svd+grid" and low.atom_count == 1 and sparse.atoms is None
    assert found.distortion == pytest.approx(problem.metric.distance(weight, found.factors.dense()))
    assert found.cost(0.5) < 0.9 * SOLVERS["grid"](problem).cost(0.5)


@pytest.mark.parametrize("names", [("vq", "grid"), ("grid", "svd"), ("pgd", "svd")])
def test_any_two_may_be_added(names):
    weight = weights()["low rank and noise"]
    problem = Problem(weight, Metric.relative(weight), 0.7)
    found = solve_sum(problem, *names)
    assert found.factors.structure == "+".join(names)
    assert found.distortion <= SOLVERS[names[0]](problem).distortion * 1.01


def test_sum_without_low_rank_is_the_second_alone():
    white = noise(96, 64)
    found = solve_sum(Problem(white, Metric.relative(white), 0.5), "svd", "grid")
    assert len(found.factors.terms) == 1


def test_zeros():
    zero = torch.zeros(8, 6)
    found = solve_auto(Problem(zero, Metric.relative(zero), 0.5))
    assert found.distortion == 0.0 and not found.factors.dense().any()
