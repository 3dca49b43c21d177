"""factorize: bits as in the packed bytes, from below; bad input is named; threads do not matter."""

import pytest
import torch

from hf_sqf.compress.factorize import TOLERANCE, factorize, solve
from hf_sqf.compress.metric import Metric
from hf_sqf.runtime.sqf_container import pack, unpack

STRUCTURES = ["auto", "grid", "svd", "sparse_pca", "pgd", "svd+grid"]


def weight(m=256, n=192, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(m, 6, generator=generator) @ torch.randn(6, n, generator=generator)
    return 0.02 * (torch.randn(m, n, generator=generator) + 0.7 * low)


@pytest.mark.parametrize("bits", [1.0, 2.5, 5.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_bits_are_met_from_below(structure, bits):
    w = weight()
    found = factorize(w, structure, bits)
    assert found.bits == 8 * pack([found.factors]).numel()
    assert (1 - 2 * TOLERANCE) * bits <= found.bits / w.numel() <= bits


@pytest.mark.parametrize("bits", [1.0, 2.5])
def test_vq_keeps_below(bits):
    found = factorize(weight(), "vq", bits)
    assert 0.9 * bits <= found.bits / weight().numel() <= bits


def test_more_bits_less_error():
    errors = [factorize(weight(), "auto", bits).distortion for bits in (0.5, 1.5, 3.0, 8.0)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("structure", [*STRUCTURES, "vq"])
def test_what_is_packed_is_what_was_solved(structure):
    found = factorize(weight(), structure, 2.0)
    (read,) = unpack(pack([found.factors]))
    assert torch.equal(read.dense(), found.factors.dense())


@pytest.mark.parametrize("structure", ["auto", "vq", "pgd", "svd+grid"])
@pytest.mark.parametrize("step", [0.4, 1.5])
def test_threads_do_not_matter(structure, step):
    w, before, packed = weight(600, 48), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed.append(pack([solve(w, step=step, structure=structure).factors]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float(dtype):
    w = weight().to(dtype)
    assert factorize(w, "auto", 3.0).distortion < 0.1 * w.numel()


def test_in_a_metric():
    w = weight()
    mix = torch.randn(192, 192, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    H = mix @ mix.T / 192 + 0.1 * torch.eye(192)
    metric = Metric(H, torch.linspace(0.5, 2.0, 256))
    plain, aware = factorize(w, "grid", 5.0), factorize(w, "grid", 5.0, metric)
    assert aware.distortion < 0.7 * metric.distance(w, plain.factors.dense())
    assert factorize(w, "auto", 5.0, metric).distortion <= 1.02 * aware.distortion


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused_by_name(value):
    w = weight()
    w[3, 4] = value
    with pytest.raises(ValueError, match="layer.3.weight"):
        factorize(w, name="layer.3.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0.0}, "bits"),
        ({"bits": 17.0}, "bits"),
        ({"structure": "wavelet"}, "structure"),
        ({"structure": "svd+grid+vq"}, "structure"),
        ({"block": 0}, "block"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        factorize(weight(), **change)


@pytest.mark.parametrize("w", [torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int32)])
def test_not_a_matrix_of_floats(w):
    with pytest.raises(ValueError, match="matrix of floats"):
        solve(w)


def test_out_of_reach():
    with pytest.raises(ValueError, match="smallest reachable"):
        factorize(torch.ones(2, 2), bits=0.1)


def test_zeros():
    found = factorize(torch.zeros(64, 64), bits=2.0)
    assert found.distortion == 0.0 and not found.factors.dense().any()
