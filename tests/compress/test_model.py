"""compress: what is compressed, to how many bits, and what is refused before anything is changed."""

import copy
import importlib
import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

import hf_sqf
from hf_sqf import SQFConfig
from hf_sqf.compress.budget import TOLERANCE
from hf_sqf.compress.factorize import solve
from hf_sqf.compress.job import Job
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.targets import EMBEDDING, EXCLUDED, HEAD, KIND, SMALL
from hf_sqf.runtime.sqf_modules import SQFModule
from tests.conftest import ARCHITECTURES, build, outputs_of

GRID = {"structure": "grid", "trellis": None}


def compress(name: str, bits: float = 5.0, **options) -> PreTrainedModel:
    return hf_sqf.compress(build(name), SQFConfig(**{"bits": bits, **GRID, **options}))


def coverage_of(model: PreTrainedModel) -> dict:
    return model.config.quantization_config.coverage


def rate(module: SQFModule, name: str = "weight") -> float:
    """Bits per parameter of one weight."""
    return 8.0 * module.packed_size(name) / module.dense(name).numel()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bits_are_met_from_below(name: str):
    coverage = coverage_of(compress(name))
    assert 5.0 * (1.0 - TOLERANCE) <= coverage["bits"] <= 5.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coverage_is_what_became_of_the_model(name: str):
    original, model = build(name), compress(name)
    coverage, parameters = coverage_of(model), dict(original.named_parameters())
    held = {
        f"{prefix}.{attribute}": (module, attribute)
        for prefix, module in model.named_modules()
        if isinstance(module, SQFModule)
        for attribute in module.held
    }
    found = {n: p for n, p in parameters.items() if n in held}  # without the targets of ties
    assert coverage["weights"] == len(found)
    assert coverage["parameters"] == sum(p.numel() for p in parameters.values())
    assert coverage["compressed"] == sum(p.numel() for p in found.values())
    assert set(coverage["dense"]) == {n for n, p in parameters.items() if p.dim() >= 2 and n not in found}
    assert coverage["bits"] == pytest.approx(hf_sqf.size_report(model).bits_per_weight, abs=1e-4)


def test_what_stays_dense_says_why():
    assert coverage_of(compress("resnet"))["dense"] == {"classifier.1.weight": HEAD}
    vit = coverage_of(compress("vit"))["dense"]
    assert vit["classifier.weight"] == HEAD
    assert {reason for name, reason in vit.items() if name != "classifier.weight"} <= {KIND, SMALL}
    assert set(coverage_of(compress("mixtral"))["dense"].values()) == {KIND}  # routers
    qwen = coverage_of(compress("qwen2_moe"))["dense"]
    assert qwen["model.layers.0.mlp.shared_expert_gate.weight"] == SMALL  # 32 parameters


def test_the_last_layer_of_a_base_model_is_no_head():
    model = compress("bert")
    assert isinstance(model.pooler.dense, SQFModule)


def test_only_a_classifier_is_taken_for_a_head():
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = hf_sqf.compress(BertForSequenceClassification(config), SQFConfig(bits=5.0, **GRID))
    assert coverage_of(model)["dense"]["classifier.weight"] == HEAD
    assert isinstance(model.bert.pooler.dense, SQFModule)
    assert isinstance(compress("llama").lm_head, SQFModule)


def test_modules_to_not_convert():
    model = compress("llama", modules_to_not_convert=["lm_head", r"model.layers.0.mlp"])
    dense = coverage_of(model)["dense"]
    assert dense == dict.fromkeys(
        ["lm_head.weight", *(f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down"))], EXCLUDED
    )
    assert isinstance(model.model.layers[1].mlp.up_proj, SQFModule)
    assert isinstance(
        compress("vit", modules_to_not_convert=["layer"]).vit.embeddings.patch_embeddings.projection, SQFModule
    )


def test_a_list_of_modules_replaces_the_default():
    assert isinstance(compress("resnet", modules_to_not_convert=[]).classifier[1], SQFModule)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert"])
def test_without_embeddings(name: str):
    model = compress(name, include_embeddings=False)
    embedding = model.get_input_embeddings()
    assert not isinstance(embedding, SQFModule)
    assert not isinstance(model.get_output_embeddings(), SQFModule)
    assert EMBEDDING in coverage_of(model)["dense"].values()
    if name != "llama" and model.get_output_embeddings() is not None:
        assert model.get_output_embeddings().weight is embedding.weight


def test_one_name_of_tied_weights_excludes_them_all():
    model = compress("llama_tied", modules_to_not_convert=["lm_head"])
    assert not isinstance(model.model.embed_tokens, SQFModule)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_overrides_of_bits_stand_outside_the_average():
    model = compress("llama", bits=4.0, overrides={r"[kv]_proj": {"bits": 8}, "lm_head": {"bits": 6}})
    groups: dict[float, list[tuple[int, int]]] = {4.0: [], 8.0: [], 6.0: []}
    for row in hf_sqf.size_report(model).rows:
        if row["structure"] == "grid":
            name = row["name"]
            bits = 8.0 if "k_proj" in name or "v_proj" in name else 6.0 if "lm_head" in name else 4.0
            groups[bits].append((8 * row["bytes"], row["parameters"]))
    for bits, members in groups.items():
        average = sum(size for size, _ in members) / sum(count for _, count in members)
        assert bits * (1.0 - TOLERANCE) <= average <= bits


def test_overrides_of_the_structure_alone_share_the_average():
    model = compress("llama", overrides={"lm_head": {"structure": "vq"}})
    assert model.lm_head.factors()[0].structure == "vq"
    assert model.model.layers[0].mlp.up_proj.factors()[0].structure == "grid"
    assert coverage_of(model)["bits"] <= 5.0


def test_metrics_are_asked_for_and_heeded():
    asked: dict[str, list[tuple[int, ...]]] = {}

    def metrics(name: str, matrices: list[torch.Tensor]) -> list[Metric]:
        asked[name] = [tuple(m.shape) for m in matrices]
        important = 4.0 if ".layers.0." in name else 1.0
        return [Metric(g=torch.tensor([important / float(m.square().mean().sqrt())])) for m in matrices]

    model = hf_sqf.compress(build("mixtral"), SQFConfig(bits=5.0, **GRID), metrics)
    assert asked["model.layers.0.mlp.experts.gate_up_proj"] == [(128, 32)] * 4
    assert asked["model.layers.0.self_attn.k_proj.weight"] == [(16, 32)]
    first, second = (rate(layer.self_attn.q_proj) for layer in model.model.layers)
    assert first == pytest.approx(second + 2.0, abs=0.4)  # two octaves finer


def test_experts_are_run_one_by_one():
    assert compress("mixtral").config._experts_implementation == "eager"


def test_modules_kept_in_float32_compute_in_it(tmp_path):
    build("t5").save_pretrained(tmp_path)
    config = SQFConfig(bits=5.0, **GRID)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float16)
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert isinstance(layer.wo, SQFModule) and layer.wo.weight.dtype == torch.float32
    assert layer.wi.weight.dtype == torch.float16


def test_same_bytes_on_any_number_of_threads():
    states = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            states.append(state(hf_sqf.compress(build("bert"), SQFConfig(bits=4.0))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_shared_modules_stay_shared():
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    hf_sqf.compress(model, SQFConfig(bits=5.0, **GRID))
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert isinstance(model.model.layers[1].mlp.up_proj, SQFModule)


def test_progress_obeys_the_switch_of_transformers(capfd: pytest.CaptureFixture[str]):
    compress("vit")
    assert "Compressing weights" in capfd.readouterr().err
    transformers_logging.disable_progress_bar()
    try:
        compress("vit")
    finally:
        transformers_logging.enable_progress_bar()
    assert "Compressing weights" not in capfd.readouterr().err


def test_coverage_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="hf_sqf"):
        compress("resnet")
    assert "% of the parameters to " in caplog.text
    assert "left as it is: classifier.1.weight (output head)" in caplog.text


# What is refused, before anything is changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(name: str, value: float):
    model = build("llama_tied")
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = value
    before = state(model)
    with pytest.raises(ValueError, match=f"{name} has NaN or infinite entries"):
        hf_sqf.compress(model, SQFConfig(bits=5.0, **GRID))
    unchanged(model, before)


def unchanged(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)
    assert not any(isinstance(m, SQFModule) for m in model.modules())
    assert getattr(model, "hf_quantizer", None) is None
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"no_such_layer": {"bits": 6}}}, "overrides: 'no_such_layer' fits no weight"),
        ({"overrides": {"proj": {"bits": 6}, "k_proj": {"bits": 8}}}, "'k_proj' fits no weight .* earlier expressions"),
        ({"overrides": {"lm_head": {"bits": 6}}, "modules_to_not_convert": ["lm_head"]}, "'lm_head' fits no weight"),
        ({"modules_to_not_convert": ["model", "lm_head"]}, "no weight that can be compressed"),
        ({"target_size": 100}, "target_size=100 cannot be reached"),
    ],
)
def test_options_that_fit_nothing(options: dict, message: str):
    model = build("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        hf_sqf.compress(model, SQFConfig(**GRID, **options))
    unchanged(model, before)


def test_bits_that_cannot_be_reached_name_the_smallest(monkeypatch: pytest.MonkeyPatch):
    model = build("llama")
    before = state(model)
    monkeypatch.setattr(Job, "_solve", lambda *_: pytest.fail("work was done"))
    with pytest.raises(
        ValueError, match=r"bits=0\.2 cannot be reached; the smallest for these weights is [01]\.\d\d\d"
    ):
        hf_sqf.compress(model, SQFConfig(bits=0.2, **GRID))
    unchanged(model, before)


def test_what_is_compressed_already():
    model = compress("llama")
    expected = outputs_of(model)
    with pytest.raises(ValueError, match="quantized already"):
        hf_sqf.compress(model, SQFConfig(bits=2.0))
    assert torch.equal(outputs_of(model), expected)


def test_what_is_no_model_of_transformers():
    with pytest.raises(TypeError, match="expected a model of transformers, got Linear"):
        hf_sqf.compress(nn.Linear(4, 4))


def test_an_error_while_solving_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model = build("llama")
    before, calls = state(model), []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return solve(*args, **options)

    monkeypatch.setattr(importlib.import_module("hf_sqf.compress.job"), "solve", failing)
    with pytest.raises(KeyboardInterrupt):
        hf_sqf.compress(model, SQFConfig(bits=5.0, **GRID))
    unchanged(model, before)
    outputs_of(copy.deepcopy(model))
