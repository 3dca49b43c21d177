"""Factors of codes and dictionary: structures that a weight has are found, constraints hold, blocks and metrics too."""

import math
from dataclasses import replace

import pytest
import torch

from hf_sqf.compress.metric import Metric
from hf_sqf.compress.solution import Problem
from hf_sqf.compress.two_factor import STRUCTURES, Blocks, solve_two_factor
from hf_sqf.runtime import sqf_symbols
from hf_sqf.runtime.sqf_container import pack, unpack


def low_rank(m=120, n=48, rank=3, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return product + noise * torch.randn(m, n, generator=generator)


def problem(weight, step=0.2, metric=None, **options):
    return Problem(weight, metric or Metric.relative(weight), step, **options)


def mixed(m, n):
    """Return a metric in which columns go together and rows differ, for weights (m, n)."""
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Metric(mix @ mix.T / n + 0.1 * torch.eye(n), torch.linspace(0.5, 2.0, m))


def test_svd_finds_the_rank_and_nears_its_error():
    weight = low_rank()
    found = solve_two_factor(Blocks(problem(weight)), "svd")
    (term,) = found.factors.terms
    assert term.atom_count == 3
    tail = float(torch.linalg.svdvals(weight.double())[3:].square().sum()) * float(problem(weight).metric.g) ** 2
    noise = (120 + 48) * 3 * 0.2**2 / 12
    assert tail < found.distortion < tail + 1.3 * noise


def test_svd_without_noise_is_exact_at_fine_steps():
    weight = low_rank(noise=0.0)
    found = solve_two_factor(Blocks(problem(weight, 1e-4)), "svd")
    assert found.factors.terms[0].atom_count == 3
    assert found.distortion / weight.numel() < 1e-7


def test_sparse_pca_meets_its_k_in_every_row():
    weight = low_rank(rank=12, noise=0.0)
    blocks = Blocks(problem(weight, 2.0))
    codes, _ = STRUCTURES["sparse_pca"].start(blocks, blocks.sample(), lambda power, *_: 12)
    k = STRUCTURES["sparse_pca"].codes(codes).first.k
    found = solve_two_factor(blocks, "sparse_pca", count=lambda power, *_: 12)
    used = (found.factors.terms[0].codes != 0).sum(1)
    assert 1 <= k < 12 and int(used.max()) <= k


def test_vq_finds_repeated_blocks():
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(6, 4, generator=generator)
    weight = book[torch.randint(6, (64, 10), generator=generator)].reshape(64, 40)
    found = solve_two_factor(Blocks(problem(weight, 0.5), 4), "vq")
    (term,) = found.factors.terms
    assert term.one_hot and term.codes.shape == (640,) and term.width == 4
    usage = torch.bincount(term.codes.long())
    assert bool((usage.diff() <= 0).all())
    assert found.distortion < 0.01 * weight.numel()
    assert found.start == "k-means"


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("width", [None, 7])
@pytest.mark.parametrize("metric", [False, True])
def test_any_shape_metric_and_block(structure, width, metric):
    weight = low_rank(30, 20, 4, 0.3)
    case = problem(weight, 0.5, mixed(30, 20) if metric else None)
    found = solve_two_factor(Blocks(case, width), structure)
    dense = found.factors.dense()
    assert dense.shape == (30, 20) and torch.isfinite(dense).all()
    assert found.distortion == pytest.approx(case.metric.distance(weight, dense))
    assert found.distortion < case.metric.distance(weight, None)
    (term,) = found.factors.terms
    assert term.width == (width or 20) and term.step_resolution == 1
    assert all(after <= before for before, after in zip(found.trace, found.trace[1:], strict=False))
    assert math.isfinite(found.bits) and found.iterations == len(found.trace) - 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_zeros_and_wide_weights(structure):
    zero = torch.zeros(5, 9)
    found = solve_two_factor(Blocks(problem(zero)), structure)
    assert found.distortion == 0.0 and not found.factors.dense().any()
    wide = low_rank(6, 50, 2)
    assert solve_two_factor(Blocks(problem(wide)), structure).distortion < wide.numel()


def test_large_weights_learn_on_a_sample(monkeypatch):
    weight = low_rank(2000, 16, 3, 0.05)
    whole = solve_two_factor(Blocks(problem(weight)), "pgd")
    module = solve_two_factor.__globals__
    monkeypatch.setitem(module, "SAMPLE", 1 << 12)
    monkeypatch.setitem(module, "_CHUNK", 1 << 11)
    blocks = Blocks(problem(weight))
    assert len(blocks.sample()) < 300
    sampled = solve_two_factor(blocks, "pgd")
    assert sampled.factors.terms[0].codes.shape[0] == 2000
    assert sampled.cost(0.2) == pytest.approx(whole.cost(0.2), rel=0.03)


@pytest.mark.parametrize("structure", ["svd", "pgd"])
@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("metric", [False, True])
def test_codes_over_a_dictionary_along_a_trellis(structure, width, metric):
    weight = low_rank(900, 24, 8, 0.1)
    case = problem(weight, 0.3, mixed(900, 24) if metric else None)
    scalar = solve_two_factor(Blocks(case, width), structure)
    found = solve_two_factor(Blocks(replace(case, trellis=8), width), structure)
    (term,) = found.factors.terms
    assert term.trellis == 8 and found.cost(0.3) < scalar.cost(0.3)
    (again,) = unpack(pack([found.factors]))
    assert torch.equal(again.dense(), found.factors.dense())
    assert found.distortion == pytest.approx(case.metric.distance(weight, again.dense()))


def test_a_trellis_over_a_dictionary_starts_anew_with_the_chunks_of_the_codec(monkeypatch):
    weight = low_rank(700, 16, 6, 0.1)
    monkeypatch.setattr(sqf_symbols, "CHUNK", 1 << 10)
    found = solve_two_factor(Blocks(problem(weight, 0.3, trellis=8), 8), "svd")
    assert found.factors.terms[0].trellis == 8
    (again,) = unpack(pack([found.factors]))
    assert torch.equal(again.dense(), found.factors.dense())


def test_codes_of_constrained_sets_stay_scalar():
    weight = low_rank(300, 24, 8, 0.1)
    for structure in ("sparse_pca", "vq"):
        assert solve_two_factor(Blocks(problem(weight, 0.3, trellis=8)), structure).factors.terms[0].trellis == 0
