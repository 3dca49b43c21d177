"""A damaged or forged model folder: from_pretrained gives an error that names tensor and file, in every case."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import hf_sqf
from hf_sqf import SQFConfig
from hf_sqf.runtime.sqf_container import pack, weight_name
from hf_sqf.runtime.sqf_factors import Factors
from hf_sqf.runtime.sqf_modules import SUFFIX
from tests.conftest import build


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    model = hf_sqf.compress(build("llama"), SQFConfig(bits=5, structure="grid"))
    model.save_pretrained(tmp_path, max_shard_size="15KB" if request.param == "shards" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (request.param == "shards")
    return tmp_path


def weights(folder: Path) -> dict[str, Path]:
    """Return the file of each packed tensor."""
    return {k: f for f in sorted(folder.glob("*.safetensors")) for k in sorted(load_file(f)) if k.endswith(SUFFIX)}


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(file) | tensors
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, file, {"format": "pt"})


def flipped(data: torch.Tensor) -> torch.Tensor:
    data = data.clone()
    data[len(data) // 2] ^= 4
    return data


def newer(data: torch.Tensor) -> torch.Tensor:
    data = data.clone()
    data[3] = 200
    return data


def of_another_shape(data: torch.Tensor) -> torch.Tensor:
    return pack([hf_sqf.factorize(torch.randn(32, 24), "grid", 8.0).factors])


CHANGES = {
    "a bit flipped": flipped,
    "cut short": lambda data: data[:-3],
    "cut to its first bytes": lambda data: data[:5],
    "empty": lambda data: data[:0],
    "noise": lambda data: torch.randint(256, data.shape, dtype=torch.uint8),
    "of another shape": of_another_shape,
    "of a newer format": newer,
    "of another dtype": lambda data: data.float(),
    "of two dimensions": lambda data: data[None],
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_damaged_tensor(folder, case):
    name, file = sorted(weights(folder).items())[-1]
    change(file, **{name: CHANGES[case](load_file(file)[name])})
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert name in str(caught.value) and str(file) in str(caught.value)


def test_tensors_of_one_shape_that_were_swapped(folder):
    found = weights(folder)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight{SUFFIX}" for i in (0, 1))
    a, b = load_file(found[first])[first], load_file(found[second])[second]
    change(found[first], **{first: b})
    change(found[second], **{second: a})
    with pytest.raises(ValueError, match="swapped") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    text = str(caught.value)
    assert (first in text and str(found[first]) in text) or (second in text and str(found[second]) in text)
    with pytest.raises(ValueError, match="swapped"):  # the body alone, whose names have another prefix
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModel])
def test_names_that_lost_their_prefix_are_no_error(folder, model_class):
    again = model_class.from_pretrained(folder)
    again.save_pretrained(folder / "again")
    torch.testing.assert_close(
        model_class.from_pretrained(folder / "again").get_input_embeddings().weight,
        again.get_input_embeddings().weight,
        rtol=0,
        atol=0,
    )


def test_a_missing_tensor(folder):
    name, file = sorted(weights(folder).items())[-1]
    change(file, **{name: None})
    with pytest.raises(ValueError, match="lacks 1 of") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert name in str(caught.value) and str(folder) in str(caught.value)


def test_a_tensor_too_many(folder):
    name, file = sorted(weights(folder).items())[-1]
    change(file, **{f"extra.weight{SUFFIX}": load_file(file)[name]})
    with pytest.raises(ValueError, match="names") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("case", ["cut short", "forged header"])
def test_a_damaged_file(folder, case):
    file = sorted(folder.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if case == "cut short" else b"\xff" * 8 + data[8:])
    with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("value", [None, 0, "many", 10**9])
def test_a_config_that_does_not_say_how_many(folder, value):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["coverage"]["weights"] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_the_name_goes_with_the_bytes():
    factors: Factors = hf_sqf.factorize(torch.randn(32, 24), "grid", 8.0).factors
    assert weight_name(pack([factors], "layers.3.weight")) == "layers.3.weight"
    assert weight_name(pack([factors])) == ""
    bad = torch.cat([pack([factors], "x"), torch.zeros(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="w: "):
        weight_name(bad, "w")
