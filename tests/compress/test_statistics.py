"""Shrinkage, the metric that statistics hand out, and their files."""

import pytest
import torch

from hf_sqf.compress.metric import Metric
from hf_sqf.compress.statistics import (
    SHRINKAGES,
    Statistics,
    choose_diagonal_shrinkage,
    choose_scale,
    choose_shrinkage,
    random_errors,
    shrink,
    shrink_diagonal,
)


def samples(count, n, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=draw) * torch.linspace(0.1, 3.0, n)


def statistics(**changes):
    H = samples(500, 6, 0).T @ samples(500, 6, 0) / 500
    known = {
        "moments": {"a.weight": H},
        "energies": {"a.weight": torch.linspace(0.1, 0.4, 4), "b.weight": torch.linspace(0.2, 0.3, 3)},
        "inputs": {"a.weight": "a.weight", "b.weight": "a.weight"},
        "shrinkage": {"a.weight": 0.01, "a.weight:g": 0.1, "b.weight:g": 0.0},
        "typical": 0.25,
        "tokens": 500,
        "fingerprint": "f",
        "notes": {"c.weight": "the data did not reach it"},
    }
    return Statistics(**(known | changes))


def test_shrinking_keeps_the_trace():
    H = statistics().moments["a.weight"]
    for share in SHRINKAGES:
        torch.testing.assert_close(shrink(H, share).trace(), H.trace())
        torch.testing.assert_close(shrink_diagonal(H.diagonal(), share).sum(), H.trace())
    torch.testing.assert_close(shrink(H, 1.0), H.diagonal().mean() * torch.eye(6))


def test_fewer_samples_are_shrunk_more():
    few, many, held = samples(20, 40, 1), samples(20_000, 40, 2), samples(500, 40, 3)
    chosen = [choose_shrinkage(x.T @ x / len(x), held) for x in (few, many)]
    assert chosen[0] >= 0.1 and chosen[1] <= 0.001
    held_energy = held.square().mean(0)
    assert choose_diagonal_shrinkage(few[:2].square().mean(0), held_energy) > choose_diagonal_shrinkage(
        many.square().mean(0), held_energy
    )


def test_chosen_shrinkage_compresses_held_out_data_best():
    """At equal bits a row, the distortion on held-out data is least: the formula of the module, evaluated anew."""
    x, held = samples(60, 40, 4), samples(500, 40, 5)
    H = x.T @ x / len(x)

    def distortion(share):
        shrunk = shrink(H, share).double()
        return float(
            torch.logdet(shrunk) / 40 + torch.trace(torch.linalg.solve(shrunk, held.T.double() @ held.double())).log()
        )

    assert choose_shrinkage(H, held) == min(SHRINKAGES, key=distortion)


def test_random_errors_cost_the_same_in_every_direction():
    """Of covariance H^-1 / n: E e^T H e = 1, and so in every direction that H knows."""
    x = samples(2000, 40, 8)
    H = x.T @ x / len(x)
    errors = random_errors(H, 0.01)
    assert errors.dtype == torch.float32 and torch.equal(errors, random_errors(H, 0.01))
    white = torch.linalg.cholesky(shrink(H, 0.01)).T @ errors  # (n, k), of variance 1 / n
    assert float(white.square().sum(0).mean()) == pytest.approx(1.0, rel=0.1)
    power = 40 * white.square().mean(1)
    assert float(power.min()) > 0.3 and float(power.max()) < 2.5


def test_scale_is_what_the_metric_leaves_out():
    energy = torch.tensor([1.0, 4.0])
    assert choose_scale(energy, 3.0 * energy) == pytest.approx(3.0)
    assert choose_scale(energy, torch.tensor([2.0, 4.0])) == pytest.approx(1.5)
    assert choose_scale(energy, torch.zeros(2)) == 1.0  # nothing is known
    weight = samples(4, 6, 9)
    plain, scaled = (statistics(scales=s).metrics("a.weight", [weight])[0] for s in ({}, {"a.weight": 3.0}))
    assert scaled.distance(weight, None) == pytest.approx(3.0 * plain.distance(weight, None), rel=1e-5)


def test_metric_is_in_units_of_a_typical_weight():
    found = statistics()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(6))
    (metric,) = found.metrics("a.weight", [weight])
    expected = Metric(shrink(found.moments["a.weight"], 0.01), shrink_diagonal(found.energies["a.weight"], 0.1).sqrt())
    assert metric.distance(weight, None) == pytest.approx(expected.distance(weight, None) / 0.25, rel=1e-5)


def test_weights_that_data_did_not_reach_are_typical():
    weight = torch.full((2, 5), 3.0)
    (metric,) = statistics().metrics("c.weight", [weight])
    assert metric.H is None
    assert metric.distance(weight, None) == pytest.approx(weight.numel())


def test_slices_of_experts_have_metrics_of_their_own():
    found = statistics(
        energies={"e.0": torch.ones(2)}, inputs={"e.0": "a.weight"}, notes={"e.1": "the data did not reach it"},
        shrinkage={"a.weight": 0.01, "e.0:g": 0.0},
    )  # fmt: skip
    first, second = found.metrics("e", [torch.ones(2, 6)] * 2)
    assert first.H is not None and second.H is None


def test_errors_name_the_weight():
    with pytest.raises(ValueError, match=r"d\.weight.*not measured"):
        statistics().metrics("d.weight", [torch.ones(2, 6)])
    with pytest.raises(ValueError, match=r"a\.weight was measured with another shape"):
        statistics().metrics("a.weight", [torch.ones(4, 7)])


def test_save_and_load(tmp_path):
    found = statistics(scales={"b.weight": 2.5})
    found.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    for name, matrix in (("a.weight", weight), ("b.weight", weight[:3]), ("c.weight", weight)):
        one, other = found.metrics(name, [matrix])[0], again.metrics(name, [matrix])[0]
        assert one.distance(matrix, None) == other.distance(matrix, None)
    assert (again.tokens, again.typical, again.notes) == (found.tokens, found.typical, found.notes)
    assert again.scales == found.scales


def test_other_files_and_other_models_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not hold calibration statistics"):
        Statistics.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="another model"):
        statistics().check(torch.nn.Linear(2, 2))
