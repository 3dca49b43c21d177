"""hf-sqf inspect, verify and export: what is said of a folder, and of a damaged one."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_sqf import size_report
from hf_sqf.cli.showing import layers
from tests.cli.conftest import one_sentence

TENSOR = "model.layers.0.mlp.up_proj.weight_factors"


@pytest.fixture
def damaged(shrunk: Path, tmp_path: Path) -> Path:
    """The tiny compressed model with one bit of one weight turned."""
    shutil.copytree(shrunk, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors[TENSOR][tensors[TENSOR].numel() // 2] ^= 16
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "damaged"


def test_inspect_says_what_size_report_says(shrunk: Path, typed):
    figures = json.loads(typed("inspect", shrunk, "--json").stdout)
    assert {k: figures[k] for k in ("total_bytes", "bits_per_weight", "rows")} == json.loads(
        size_report(shrunk).to_json()
    )
    assert figures["coverage"]["weights"] == 16 and figures["fidelity"] is None


def test_inspect_shows_layers_or_weights(shrunk: Path, typed):
    shown = typed("inspect", shrunk).stdout
    assert f"bits per weight: {size_report(shrunk).bits_per_weight:.3f}" in shown
    assert "grid: 16 weights, " in shown and "model.layers.1 " in shown and "██" in shown
    assert "up_proj" not in shown and "up_proj" in typed("inspect", shrunk, "--weights").stdout


def test_layers_are_in_their_order():
    names = ["lm.layers.10.a", "lm.layers.2.a", "lm.head", "lm.layers.2.b"]
    groups = layers([{"name": name} for name in names])
    assert [(name, len(rows)) for name, rows in groups] == [("lm.head", 1), ("lm.layers.2", 2), ("lm.layers.10", 1)]


def test_verify_names_tensor_and_file(damaged: Path, shrunk: Path, typed):
    assert "model.safetensors: " + TENSOR in typed("verify", damaged, code=1).stdout
    (fault,) = json.loads(typed("verify", damaged, "--json", code=1).stdout)
    assert fault["fatal"] and fault["where"] == f"model.safetensors: {TENSOR}"
    assert json.loads(typed("verify", shrunk, "--json").stdout) == []


def test_verify_names_changed_code(shrunk: Path, typed, tmp_path: Path):
    shutil.copytree(shrunk, tmp_path / "changed")
    with (tmp_path / "changed" / "sqf_hub.py").open("a") as file:
        file.write("import os\n")
    assert "sqf_hub.py: differs from the installed package's" in typed("verify", "changed", code=1).stdout


def test_damage_and_other_models_are_one_sentence(damaged: Path, original: Path, typed):
    one_sentence(typed("inspect", damaged, code=1), "model.safetensors", TENSOR.removesuffix("_factors"))
    one_sentence(typed("evaluate", damaged, "--against", original, code=1), TENSOR.removesuffix("_factors"))
    for command in (("inspect", original), ("verify", original), ("export", original, "out")):
        one_sentence(typed(*command, code=1), "compressed by hf_sqf")
    one_sentence(typed("inspect", "./nowhere", code=1), "no folder ./nowhere")
    one_sentence(typed("verify", "nobody/nothing", code=1), "no folder nobody/nothing")


def test_export_for_gguf(shrunk: Path, typed, tmp_path: Path):
    assert json.loads(typed("export", shrunk, "dense", "--gguf-ready", "--json").stdout) == {"folder": "dense"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert str(model.dtype) == "torch.float16" and getattr(model.config, "quantization_config", None) is None
    assert (tmp_path / "dense" / "tokenizer.json").exists()


def test_export_leaves_nothing_half_done(damaged: Path, shrunk: Path, typed, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    one_sentence(typed("export", damaged, "dense", code=1))
    one_sentence(typed("export", shrunk, damaged, code=1), "not empty")
    assert (
        "--gguf-ready means float16"
        in typed("export", shrunk, "x", "--gguf-ready", "--dtype", "float32", code=2).stderr
    )
    assert sorted(tmp_path.iterdir()) == before
