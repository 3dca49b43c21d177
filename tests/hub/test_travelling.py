"""The code that lies beside the weights: which files, what they need, and what a forged auto_map can make of them."""

import copy
import importlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_imports
from transformers.quantizers import auto

from hf_sqf import SQFConfig, compress, dequantize
from hf_sqf.hub.verification import RUNTIME, travelling
from hf_sqf.runtime import sqf_hub

ALWAYS_THERE = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "accelerate"}


@pytest.mark.parametrize("name", travelling())
def test_files_require_nothing_that_may_be_missing(name: str):
    """By transformers' own reading, which refuses to load a model whose files import what is not installed."""
    required = set(get_imports(RUNTIME / name)) - set(sys.stdlib_module_names)
    assert required <= ALWAYS_THERE


def test_saving_writes_them_as_they_are(small: Path):
    written = {path.name: path.read_bytes() for path in small.glob("*.py")}
    assert written == {name: path.read_bytes() for name, path in travelling().items()}
    assert {"sqf_hub.py", "sqf_quantizer.py", "sqf_config.py", "sqf_modules.py", "sqf_container.py"} <= written.keys()
    assert json.loads((small / "config.json").read_text())["auto_map"] == {"AutoConfig": "sqf_hub.LlamaConfig"}


def test_saving_shards_and_checkpoints_writes_them_too(model: PreTrainedModel, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert {path.name for path in tmp_path.glob("*.py")} == travelling().keys()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).hf_quantizer.pre_quantized


def test_a_dense_model_travels_without(model: PreTrainedModel, tmp_path: Path):
    dequantize(model).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert not (tmp_path / "README.md").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and "quantization_config" not in config
    assert type(model) is LlamaForCausalLM
    assert type(model.config) is LlamaConfig
    assert not model.model_tags


def test_a_dense_model_made_on_loading_travels_without(small: Path, tmp_path: Path):
    config = SQFConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(small, quantization_config=config, trust_remote_code=True)
    assert type(loaded) is LlamaForCausalLM
    loaded.save_pretrained(tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*.py"))


def test_configs_that_are_not_transformers_own_stay(original: Path):
    class OwnConfig(LlamaConfig):
        pass

    model = LlamaForCausalLM.from_pretrained(original)
    model.config.__class__ = OwnConfig
    compress(model, SQFConfig(bits=6, structure="grid"))
    assert type(model.config) is OwnConfig


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_models_can_be_copied(model: PreTrainedModel, copied):
    other = copied(model)
    assert type(other) is type(model) and type(other.config) is type(model.config)
    tokens = torch.arange(5)[None]
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_torch_can_save_a_model(model: PreTrainedModel):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(torch.arange(5)[None])[0], model(torch.arange(5)[None])[0])


def test_floats_come_first(model: PreTrainedModel):
    assert next(model.parameters()).dtype == torch.float32
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    assert {type(m).__name__.removeprefix("SQF") for m in model.modules()} == {
        type(m).__name__ for m in plain.modules()
    }
    names = [name for name, _ in model.named_modules()]
    assert names[0] == "" and len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name",
    ["os", "AutoConfig", "LlamaForCausalLM", "BitsAndBytesConfig", "GenerationConfig", "NoSuchConfig", "Config", ""],
)
def test_forged_names_find_nothing(name: str):
    with pytest.raises(AttributeError):
        getattr(sqf_hub, name)


def test_a_forged_auto_map_runs_nothing(small: Path):
    config = json.loads((small / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "sqf_hub.BitsAndBytesConfig"
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(AttributeError, match="BitsAndBytesConfig is no model config of transformers"):
        AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)


def test_two_copies_in_one_process(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A copy of another time beside the installed package: models of each go on working, whoever registers last.

    The copy does without numba, which would compile its kernels a second time.
    """
    shutil.copytree(RUNTIME, tmp_path / "packages" / "older_sqf", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.setitem(table, "sqf", table["sqf"])
    tokens = torch.arange(5)[None]
    first = AutoModelForCausalLM.from_pretrained(small)
    with monkeypatch.context() as without:
        for module in ("numba", "llvmlite"):
            without.setitem(sys.modules, module, None)
        older = importlib.import_module("older_sqf.sqf_hub")
    older.register()
    older.register()
    second = AutoModelForCausalLM.from_pretrained(small)
    assert type(second.hf_quantizer).__module__ == "older_sqf.sqf_quantizer"
    for enabled in (False, True):  # outside of operators, and through them
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(first(tokens).logits, second(tokens).logits)
    second.save_pretrained(tmp_path / "second")
    first.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "second" / "sqf_hub.py").exists()
    # The installed package decodes what the other copy has loaded.
    dense = dequantize(second)
    assert type(dense) is LlamaForCausalLM
    torch.testing.assert_close(dense(tokens).logits, first(tokens).logits)
