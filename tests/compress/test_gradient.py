"""The descent never rises, keeps its constraints, and reduces to what textbooks say of each structure."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from sklearn.cluster import KMeans

from hf_sqf.compress.gradient import (
    gram,
    least_squares_codes,
    lipschitz,
    nearest_atom,
    objective,
    projected_gradient,
    weigh,
)
from hf_sqf.compress.prices import prices_of
from hf_sqf.compress.projections import Everything, Grid, OneHot, PricedGrid, RowSparse, TopK
from hf_sqf.compress.solution import Status
from hf_sqf.compress.starts import kmeans_plus_plus, principal_of_moments, principal_of_rows

FREE = Everything()


def draw(m, n, seed=0, metric=False):
    """A correlated matrix X, and H or None."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return x, (mix @ mix.T / n + 0.05 * torch.eye(n, dtype=torch.float64)) if metric else None


def tail(x, H, rank):
    """The sum of the squared singular values of X L after the first ``rank``."""
    whitened = x if H is None else x @ torch.linalg.cholesky(H)
    return float(torch.linalg.svdvals(whitened)[rank:].square().sum())


@pytest.mark.parametrize("metric", [False, True])
def test_without_constraints_it_is_the_truncated_svd(metric):
    x, H = draw(60, 12, metric=metric)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    atoms = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    found = projected_gradient(x, codes, atoms, FREE, FREE, H, iterations=5000, tolerance=1e-10)
    assert found.status is Status.CONVERGED
    assert found.trace[-1] == pytest.approx(tail(x, H, 4), rel=1e-4)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])
def test_svd_start_is_optimal_at_once(shape, metric):
    x, H = draw(*shape, metric=metric)
    lower = None if H is None else torch.linalg.cholesky(H)
    atoms, power = principal_of_rows(x, H) if shape[0] < shape[1] else principal_of_moments(x.T @ x, lower)
    atoms = atoms[:5]
    assert torch.allclose(weigh(atoms, H) @ atoms.T, torch.eye(5, dtype=torch.float64), atol=1e-8)
    found = projected_gradient(x, weigh(x, H) @ atoms.T, atoms, FREE, FREE, H)
    assert found.trace[0] == pytest.approx(tail(x, H, 5), rel=1e-8)
    assert found.status is Status.CONVERGED and found.trace[-1] == pytest.approx(found.trace[0])
    assert float(power[5:].sum()) == pytest.approx(tail(x, H, 5), rel=1e-8)


def test_one_hot_codes_are_lloyds_kmeans():
    x, _ = draw(400, 3)
    start = kmeans_plus_plus(x, 7, seed=3)
    codes = nearest_atom(x, x, start, OneHot(), None)
    found = projected_gradient(x, codes, start, OneHot(), FREE, inner=nearest_atom, iterations=200, tolerance=0.0)
    centres, labels = kmeans2(x.numpy(), start.numpy(), iter=200, minit="matrix")
    assert np.array_equal(found.codes.numpy(), labels)
    assert np.allclose(found.dictionary.numpy(), centres)
    fit = KMeans(7, init=start.numpy(), n_init=1, tol=0.0, algorithm="lloyd", max_iter=200).fit(x.numpy())
    assert found.trace[-1] == pytest.approx(fit.inertia_)


def test_one_hot_codes_in_a_metric_are_kmeans_of_whitened_rows():
    x, H = draw(200, 4, metric=True)
    lower = torch.linalg.cholesky(H)
    start = kmeans_plus_plus(x, 5, seed=0, lower=lower)
    codes = nearest_atom(x, x, start, OneHot(), H)
    plain = nearest_atom(x @ lower, x, start @ lower, OneHot(), None)
    assert torch.equal(codes, plain)


def test_dense_and_index_codes_agree():
    x, H = draw(30, 4, metric=True)
    atoms = x[:6].clone()
    index = torch.arange(30) % 6
    dense = torch.nn.functional.one_hot(index, 6).double()
    assert objective(x, index, atoms, H) == pytest.approx(objective(x, dense, atoms, H))
    assert torch.equal(gram(dense, 6).diagonal(), gram(index, 6))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["svd", "sparse_pca", "pgd", "price"]), metric=st.booleans())
@settings(max_examples=40, deadline=None)
def test_objective_never_rises_and_constraints_hold(seed, kind, metric):
    x, H = draw(24, 8, seed, metric)
    x = 4.0 * x
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    codes = least_squares_codes(x, atoms, H)
    sets = {
        "svd": Grid(1.0),
        "sparse_pca": Grid(1.0) @ RowSparse(2),
        "pgd": Grid(1.0) @ TopK(40),
        "price": PricedGrid(prices_of(codes)),
    }
    found = projected_gradient(x, codes, atoms, sets[kind], Grid(0.125), H, iterations=30)
    assert all(after <= before for before, after in zip(found.trace, found.trace[1:], strict=False))
    assert torch.isfinite(found.codes).all() and torch.isfinite(found.dictionary).all()
    assert torch.equal(found.codes.round(), found.codes)
    assert torch.equal((8 * found.dictionary).round(), 8 * found.dictionary)
    if kind == "sparse_pca":
        assert int((found.codes != 0).sum(1).max()) <= 2
    if kind == "pgd":
        assert int(torch.count_nonzero(found.codes)) <= 40


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_lipschitz_bounds_the_moments(seed):
    codes, _ = draw(20, 6, seed)
    moments = gram(codes, 6)
    assert float(torch.linalg.eigvalsh(lipschitz(moments).diag() - moments)[0]) >= -1e-9 * float(moments.trace())


def test_nothing_to_do_is_no_nan():
    zero = torch.zeros(6, 4, dtype=torch.float64)
    found = projected_gradient(zero, zero[:, :2].clone(), torch.zeros(2, 4, dtype=torch.float64), FREE, Grid(1.0))
    assert found.trace[-1] == 0.0 and torch.equal(found.dictionary, torch.zeros_like(found.dictionary))


def test_iteration_limit_is_reported():
    x, _ = draw(60, 12)
    codes, atoms = torch.ones(60, 3, dtype=torch.float64), x[:3].clone()
    assert projected_gradient(x, codes, atoms, FREE, FREE, iterations=1).status is Status.ITERATION_LIMIT
