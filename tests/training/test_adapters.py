"""LoRA on top of compressed weights: trains, saves, reloads; is not lost by merging."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from hf_sqf import SQFCallback, distillation_loss
from hf_sqf.runtime.sqf_modules import SQFModule
from tests.conftest import build, outputs_of
from tests.training.conftest import compressed

peft = pytest.importorskip("peft")

TARGETS = {"llama": ["q_proj", "down_proj", "embed_tokens"], "gpt2": ["c_attn"], "resnet": ["convolution"]}


def adapted(name: str = "llama", model: PreTrainedModel | None = None, **options) -> "peft.PeftModel":
    config = peft.LoraConfig(r=4, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **options)
    torch.manual_seed(0)
    return peft.get_peft_model(model or compressed(name), config)


def stir(model: torch.nn.Module) -> None:
    """Make the adapters do something: at the start they add nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)


def test_trains_saves_and_reloads(trainer_for: Callable[..., Trainer], tmp_path: Path):
    model = compressed("llama")
    model.save_pretrained(tmp_path / "base")
    packed = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = adapted(model=model)
    trainer = trainer_for(adapter, max_steps=3)
    trainer.compute_loss_func = distillation_loss(build("llama"), student=adapter)
    trainer.train()
    expected = outputs_of(adapter.eval())
    adapter.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, packed[name]) for name, value in base.state_dict().items())
    assert not torch.equal(outputs_of(base), expected)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs_of(again), expected)
    with pytest.raises(ValueError, match="cannot be merged into a compressed weight"):
        again.merge_and_unload()
    torch.testing.assert_close(outputs_of(again), expected)


@pytest.mark.parametrize("name", TARGETS)
def test_merging_is_refused(name: str):
    model = adapted(name)
    stir(model)
    with torch.no_grad():
        for merge in (model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True), model.merge_adapter):
            with pytest.raises(ValueError, match="cannot be merged into a compressed weight"):
                merge()
        layer = next(m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "base_layer"))
        with pytest.raises(ValueError, match="cannot be merged"):
            layer.merge()


def test_adapters_of_other_kinds_are_not_merged_either():
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(compressed("llama"), config)
    with pytest.raises(ValueError, match="cannot be merged into a compressed weight"):
        model.merge_and_unload()


def test_dora_and_unloading():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    model = peft.get_peft_model(compressed("llama"), config)
    expected = outputs_of(compressed("llama"))
    torch.testing.assert_close(outputs_of(model.eval()), expected, rtol=1e-3, atol=1e-4)
    base = model.unload()
    assert torch.equal(outputs_of(base), expected)
    assert any(isinstance(module, SQFModule) for module in base.modules())


def test_ordinary_models_merge_as_ever():
    model = adapted(model=build("llama"))
    stir(model)
    expected = outputs_of(model.eval())
    torch.testing.assert_close(outputs_of(model.merge_and_unload()), expected, rtol=1e-3, atol=1e-4)


def test_what_the_refusal_proposes_works(tmp_path: Path):
    """Decode, adapt, merge, compress."""
    import hf_sqf

    adapter = adapted()
    stir(adapter)
    expected = outputs_of(adapter.eval())
    adapter.save_pretrained(tmp_path)
    dense = hf_sqf.dequantize(compressed("llama"))
    merged = peft.PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    torch.testing.assert_close(outputs_of(merged.eval()), expected, rtol=1e-3, atol=1e-4)
    again = hf_sqf.compress(merged, hf_sqf.SQFConfig(bits=8.0, structure="grid", trellis=None))
    torch.testing.assert_close(outputs_of(again), expected, rtol=0.2, atol=0.05)


def test_add_adapter_of_transformers():
    model = compressed("llama")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()


def test_factors_and_adapters_at_once_are_refused(trainer_for: Callable[..., Trainer]):
    with pytest.raises(ValueError, match="adapters train without SQFCallback"):
        trainer_for(adapted(), SQFCallback())


def printed(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_package_does_not_import_peft_and_guards_it_when_it_comes():
    program = "import sys, hf_sqf\nprint('peft' in sys.modules, 'transformers.trainer' in sys.modules)\n"
    program += "import peft\nprint(peft.tuners.tuners_utils.BaseTuner.sqf_guarded)"
    assert printed(program) == ["False", "False", "True"]


@pytest.mark.slow
def test_peft_that_came_before_is_guarded():
    assert printed("import peft, hf_sqf\nprint(peft.tuners.tuners_utils.BaseTuner.sqf_guarded)") == ["True"]
