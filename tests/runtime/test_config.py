"""SQFConfig: what is refused, what is written, and what transformers does with it."""

import copy
import json
import math

import pytest
from transformers import AutoConfig, LlamaConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from hf_sqf import SQFConfig
from hf_sqf.runtime.sqf_config import FORMAT_VERSION, LOADING_ATTRIBUTES, STRUCTURES


@pytest.mark.parametrize("bits", [0, -1, 16.5, math.nan, math.inf, "4", True, None, [4]])
def test_bits_out_of_range(bits: object):
    with pytest.raises(ValueError, match=r"bits must be a number in \(0, 16\]"):
        SQFConfig(bits=bits)
    with pytest.raises(ValueError, match=r"overrides\['k'\]: bits must be a number in \(0, 16\]"):
        SQFConfig(overrides={"k": {"bits": bits}})


@pytest.mark.parametrize("bits", [1e-3, 1, 2.5, 16])
def test_bits_in_range(bits: float):
    assert SQFConfig(bits=bits).bits == bits


@pytest.mark.parametrize("structure", ["auto", *STRUCTURES, "svd+grid", "vq+grid"])
def test_known_structures(structure: str):
    assert SQFConfig(structure=structure, overrides={"k": {"structure": structure}}).structure == structure


@pytest.mark.parametrize("structure", ["gird", "", "auto+grid", "grid+grid", "svd+grid+vq", "svd+", None, 3])
def test_unknown_structures(structure: object):
    with pytest.raises(ValueError, match="structure must be one of auto, grid, svd, sparse_pca, vq, pgd"):
        SQFConfig(structure=structure)
    with pytest.raises(ValueError, match=r"overrides\['k'\]: structure must be one of"):
        SQFConfig(overrides={"k": {"structure": structure}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 4}, "unknown field bit; SQFConfig has bits,"),
        ({"quant_method": "gptq"}, "quant_method must be 'sqf'"),
        ({"overrides": {"(": {"bits": 4}}}, r"overrides: '\(' is not a regular expression"),
        ({"overrides": {"k": {}}}, "must hold bits, structure or both"),
        ({"overrides": {"k": {"bit": 4}}}, "must hold bits, structure or both"),
        ({"overrides": {"k": 4}}, "must hold bits, structure or both"),
        ({"overrides": {4: {"bits": 4}}}, "must be a regular expression"),
        ({"overrides": ["k"]}, "overrides must map regular expressions to options"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be None or a list of names"),
        ({"modules_to_not_convert": ["["]}, "modules_to_not_convert: .* is not a regular expression"),
        ({"include_embeddings": 1}, "include_embeddings must be True or False"),
        ({"dequantize": None}, "dequantize must be True or False"),
        ({"block": 0}, r"block must be an integer in \[1, 65536\]"),
        ({"block": 2.5}, r"block must be an integer in \[1, 65536\]"),
        ({"block": 8, "structure": "grid"}, "structure 'grid' has no blocks"),
        ({"block": 8, "structure": "svd+grid"}, "has no blocks"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"seed": "0"}, "seed must be an integer in"),
        ({"format_version": 0}, "format_version must be an integer in"),
        ({"coverage": 3}, "coverage must be None or a dictionary"),
        ({"bits": 4, "target_size": "9MB"}, "bits or target_size, not both"),
    ],
)
def test_what_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SQFConfig(**options)


@pytest.mark.parametrize(
    "options", [{"block": 8}, {"block": 8, "structure": "vq"}, {"block": 8, "structure": "vq+grid"}]
)
def test_block_where_it_has_a_meaning(options: dict):
    assert SQFConfig(**options).block == 8
    assert SQFConfig(block=8, structure="grid", overrides={"k": {"structure": "pgd"}}).block == 8


def test_newer_format_is_told_from_an_unknown_field():
    with pytest.raises(ValueError, match="made by a newer hf_sqf"):
        SQFConfig(format_version=FORMAT_VERSION + 1, unheard_of=1)
    with pytest.raises(ValueError, match="unknown field unheard_of"):
        SQFConfig(unheard_of=1)


def test_first_override_that_matches_counts():
    config = SQFConfig(overrides={r"k_proj$": {"bits": 6}, "layers.0": {"structure": "svd"}})
    assert config.override_for("model.layers.0.self_attn.k_proj") == (r"k_proj$", {"bits": 6.0})
    assert config.override_for("model.layers.0.mlp.up_proj") == ("layers.0", {"structure": "svd"})
    assert config.override_for("lm_head") == (None, {})


def test_dictionary_and_back():
    config = SQFConfig(
        bits=3, structure="vq", block=4, seed=7, overrides={"k": {"bits": 6}}, modules_to_not_convert=["a"]
    )
    written = json.loads(config.to_json_string())
    assert written["quant_method"] == "sqf" and written["format_version"] == FORMAT_VERSION
    assert SQFConfig(**written).to_dict() == config.to_dict()
    assert AutoQuantizationConfig.from_dict(written).to_dict() == config.to_dict()
    assert config.get("bits") == 3.0 and config.get("load_in_8bit", False) is False


def test_loading_attributes_are_never_written():
    config = SQFConfig(dequantize=True)
    assert config.get_loading_attributes().keys() == set(LOADING_ATTRIBUTES)
    assert config.get_loading_attributes()["dequantize"] is True
    assert not config.to_dict().keys() & set(LOADING_ATTRIBUTES)
    assert "dequantize" not in config.to_json_string()


def test_loading_attributes_reach_the_config_of_a_checkpoint():
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        merged = AutoHfQuantizer.merge_quantization_configs(
            SQFConfig(bits=3).to_dict(), SQFConfig(bits=5, dequantize=True)
        )
    assert merged.dequantize is True and merged.bits == 3.0


def test_deep_copies_share_what_cannot_be_copied():
    config = SQFConfig(dataset=(text for text in ["one", "two"]))
    twin = copy.deepcopy(config)
    assert twin is not config and twin.dataset is config.dataset
    json.dumps(config.to_dict())


def test_lives_in_a_model_config(tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
    config.quantization_config = SQFConfig(bits=3, overrides={"k": {"bits": 6}})
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == config.quantization_config.to_dict()
