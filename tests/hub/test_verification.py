"""verify finds what was changed, and says what; forged configs are refused with a sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_sqf.hub import verify
from hf_sqf.hub.verification import sha256, travelling


def change_config(folder: Path, **options: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= options
    (folder / "config.json").write_text(json.dumps(config))


def test_what_was_saved_is_in_order(small: Path):
    assert verify(small) == []


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 1.0])
def test_every_byte_of_a_weight_is_covered(small: Path, at: float):
    tensors = load_file(small / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight_factors"))
    position = int(at * (tensors[name].numel() - 1))
    tensors[name][position] ^= 16
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    faults = verify(small)
    assert len(faults) == 1 and faults[0].fatal
    assert name in faults[0].where and name in str(faults[0])


def test_changed_missing_and_foreign_code_is_named_with_its_hash(small: Path):
    (small / "sqf_hub.py").write_text((small / "sqf_hub.py").read_text() + "\nimport os\n")
    (small / "sqf_config.py").unlink()
    (small / "deep").mkdir()
    (small / "deep" / "modeling_extra.py").write_text("")
    (small / "pytorch_model.bin").write_bytes(b"")
    found = {fault.where: fault for fault in verify(small)}
    assert found.keys() == {"sqf_hub.py", "sqf_config.py", "deep/modeling_extra.py", "pytorch_model.bin"}
    assert sha256(small / "sqf_hub.py") in found["sqf_hub.py"].what
    assert sha256(travelling()["sqf_hub.py"]) in found["sqf_hub.py"].what
    assert "pickle" in found["pytorch_model.bin"].what
    assert not any(fault.fatal for fault in found.values())


def test_an_auto_map_that_runs_something_else_is_named(small: Path):
    config = json.loads((small / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "elsewhere/repo--evil.LlamaConfig", "AutoModel": "sqf_hub.Model"}
    (small / "config.json").write_text(json.dumps(config))
    says = [str(fault) for fault in verify(small)]
    assert any("elsewhere/repo--evil.LlamaConfig" in text for text in says)
    assert any("AutoModel run sqf_hub.Model" in text for text in says)


def test_a_weight_that_is_gone_is_missed(small: Path):
    tensors = load_file(small / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_factors"]
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    (fault,) = verify(small)
    assert fault.fatal and "names 16 compressed weights, the files have 15" in str(fault)


def test_a_truncated_file_is_named(small: Path):
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    faults = verify(small)
    assert faults[0].where == "model.safetensors" and "no whole safetensors file" in faults[0].what


def test_not_finite_and_misshapen_tensors_are_named(small: Path):
    tensors = load_file(small / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    name = "model.layers.0.mlp.up_proj.weight_factors"
    tensors[name] = tensors[name].to(torch.float32)
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    says = [str(fault) for fault in verify(small)]
    assert any("model.norm.weight: has NaN or infinite entries" in text for text in says)
    assert any(f"{name}: must be 1-D uint8" in text for text in says)


def test_other_models_are_not_ours_to_judge(original: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="does not describe a model compressed by hf_sqf"):
        verify(original)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path)


FORGED = [
    ({"format_version": 999}, "newer hf_sqf"),
    ({"format_version": "../../etc"}, "format_version must be an integer"),
    ({"base_model": "/etc/passwd"}, "base_model must be"),
    ({"bits": "lots"}, "bits must be a number"),
    ({"load_from": "/tmp/x.pt"}, "unknown field load_from"),
    ({"block": 10**12}, "block must be"),
    ({"overrides": {"(": {"bits": 1}}}, "not a regular expression"),
    ({"coverage": "all"}, "coverage must be"),
    ({"fidelity": [1]}, "fidelity must be"),
]


@pytest.mark.parametrize(("options", "says"), FORGED, ids=[next(iter(options)) for options, _ in FORGED])
@pytest.mark.parametrize("trust", [False, True], ids=["imported", "remote_code"])
def test_forged_configs_are_refused_with_a_sentence(small: Path, options: dict, says: str, trust: bool):
    change_config(small, **options)
    with pytest.raises(ValueError, match=says):
        AutoModelForCausalLM.from_pretrained(small, trust_remote_code=trust)
    assert any(says in str(fault) and fault.fatal for fault in verify(small))


def test_huge_shapes_are_refused_before_anything_is_allocated(small: Path):
    """config.json promises weights of 2^36 parameters; the bytes on disk do not go with it."""
    config = json.loads((small / "config.json").read_text())
    config["intermediate_size"] = 2**30
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds factors of shapes"):
        AutoModelForCausalLM.from_pretrained(small)(torch.arange(3)[None])
