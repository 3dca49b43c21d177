"""Steps of what is trained beside the factors: in proportion to its size, by whatever optimizer."""

import pytest
import torch
from torch import nn

import hf_sqf
from hf_sqf import SQFCallback, SQFConfig
from hf_sqf.training.relative import RelativeSteps
from tests.conftest import build


@pytest.mark.parametrize(("size", "share"), [(0.0, 0.01), (1e-4, 0.01), (0.05, 0.05), (1.0, 1.0), (30.0, 1.0)])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_step_is_the_optimizers_times_the_size(size: float, share: float, optimizer: type[torch.optim.Optimizer]):
    steps = []
    for shortened in (False, True):
        layer = nn.Linear(3, 4)
        nn.init.constant_(layer.weight, -size)
        nn.init.zeros_(layer.bias)
        before, beside = layer.weight.detach().clone(), RelativeSteps(layer)
        taking = optimizer(layer.parameters(), lr=1e-2)
        layer(torch.ones(1, 3)).square().sum().add(layer.weight.sum()).backward()
        if shortened:
            beside.begin()
        taking.step()
        beside.end()
        steps.append(layer.weight.detach() - before)
    assert steps[0].abs().min() > 0
    torch.testing.assert_close(steps[1], share * steps[0], rtol=1e-3, atol=2e-7 * size)


def test_factors_take_the_optimizers_own_steps():
    model = hf_sqf.compress(build("bert"), SQFConfig(bits=4, structure="grid", trellis=None))
    SQFCallback().start(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    beside = RelativeSteps(model)
    beside.begin()
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    beside.end()
    moved = {name: float((p - before[name]).detach().mean()) for name, p in trained.items()}
    biases = [far for name, far in moved.items() if name.endswith(("bias", "LayerNorm.weight"))]
    factors = [far for name, far in moved.items() if "sqf_trained" in name]
    assert len(biases) + len(factors) == len(moved) and factors == pytest.approx([1.0] * len(factors), abs=1e-5)
    assert min(biases) == pytest.approx(0.01, abs=1e-4) and max(biases) == pytest.approx(1.0, abs=0.05)
