"""size_report agrees with the files on disk to the byte, and tells where they go."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from hf_sqf import SQFConfig
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_size import size_report
from tests.conftest import build

KEYS = {
    "name", "structure", "shape", "matrices", "parameters", "sparsity", "bytes", "code_bits", "dictionary_bits",
    "step_bits", "header_bits", "entropy_bits", "bits_per_weight",
}  # fmt: skip


def written(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def parts(row):
    return sum(row[f"{key}_bits"] for key in ("code", "dictionary", "step", "header"))


def test_every_byte_of_a_file_is_accounted_for(structure, factors_of, tmp_path):
    factors = factors_of(structure)
    tensors = {"a.weight_factors": pack([factors]), "b.weight_factors": pack([factors_of("grid")] * 3)}
    tensors |= {"norm.weight": torch.ones(7), "steps": torch.zeros((2, 3), dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    report = size_report(tmp_path)
    rows = {row["name"]: row for row in report.rows}
    assert report.total_bytes == written(tmp_path) == sum(row["bytes"] for row in report.rows)
    assert all(set(row) == KEYS for row in report.rows)
    weight, experts = rows["a.weight"], rows["b.weight"]
    assert (weight["structure"], weight["shape"], weight["parameters"]) == (factors.structure, [24, 30], 720)
    assert weight["sparsity"] == pytest.approx(factors.sparsity)
    assert weight["entropy_bits"] < 8 * weight["bytes"]
    assert (experts["matrices"], experts["parameters"]) == (3, 2160)
    assert parts(weight) == 8 * weight["bytes"]
    assert parts(experts) == 8 * experts["bytes"]
    assert rows["norm.weight"]["structure"] == "dense"
    compressed = weight["bytes"] + experts["bytes"]
    assert report.compressed_bytes == compressed
    assert report.bits_per_weight == 8 * compressed / 2880


def test_shards_and_their_index_count(factors_of, tmp_path):
    for i in range(2):
        save_file({f"{i}.weight_factors": pack([factors_of("vq", seed=i)])}, tmp_path / f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    report = size_report(tmp_path)
    assert report.total_bytes == written(tmp_path) == sum(row["bytes"] for row in report.rows)
    assert len(report.rows) == 3


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral"])
def test_a_model_reports_what_saving_it_writes(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense", quantization_config=SQFConfig(bits=4))
    model.save_pretrained(tmp_path / "small")
    files = list((tmp_path / "small").glob("*.safetensors"))
    from_model, from_files = size_report(model), size_report(tmp_path / "small")
    assert from_model.total_bytes == from_files.total_bytes == sum(file.stat().st_size for file in files)
    assert from_model == from_files
    assert from_model.bits_per_weight > 3


def test_a_model_that_is_not_compressed_is_all_dense(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    report = size_report(model)
    assert report == size_report(tmp_path)
    assert {row["structure"] for row in report.rows} == {"dense", "file headers"}
    assert math.isnan(report.bits_per_weight)
    assert json.loads(report.to_json())["bits_per_weight"] is None


def test_text_and_json_tell_the_same(factors_of, tmp_path):
    save_file({"a.weight_factors": pack([factors_of("svd+grid")])}, tmp_path / "model.safetensors")
    report = size_report(tmp_path)
    text, data = str(report), json.loads(report.to_json())
    assert data["rows"] == report.rows
    assert data["total_bytes"] == report.total_bytes
    assert f"{report.total_bytes:,} bytes" in text
    assert "a.weight  svd+grid" in text


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        size_report(tmp_path)
