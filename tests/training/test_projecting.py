"""Constraints hold exactly after every step, whatever the gradients are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

from hf_sqf.compress.factorize import solve
from hf_sqf.compress.metric import Metric
from hf_sqf.runtime.sqf_container import pack, unpack
from hf_sqf.runtime.sqf_factors import Factors
from hf_sqf.runtime.sqf_paths import codes_of_points
from hf_sqf.runtime.sqf_trellis import machine
from hf_sqf.training.callback import SQFCallback
from hf_sqf.training.factors import TrainedWeight
from hf_sqf.training.projecting import DEARER, coded_bits, dictionary_bits, foremost
from hf_sqf.training.terms import Options
from tests.conftest import build
from tests.training.conftest import compressed

STRUCTURES = [("grid", 0), ("grid", 8), ("svd", 0), ("sparse_pca", 0), ("vq", 0), ("pgd", 0), ("svd+grid", 0)]
IDS = [f"{name}-{states}" if states else name for name, states in STRUCTURES]


def weight_of(seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    low = torch.randn(48, 4, generator=draw) @ torch.randn(4, 24, generator=draw)
    return low + 0.5 * torch.randn(48, 24, generator=draw)


def factors_of(structure: str, trellis: int, seed: int = 0) -> Factors:
    metric = Metric(g=0.5 + torch.rand(48, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64))
    return solve(weight_of(seed), metric, 0.7, structure, seed=seed, trellis=trellis).factors


def options(hard: bool = False, codes: bool = True) -> Options:
    return Options(codes=codes, hard=hard, resolution=32, code_rate=1.0, every=1, share=1.0)


def check(weight: TrainedWeight, start: Factors) -> None:
    """Check everything that the factors of a trained weight have to hold to."""
    (now,) = weight.factors()
    assert now.structure == start.structure and now.shape == start.shape
    for term, first in zip(now.terms, start.terms, strict=True):
        assert coded_bits(term) <= coded_bits(first)
        assert not term.codes.is_floating_point() and term.codes.shape == first.codes.shape
        if term.one_hot:
            assert 0 <= int(term.codes.min()) <= int(term.codes.max()) < term.atom_count == first.atom_count
        elif term.trellis:
            codes_of_points(term.codes.numpy(), machine(term.trellis))  # raises off the paths
        elif "sparse_pca" in start.structure:
            assert torch.count_nonzero(term.codes, 1).max() <= torch.count_nonzero(first.codes, 1).max()
        elif not (term.atoms is not None and start.structure.startswith("svd")):
            assert term.nonzeros <= first.nonzeros
        if term.atoms is not None:
            assert not term.atoms.is_floating_point()
            assert term.one_hot or (torch.equal(term.steps, first.steps) and term.step_resolution == 1)
    (read,) = unpack(pack([now]))
    assert torch.equal(read.dense(), now.dense())
    torch.testing.assert_close(weight.matrix(0), now.dense())


@pytest.mark.parametrize(("structure", "trellis"), STRUCTURES, ids=IDS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), hard=st.booleans(), near=st.booleans(), size=st.sampled_from([0.05, 0.5, 3.0]))
def test_constraints_hold_after_every_step(
    structure: str, trellis: int, seed: int, hard: bool, near: bool, size: float
):
    start = factors_of(structure, trellis)
    weight = TrainedWeight("weight", [start], options(hard), originals=[weight_of(0)] if near else None)
    check(weight, start)
    draw = torch.Generator().manual_seed(seed)
    for step in range(1, 4):
        with torch.no_grad():
            for name, parameter in weight.parameters():
                move = torch.randn(parameter.shape, generator=draw)
                parameter.add_(0.05 * move if name.endswith(("rows", "steps")) else size * move)
        weight.project(step)
        check(weight, start)


@pytest.mark.parametrize(("structure", "trellis"), STRUCTURES, ids=IDS)
def test_what_does_not_move_stays(structure: str, trellis: int):
    start = factors_of(structure, trellis)
    for hard in (False, True):
        weight = TrainedWeight("weight", [start], options(hard))
        weight.project(1)
        (now,) = weight.factors()
        assert torch.equal(now.dense(), start.dense())
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(now.terms, start.terms, strict=True))


@pytest.mark.parametrize(("structure", "trellis"), STRUCTURES, ids=IDS)
def test_codes_follow_their_latents(structure: str, trellis: int):
    """Gradient steps towards another matrix bring the factors nearer to it, at no more bits."""
    start = factors_of(structure, trellis)
    target = start.dense() + 0.5 * torch.randn(start.shape, generator=torch.Generator().manual_seed(5))
    weight = TrainedWeight("weight", [start], options())
    rate = 0.01 if structure == "vq" else 0.05
    optimizer = torch.optim.Adam([p for _, p in weight.parameters()], lr=rate)
    first = float((start.dense() - target).square().mean())
    for step in range(1, 41):
        optimizer.zero_grad()
        (weight.matrix(0) - target).square().mean().backward()
        optimizer.step()
        weight.project(step)
    check(weight, start)
    assert sum(term.changed for term in weight.all_terms()) > 0
    assert float((weight.matrix(0).detach() - target).square().mean()) < first


@pytest.mark.parametrize("structure", ["svd", "sparse_pca", "vq", "pgd", "svd+grid"])
@pytest.mark.parametrize("hard", [False, True])
def test_dictionaries_alone_follow_their_latents(structure: str, hard: bool):
    """Gradient steps towards a matrix of the same codes lead there: codes stay, and dictionaries keep their limit."""
    best, draw = factors_of(structure, 0), torch.Generator().manual_seed(5)
    target = best.dense()
    moved = [
        t if t.atoms is None else replace(t, atoms=t.atoms + torch.randint(-3, 4, t.atoms.shape, generator=draw).char())
        for t in best.terms
    ]
    start = replace(best, terms=tuple(moved))
    weight = TrainedWeight("weight", [start], options(hard, codes=False))
    atoms = [p for name, p in weight.parameters() if name.endswith("atoms")]
    optimizer = torch.optim.Adam(atoms, lr=0.02)
    errors = []
    for step in range(1, 61):
        optimizer.zero_grad()
        error = (weight.matrix(0) - target).square().mean()
        errors.append(float(error.detach()))
        error.backward()
        optimizer.step()
        weight.project(step)
        (now,) = weight.factors()
        for term, first in zip(now.terms, start.terms, strict=True):
            assert torch.equal(term.codes, first.codes)
            assert dictionary_bits(term) <= dictionary_bits(first) + DEARER * coded_bits(first)
        torch.testing.assert_close(weight.matrix(0), now.dense())
    assert errors[-1] < 0.3 * errors[0]


def test_those_that_went_furthest_go_first():
    current = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]])
    moved = torch.tensor([[0.6, 0.9, -1.2], [2.3, 0.1, 0.0]])
    assert torch.equal(foremost(moved, current, 1.0), moved)
    expected = torch.tensor([[0.0, 1.0, -1.2], [2.3, 0.0, 0.0]])
    assert torch.equal(foremost(moved, current, 2 / 6), expected)
    assert torch.equal(foremost(current, current, 0.01), current)


@pytest.mark.parametrize("trellis", [0, 8])
def test_small_gradients_are_not_lost_in_hard_projections(trellis: int):
    """Steps far smaller than a code's add up: what a projection takes comes again."""
    changed = []
    for hard in (False, True):
        weight = TrainedWeight("weight", [factors_of("grid", trellis)], options(hard))
        codes = next(p for name, p in weight.parameters() if name.endswith("codes"))
        direction = torch.randn(codes.shape, generator=torch.Generator().manual_seed(1)).sign()
        for step in range(1, 31):
            with torch.no_grad():
                codes.add_(0.02 * direction)
            weight.project(step)
        changed.append(sum(term.changed for term in weight.all_terms()))
    assert changed[0] > 0 and changed[1] == pytest.approx(changed[0], rel=0.05)


class Watching(TrainerCallback):
    """Checks all weights whenever a step is over."""

    def __init__(self, callback: SQFCallback) -> None:
        self.callback, self.steps = callback, 0
        self.starts: list[list[Factors]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.starts = [weight.factors() for weight in self.callback._weights]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        for weight, (start,) in zip(self.callback._weights, self.starts, strict=True):
            check(weight, start)


@pytest.mark.parametrize("options", [{}, {"trellis": 8}, {"structure": "vq"}, {"structure": "pgd"}], ids=str)
def test_constraints_hold_in_the_trainer(options: dict, trainer_for: Callable[..., Trainer]):
    callback = SQFCallback("latent", code_rate=60.0, every=2)
    trainer = trainer_for(compressed("llama", **options), callback, build("llama"), max_steps=3)
    watching = Watching(callback)
    trainer.add_callback(watching)
    trainer.train()
    assert watching.steps == 3
