"""Registration, and what happens to a model on its way to a compressed one and back."""

import importlib

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import hf_sqf
from hf_sqf import SQFConfig
from hf_sqf.compress.on_load import CompressingQuantizer
from hf_sqf.runtime.sqf_model import saved_state
from hf_sqf.runtime.sqf_modules import SQFModule
from hf_sqf.runtime.sqf_quantizer import SQFQuantizer, register
from tests.conftest import build

OPTIONS = {"bits": 5.0, "structure": "grid", "trellis": None}


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch):
    """Registration is undone after the test."""
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    monkeypatch.setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", auto.LOADING_ATTRIBUTES_CONFIG_TYPES)


def test_importing_the_package_registers_the_method():
    assert auto.AUTO_QUANTIZER_MAPPING["sqf"] is CompressingQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sqf"] is SQFConfig
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(SQFConfig) == 1


def test_registering_again_changes_nothing(mappings):
    known = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    register(CompressingQuantizer)
    importlib.reload(hf_sqf)
    assert known == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert auto.AUTO_QUANTIZER_MAPPING["sqf"] is CompressingQuantizer


def test_the_travelling_files_alone_do_not_compress(mappings, tmp_path):
    build("llama").save_pretrained(tmp_path)
    register()
    with pytest.raises(ImportError, match="pip install hf-sqf"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SQFConfig(**OPTIONS))


def test_the_travelling_files_alone_load(mappings, tmp_path):
    hf_sqf.compress(build("llama"), SQFConfig(**OPTIONS)).save_pretrained(tmp_path)
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.hf_quantizer) is SQFQuantizer and isinstance(model.lm_head, SQFModule)


def test_a_quantizer_has_its_own_copy_of_the_config():
    config = SQFConfig(**OPTIONS)
    quantizer = SQFQuantizer(config, pre_quantized=True)
    assert quantizer.quantization_config is not config
    assert quantizer.quantization_config.to_dict() == config.to_dict()


def test_marks_of_a_quantized_model(tmp_path):
    build("llama").save_pretrained(tmp_path)
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SQFConfig(**OPTIONS))
    for model in (on_load, hf_sqf.compress(build("llama"), SQFConfig(**OPTIONS))):
        assert model.is_quantized and model.quantization_method == "sqf" and model.config._is_quantized
        assert model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable
        assert model.hf_quantizer.quantization_config is model.config.quantization_config
        assert not model.training


def test_marks_go_with_the_factors():
    model = hf_sqf.compress(build("mixtral"), SQFConfig(**OPTIONS))
    keys, tied = set(build("mixtral").state_dict()), dict(build("mixtral").all_tied_weights_keys)
    hf_sqf.dequantize(model)
    assert set(model.state_dict()) == keys and dict(model.all_tied_weights_keys) == tied
    for name in ("hf_quantizer", "quantization_method"):
        assert not hasattr(model, name)
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")
    assert not getattr(model.config, "_is_quantized", False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet", "bert"])
def test_one_tensor_keeps_an_ordinary_load_from_succeeding(name: str):
    model = hf_sqf.compress(build(name), SQFConfig(**OPTIONS))
    extra = saved_state(model).keys() - model.state_dict().keys()
    assert len(extra) == 1
    sentinel = next(iter(extra))
    assert saved_state(model)[sentinel].shape == (1,) != build(name).state_dict()[sentinel].shape


def test_an_ordinary_model_is_saved_as_it_is():
    model = nn.Linear(3, 4)
    assert saved_state(model).keys() == {"weight", "bias"}


def test_auto_means_the_processor_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch):
    quantizer = CompressingQuantizer(SQFConfig(), pre_quantized=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert quantizer.update_device_map("auto") == {"": "cpu"}
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}
    assert CompressingQuantizer(SQFConfig(), pre_quantized=True).update_device_map("auto") == "auto"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert quantizer.update_device_map("auto") == "auto"


def test_config_without_coverage_is_refused(tmp_path):
    model = hf_sqf.compress(build("llama"), SQFConfig(**OPTIONS))
    model.config.quantization_config.coverage = None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how many weights are compressed"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_formats_than_safetensors_are_refused(tmp_path):
    hf_sqf.compress(build("llama"), SQFConfig(**OPTIONS)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: compressed models are stored as safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
