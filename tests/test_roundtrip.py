"""What a user does first: compress on load, run, save, load again, to the same outputs bit for bit."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)
from transformers.quantizers import auto

import hf_sqf
from hf_sqf import SQFConfig
from hf_sqf.runtime.sqf_modules import SUFFIX, SQFModule
from tests.conftest import ARCHITECTURES, GENERATING, build, inputs_for, outputs_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRUCTURES = ["auto", "grid", "svd", "sparse_pca", "vq", "pgd", "svd+grid"]
OPTIONS = {"bits": 5.0, "structure": "grid"}
AS_DENSE = {"quantization_config": SQFConfig(runtime="dense")}
"""Runs with the very operations of an ordinary model."""


class Made(NamedTuple):
    """A model compressed on load and saved, and what it gave before it was saved."""

    kind: type[PreTrainedModel]
    dense: Path
    small: Path
    outputs: torch.Tensor
    coverage: dict[str, Any]

    def load(self, **options) -> PreTrainedModel:
        return self.kind.from_pretrained(self.small, **options)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Compress a model of an architecture: made(name, dtype, structure), once a session each."""

    @cache
    def make(name: str, dtype: torch.dtype = torch.float32, structure: str = "grid") -> Made:
        folder = tmp_path_factory.mktemp(name)
        original = build(name, dtype)
        original.save_pretrained(folder / "dense")
        config = SQFConfig(bits=5.0, structure=structure)
        model = type(original).from_pretrained(folder / "dense", quantization_config=config, dtype=dtype)
        outputs = outputs_of(model)
        model.save_pretrained(folder / "model")
        return Made(type(model), folder / "dense", folder / "model", outputs, model.config.quantization_config.coverage)

    return make


def stored(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".py"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reload_is_bit_exact(name: str, dtype: torch.dtype, made: Callable[..., Made]):
    model = made(name, dtype)
    reloaded = model.load()
    assert any(isinstance(m, SQFModule) for m in reloaded.modules())
    assert model.outputs.dtype == dtype and model.outputs.isfinite().all()
    assert torch.equal(outputs_of(reloaded), model.outputs)
    assert reloaded.config.quantization_config.coverage == model.coverage


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharded_reload_is_bit_exact(name: str, made: Callable[..., Made], tmp_path: Path):
    made(name).load().save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(outputs_of(made(name).kind.from_pretrained(tmp_path)), made(name).outputs)


@pytest.mark.parametrize("begin", range(0, 64, 8))
def test_where_tensors_lie_in_a_file_changes_no_bit(begin: int, made: Callable[..., Made], tmp_path: Path):
    model = made("qwen2_moe")  # has a layer of one output: BLAS sums its products as they lie in memory
    folder = shutil.copytree(model.small, tmp_path / "model")
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    save_file(load_file(file), file, {**metadata, "": "x" * begin})
    loaded = model.kind.from_pretrained(folder)
    assert torch.equal(outputs_of(loaded), model.outputs)
    dense = model.kind.from_pretrained(folder, quantization_config=SQFConfig(dequantize=True))
    floats = [p for m in (loaded, dense) for p in m.parameters() if p.is_floating_point()]
    assert floats and all(p.data_ptr() % 64 == 0 for p in floats)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "name", ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama_tied", "gpt2", "mixtral"))]
)
def test_reload_of_every_structure_is_bit_exact(name: str, structure: str, made: Callable[..., Made]):
    model = made(name, structure=structure)
    assert torch.equal(outputs_of(model.load()), model.outputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saving_what_was_loaded_gives_the_same_bytes(name: str, made: Callable[..., Made], tmp_path: Path):
    made(name).load().save_pretrained(tmp_path / "model")
    assert stored(tmp_path / "model") == stored(made(name).small)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_memory_and_on_load_are_one(name: str, made: Callable[..., Made], tmp_path: Path):
    model = hf_sqf.compress(build(name), SQFConfig(**OPTIONS))
    assert torch.equal(outputs_of(model), made(name).outputs)
    assert model.config.quantization_config.coverage == made(name).coverage
    model.save_pretrained(tmp_path)
    saved, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, made(name).small))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama_tied", "t5", "resnet", "mixtral"])
def test_any_dtype_on_reload(name: str, target: torch.dtype, made: Callable[..., Made]):
    reloaded = made(name).load(dtype=target, **AS_DENSE)
    dense = made(name).load(dtype=target, quantization_config=SQFConfig(dequantize=True))
    assert outputs_of(reloaded).dtype == target
    assert torch.equal(outputs_of(reloaded), outputs_of(dense))
    packed = [p for n, p in reloaded.named_parameters() if n.endswith("_factors")]
    assert packed and all(p.dtype == torch.uint8 for p in packed)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("name", ["llama_tied", "bert", "t5", "mixtral"])
def test_device_maps(name: str, device_map: str, made: Callable[..., Made]):
    assert torch.equal(outputs_of(made(name).load(device_map=device_map)), made(name).outputs)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("name", "layer"),
    [("llama_tied", "model.layers.0"), ("bert", "encoder.layer.0"), ("t5", "encoder.block.0")]
    + [("mixtral", "model.layers.0"), ("resnet", "resnet.encoder.stages.0")],
)
def test_disk_offload(name: str, layer: str, made: Callable[..., Made], tmp_path: Path):
    holders = [n for n, m in made(name).load().named_modules() if m._parameters or m._buffers]
    device_map = {n: "cpu" for n in holders if not n.startswith(layer + ".")} | {layer: "disk"}
    reloaded = made(name).load(device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for n, p in reloaded.named_parameters() if n.endswith("_factors"))
    assert torch.equal(outputs_of(reloaded), made(name).outputs)
    reloaded.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (made(name).small / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is offloaded"):
        hf_sqf.dequantize(reloaded)


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, made: Callable[..., Made]):
    model, reloaded = hf_sqf.compress(build(name), SQFConfig(**OPTIONS)), made(name).load()
    inputs = {"input_ids": inputs_for(model)["input_ids"], "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs)
    assert expected.shape[1] >= 8
    assert torch.equal(reloaded.generate(**inputs), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dequantized_saves_as_an_ordinary_model(name: str, made: Callable[..., Made], tmp_path: Path):
    names = set(build(name).state_dict())
    expected = outputs_of(made(name).load(**AS_DENSE))
    on_load = made(name).load(quantization_config=SQFConfig(dequantize=True))
    for dense in (on_load, hf_sqf.dequantize(made(name).load()), made(name).load().dequantize()):
        assert not any(isinstance(m, SQFModule) for m in dense.modules())
        assert set(dense.state_dict()) == names
        assert getattr(dense, "hf_quantizer", None) is None
        assert torch.equal(outputs_of(dense), expected)
        dense.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        again, info = made(name).kind.from_pretrained(tmp_path, output_loading_info=True)
        saved = again.state_dict()
        assert all(torch.equal(saved[key], value) for key, value in dense.state_dict().items())
        if name in ("mixtral", "qwen2_moe"):  # by itself it multiplies grouped, and sums in another order
            again.set_experts_implementation("eager")
        assert torch.equal(outputs_of(again), expected)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_dequantize_into_a_dtype(made: Callable[..., Made]):
    dense = hf_sqf.dequantize(made("bert").load(), dtype=torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


def test_dequantized_can_be_compressed_again(made: Callable[..., Made]):
    dense = hf_sqf.dequantize(made("llama_tied").load())
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    again = hf_sqf.compress(dense, SQFConfig(bits=3.0, structure="grid"))
    assert again.config.quantization_config.coverage["bits"] <= 3.0


@pytest.mark.parametrize("name", ["llama_tied", "bert_masked", "t5", "gpt2"])
def test_tied_weights_are_stored_once_and_tied_again(name: str, made: Callable[..., Made]):
    for tied in (made(name).load(), hf_sqf.compress(build(name), SQFConfig(**OPTIONS))):
        embedding, head = tied.get_input_embeddings(), tied.get_output_embeddings()
        assert head.weight_factors is embedding.weight_factors
        tied.tie_weights()
        assert head.weight_factors is embedding.weight_factors
    with safe_open(made(name).small / "model.safetensors", "pt") as file:
        stored = [file.get_tensor(key).numpy().tobytes() for key in file.keys() if key.endswith(SUFFIX)]  # noqa: SIM118
    assert len(set(stored)) == len(stored)
    assert embedding.packed_size() in map(len, stored)


def test_base_and_task_models_read_each_others_checkpoints(made: Callable[..., Made], tmp_path: Path):
    causal = made("llama_tied").load()
    base = AutoModel.from_pretrained(made("llama_tied").small)
    assert torch.equal(outputs_of(base), causal.model(**inputs_for(causal))[0])
    base.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(AutoModelForCausalLM.from_pretrained(tmp_path)), made("llama_tied").outputs)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
    assert classifier.score.weight.isfinite().all() and not isinstance(classifier.score, SQFModule)


def test_config_of_a_compressed_model_serves_to_load_it(made: Callable[..., Made]):
    for config in (made("llama").load().config, AutoConfig.from_pretrained(made("llama").small)):
        assert torch.equal(outputs_of(made("llama").load(config=config)), made("llama").outputs)


def test_plain_dictionary_as_config(made: Callable[..., Made]):
    options = {"quant_method": "sqf", **OPTIONS}
    model = AutoModelForCausalLM.from_pretrained(made("llama").dense, quantization_config=options)
    assert torch.equal(outputs_of(model), made("llama").outputs)


def test_a_config_may_serve_for_several_models(made: Callable[..., Made]):
    config = SQFConfig(**OPTIONS)
    for name in ("llama", "llama_tied"):
        AutoModelForCausalLM.from_pretrained(made(name).dense, quantization_config=config)
        hf_sqf.compress(build(name), config)
    assert config.to_dict() == SQFConfig(**OPTIONS).to_dict()


@pytest.mark.parametrize("name", ["llama_tied", "resnet", "mixtral"])
def test_copies_are_independent_and_equal(name: str, made: Callable[..., Made]):
    model = made(name).load()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs_of(twin), made(name).outputs)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(outputs_of(model), made(name).outputs)


def test_memory_footprint_is_that_of_the_packed_bytes(made: Callable[..., Made]):
    model = made("llama").load(quantization_config=SQFConfig(runtime="stream"))
    packed = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_factors"))
    rest = sum(4 * p.numel() for n, p in model.named_parameters() if not n.endswith("_factors"))
    assert model.get_memory_footprint(return_buffers=False) == packed + rest
    assert model.get_memory_footprint() < build("llama").get_memory_footprint() / 5


# What must fail


@pytest.fixture
def altered(made: Callable[..., Made], tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a copy of a compressed model, to be altered, and its tensors."""
    folder = tmp_path / "altered"
    shutil.copytree(made("llama").small, folder)
    return folder, load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Altered = tuple[Path, dict[str, torch.Tensor]]


def test_without_the_plugin_loading_fails(made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "sqf")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "sqf")
    for name in ("llama", "gpt2", "resnet", "mixtral"):
        with pytest.raises(RuntimeError, match="mismatch"):
            made(name).load()


def test_missing_weight_is_an_error(altered: Altered):
    folder, tensors = altered
    del tensors["model.layers.1.mlp.up_proj.weight_factors"]
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"lacks 1 of 16 .*layers\.1\.mlp\.up_proj\.weight_factors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_left_over_weight_is_an_error(altered: Altered):
    folder, tensors = altered
    tensors["model.layers.7.mlp.up_proj.weight_factors"] = torch.zeros(9, dtype=torch.uint8)
    store(folder, tensors)
    with pytest.raises(ValueError, match="17 compressed weights where its config.json names 16"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_renamed_weight_is_an_error(altered: Altered):
    folder, tensors = altered
    tensors["model.layers.7.q.weight_factors"] = tensors.pop("model.layers.0.self_attn.q_proj.weight_factors")
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"no place for: .*model\.layers\.7\.q\.weight_factors"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("forged", [torch.zeros(9), torch.zeros(3, 3, dtype=torch.uint8)], ids=["dtype", "dimensions"])
def test_forged_tensor_is_an_error(forged: torch.Tensor, altered: Altered):
    folder, tensors = altered
    tensors["lm_head.weight_factors"] = forged
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight_factors in .*model\.safetensors must be 1-D uint8"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_factors_of_another_shape_are_an_error(altered: Altered):
    folder, tensors = altered
    tensors["model.layers.0.mlp.up_proj.weight_factors"] = tensors["lm_head.weight_factors"].clone()
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight_factors"):
        outputs_of(AutoModelForCausalLM.from_pretrained(folder))


def test_altered_bytes_are_an_error(altered: Altered):
    folder, tensors = altered
    packed = tensors["model.layers.0.mlp.up_proj.weight_factors"]
    packed[len(packed) // 2] ^= 1
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight_factors"):
        outputs_of(AutoModelForCausalLM.from_pretrained(folder))


def test_truncated_file_is_an_error(altered: Altered):
    folder, _ = altered
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|invalid"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_newer_format_is_refused(altered: Altered):
    folder, _ = altered
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 99, "unheard_of": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="newer hf_sqf"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_dequantize_of_what_is_not_compressed_is_an_error(made: Callable[..., Made]):
    with pytest.raises(ValueError, match="not compressed"):
        AutoModelForCausalLM.from_pretrained(made("llama").dense, quantization_config=SQFConfig(dequantize=True))
    with pytest.raises(ValueError, match="not compressed"):
        hf_sqf.dequantize(build("llama"))


def test_disk_offload_while_compressing_is_an_error(made: Callable[..., Made]):
    device_map = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="compress without offloading"):
        AutoModelForCausalLM.from_pretrained(
            made("llama").dense, quantization_config=SQFConfig(), device_map=device_map
        )


def test_resizing_compressed_embeddings_is_an_error(made: Callable[..., Made]):
    model = made("llama_tied").load()
    with pytest.raises(ValueError, match="before the model is compressed"):
        model.resize_token_embeddings(140)
    assert torch.equal(outputs_of(model), made("llama_tied").outputs)


# Real models


def test_minilm(minilm: Path, tmp_path: Path):
    model = AutoModel.from_pretrained(minilm, quantization_config=SQFConfig(bits=4.0, structure="grid"))
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path)
    text = ["A weight is a sum of products.", "Codes are sparse integers."]
    inputs = tokenizer(text, return_tensors="pt", padding=True)
    reloaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs)[0], model(**inputs)[0])
    coverage = model.config.quantization_config.coverage
    assert 3.98 <= coverage["bits"] <= 4.0
    assert coverage["compressed"] > 0.99 * coverage["parameters"]
    features = pipeline("feature-extraction", model=str(tmp_path))(text[0])
    with torch.no_grad():
        expected = model(**tokenizer(text[:1], return_tensors="pt"))[0]
    torch.testing.assert_close(torch.tensor(features), expected)


@pytest.mark.slow
def test_smollm2(smollm2: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=SQFConfig(bits=4.0, structure="grid"))
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)
    assert 3.98 <= model.config.quantization_config.coverage["bits"] <= 4.0
    written = pipeline("text-generation", model=str(tmp_path))("The capital of France is", max_new_tokens=4)
    assert "Paris" in written[0]["generated_text"]
