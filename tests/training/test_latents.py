"""Latents that start near the original: the codes stay, until gradients say otherwise."""

from dataclasses import replace

import pytest
import torch

from hf_sqf import SQFCallback
from hf_sqf.compress.factorize import solve
from hf_sqf.compress.metric import Metric
from hf_sqf.runtime.sqf_factors import Factors
from hf_sqf.training.factors import TrainedWeight
from hf_sqf.training.latents import nearest_latents, wanted_of
from tests.conftest import build
from tests.training.conftest import compressed
from tests.training.test_projecting import IDS, STRUCTURES, check, factors_of, options, weight_of

CASES = pytest.mark.parametrize(("structure", "trellis"), STRUCTURES, ids=IDS)


@CASES
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("calibrated", [False, True], ids=["nearest", "calibrated"])
def test_codes_stay_until_latents_move(structure: str, trellis: int, hard: bool, calibrated: bool):
    """Where codes are not the nearest, as calibration makes them, too: here the original is another one."""
    start = factors_of(structure, trellis)
    original = weight_of(7 if calibrated else 0)
    weight = TrainedWeight("weight", [start], options(hard), originals=[original])
    torch.testing.assert_close(weight.matrix(0), start.dense())
    weight.project(1)
    (now,) = weight.factors()
    for one, other in zip(now.terms, start.terms, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert other.atoms is None or torch.equal(one.atoms, other.atoms)


@CASES
def test_they_lie_between_codes_and_original(structure: str, trellis: int):
    start = factors_of(structure, trellis)
    for term, wanted in zip(start.terms, wanted_of(start, weight_of(0)), strict=True):
        latents, strength = nearest_latents(term, wanted)
        if term.one_hot:
            codes, goal = term.dictionary().float()[term.codes.long()], wanted / term.scale_value()
            goal = goal / term.row_values()[:, None]
        else:
            codes = term.codes.float()
            goal = latents if term.atoms is not None else wanted / (term.row_values()[:, None] * term.step_values())
            reach = 0.5 + 0.5 * strength
            assert (latents - codes).abs().max() <= reach
        assert 0.0 <= strength < 1.0
        assert (latents - goal).square().mean() < 0.9 * (codes - goal).square().mean()


INTEGERS = pytest.mark.parametrize(
    ("structure", "trellis"),
    [case for case in STRUCTURES if case[0] != "vq"],
    ids=[name for name in IDS if name != "vq"],
)


def of_data() -> Metric:
    inputs = torch.randn(24, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Metric(H=inputs @ inputs.T + 0.1 * torch.eye(24, dtype=torch.float64))


def solved(structure: str, trellis: int, noise: float, metric: Metric) -> Factors:
    return solve(weight_of(0), metric, noise, structure, seed=0, trellis=trellis).factors


@INTEGERS
@pytest.mark.parametrize("noise", [0.2, 0.7, 1.5])
def test_codes_chosen_with_data_are_told_from_nearest_ones(structure: str, trellis: int, noise: float):
    for metric, expected in ((Metric(), True), (of_data(), False)):
        factors = solved(structure, trellis, noise if metric.H is None else 3.0 * noise, metric)
        for term, wanted in zip(factors.terms, wanted_of(factors, weight_of(0)), strict=True):
            assert (nearest_latents(term, wanted) is not None) == expected


@INTEGERS
@pytest.mark.parametrize("share", [None, 1.0])
def test_codes_chosen_with_data_start_where_they_are(structure: str, trellis: int, share: float | None):
    """So that a small step changes none of them, whatever its direction; nearest ones start elsewhere."""
    for metric, noise in ((Metric(), 0.7), (of_data(), 2.1)):
        start = solved(structure, trellis, noise, metric)
        weight = TrainedWeight("weight", [start], replace(options(), share=share), originals=[weight_of(0)])
        draw = torch.Generator().manual_seed(9)
        for term in weight.all_terms():
            codes = term.parameters["codes"]
            kept = term.memory()[codes]
            assert torch.equal(kept["value"] * kept["unit"], term.term.codes.float()) == (metric.H is not None)
            codes.data += 0.2 * torch.randn(codes.shape, generator=draw).sign()
        weight.project(1)
        if metric.H is not None:
            assert all(term.changed == 0 for term in weight.all_terms())


def test_the_parts_of_a_sum_stand_for_the_whole_together():
    start, original = factors_of("svd+grid", 0), weight_of(0)
    first, second = wanted_of(start, original)
    torch.testing.assert_close(first + start.terms[1].dense(), original)
    torch.testing.assert_close(second + start.terms[0].dense(), original)


@pytest.mark.parametrize(("structure", "trellis"), [("grid", 0), ("grid", 8), ("svd", 0)])
def test_codes_get_further_than_from_where_they_are(structure: str, trellis: int):
    """Ten steps of gradients towards a matrix near to the original."""
    start, original = factors_of(structure, trellis), weight_of(0)
    target = original + 0.2 * torch.randn(start.shape, generator=torch.Generator().manual_seed(5))
    reached = []
    for originals in (None, [original]):
        weight = TrainedWeight("weight", [start], options(), originals=originals)
        codes = [p for name, p in weight.parameters() if name.endswith("codes")]
        optimizer = torch.optim.Adam(codes, lr=0.01)
        for step in range(1, 11):
            optimizer.zero_grad()
            (weight.matrix(0) - target).square().mean().backward()
            optimizer.step()
            weight.project(step)
        check(weight, start)
        reached.append(float((weight.matrix(0).detach() - target).square().mean()))
    assert reached[1] < reached[0]


def test_an_original_of_another_kind_is_refused():
    model = compressed("llama")
    with pytest.raises(ValueError, match=r"original must have a weight .* it has none of that name"):
        SQFCallback("latent", original=build("gpt2")).start(model)
    other = build("llama")
    other.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"original must have a weight .*up_proj.weight .* one of shape \(3, 3\)"):
        SQFCallback("latent", original=other).start(model)
