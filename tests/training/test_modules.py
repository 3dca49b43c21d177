"""Modules while they are trained: copies, casts, state dicts, ties."""

import copy

import pytest
import torch

from hf_sqf import SQFCallback
from hf_sqf.training.modules import PREFIX, TrainedModule
from tests.conftest import ARCHITECTURES, outputs_of
from tests.training.conftest import compressed

ONE_OF_EACH_KIND = ("llama_tied", "gpt2", "resnet", "mixtral", "t5")


def started(name: str, mode: str = "latent") -> tuple[torch.nn.Module, SQFCallback]:
    model, callback = compressed(name), SQFCallback(mode)
    callback.start(model)
    return model, callback


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_starting_and_finishing_changes_nothing(name: str):
    assert name in ARCHITECTURES
    model = compressed(name)
    before, state = outputs_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    callback = SQFCallback("latent")
    callback.start(model)
    torch.testing.assert_close(outputs_of(model), before, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(state)
    callback.finish()
    callback.finish()  # nothing left to do
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(outputs_of(model), before)
    assert not any(PREFIX in key for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_every_parameter_that_is_used_gets_a_gradient(name: str):
    model, _ = started(name)
    from tests.conftest import inputs_for

    model(**inputs_for(model))[0].square().sum().backward()
    trained = {key: p for key, p in model.named_parameters() if PREFIX in key}
    without = [key for key, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    if name == "mixtral":  # an expert may have had no token
        without = [key for key in without if "experts" not in key]
    assert trained and not without


def test_a_copy_trains_on_its_own():
    model, _ = started("llama_tied")
    twin = copy.deepcopy(model)
    assert torch.equal(outputs_of(twin), outputs_of(model))
    before = outputs_of(model)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            if PREFIX in key and key.endswith("rows"):
                parameter.add_(0.3)
    assert torch.equal(outputs_of(model), before) and not torch.equal(outputs_of(twin), before)


def test_casts_leave_scales_in_float32():
    model, _ = started("llama")
    model.to(torch.bfloat16)
    assert {p.dtype for key, p in model.named_parameters() if PREFIX in key} == {torch.float32}
    assert outputs_of(model).dtype == torch.bfloat16


def test_tied_weights_share_their_parameters():
    model, _ = started("llama_tied")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, TrainedModule) and isinstance(head, TrainedModule)
    assert embedding.trained["weight"] is head.trained["weight"]
    names = [key for key, _ in model.named_parameters() if PREFIX in key]
    assert not any("lm_head" in key for key in names)  # each parameter once
    state = model.state_dict()
    assert state["lm_head.weight_factors"] is state["model.embed_tokens.weight_factors"]


def test_state_dicts_are_read_back_to_the_bit():
    model, _ = started("llama")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if PREFIX in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other, _ = started("llama")
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert torch.equal(outputs_of(other), outputs_of(model))


def test_dense_weights_carry_gradients():
    model, _ = started("gpt2")
    module = model.transformer.h[0].attn.c_attn
    assert module.weight.shape == (32, 96)
    module.weight.sum().backward()
    assert any(p.grad is not None for key, p in module.named_parameters() if PREFIX in key)
