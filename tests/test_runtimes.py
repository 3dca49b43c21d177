"""One compressed model, run in every way that there is, does what its dense form does."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_sqf
from hf_sqf import SQFConfig
from hf_sqf.runtime.sqf_modules import SQFModule, set_runtime
from hf_sqf.runtime.sqf_resident import is_resident
from tests.conftest import ARCHITECTURES, build, inputs_for, outputs_of
from tests.smaps import SMAPS, resident

RUNTIMES = ["int8", "int4", "stream", "dense", "auto"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a compressed model of an architecture."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            hf_sqf.compress(build(name), SQFConfig(bits=5.0, structure="grid")).save_pretrained(folders[name])
        return folders[name]

    return make


def load(name: str, saved: Callable[[str], Path], runtime: str = "auto", **options) -> PreTrainedModel:
    config = SQFConfig(runtime=runtime)
    return type(build(name)).from_pretrained(saved(name), quantization_config=config, **options)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((found.double() - expected.double()).norm() / expected.double().norm()) < tolerance


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_files_and_memory(name: str, runtime: str, saved: Callable[[str], Path], tmp_path: Path):
    model = load(name, saved, runtime)
    dense = hf_sqf.dequantize(load(name, saved))
    assert close(outputs_of(model), outputs_of(dense))
    held = [p for n, p in model.named_parameters() if n.endswith("_factors")]
    assert all(is_resident(p) == (runtime not in ("stream", "dense")) for p in held)
    assert "runtime" not in (saved(name) / "config.json").read_text()
    model.save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (saved(name) / file).read_bytes()


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
@pytest.mark.parametrize("runtime", ["int8", "stream"])
def test_bytes_that_a_model_was_loaded_from_do_not_stay(runtime: str, tmp_path: Path):
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **size))
    hf_sqf.compress(model, SQFConfig(bits=5.0, structure="grid", trellis=None)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=SQFConfig(runtime=runtime))
    norms = 14  # and where weights meet: pages that are shared
    assert resident(file) < 0.25 * file.stat().st_size / 1024 + 4 * norms
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert close(loaded(ids).logits, hf_sqf.dequantize(model)(ids).logits)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral", "resnet"])
def test_runtime_can_change_at_any_time(name: str, saved: Callable[[str], Path], tmp_path: Path):
    model = load(name, saved)
    expected = outputs_of(model)
    for runtime in ("stream", "int8", "dense", "int4"):
        set_runtime(model, runtime)
        assert close(outputs_of(model), expected)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved(name) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="runtime must be one of auto, int8, int4, stream, dense"):
        set_runtime(model, "fast")
    with pytest.raises(ValueError, match="runtime must be one of"):
        SQFConfig(runtime="fast")


@pytest.mark.parametrize("runtime", ["int8", "stream"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype, runtime: str, saved: Callable[[str], Path]):
    """Closer to the dense model in float32 than the dense model in that dtype is, or as close."""
    exact = outputs_of(hf_sqf.dequantize(load("llama", saved)))
    rounded = outputs_of(hf_sqf.dequantize(load("llama", saved, dtype=dtype)))
    found = outputs_of(load("llama", saved, runtime, dtype=dtype))
    assert found.dtype == dtype
    error = float((rounded.double() - exact.double()).norm() / exact.double().norm())
    assert close(found, exact, 1.3 * error)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_state_dict_is_packed_and_loads(runtime: str, saved: Callable[[str], Path]):
    model, other = load("llama_tied", saved, runtime), load("llama_tied", saved, "stream")
    expected = outputs_of(model)
    state, packed = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], packed[key]) for key in packed) and state.keys() == packed.keys()
    tied = [state[k].data_ptr() for k in ("lm_head.weight_factors", "model.embed_tokens.weight_factors")]
    assert tied[0] == tied[1]
    different = hf_sqf.compress(build("llama_tied"), SQFConfig(bits=3.0, structure="grid", runtime=runtime))
    assert not close(outputs_of(different), expected, 1e-3)
    missing = different.load_state_dict(state)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(outputs_of(different), expected)
    assert different.lm_head.weight_factors is different.model.embed_tokens.weight_factors


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_copies_run_on_their_own(runtime: str, saved: Callable[[str], Path]):
    model = load("llama_tied", saved, runtime)
    expected = outputs_of(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    del model
    for twin in twins:
        assert torch.equal(outputs_of(twin), expected)


def _outputs_elsewhere(model: PreTrainedModel, queue) -> None:
    torch.set_num_threads(1)
    queue.put(outputs_of(model).numpy())


def test_other_processes(saved: Callable[[str], Path]):
    model = load("llama", saved)
    expected = outputs_of(model)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_outputs_elsewhere, args=(model, queue))
    process.start()
    assert close(torch.from_numpy(queue.get()), expected)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("runtime", ["int4", "stream", "dense"])
def test_compiled_without_a_break(runtime: str, saved: Callable[[str], Path]):
    model = load("llama_tied", saved, runtime)
    expected = outputs_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(**inputs_for(model)).logits, expected)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_compiled_convolutions_and_biases(name: str, saved: Callable[[str], Path]):
    model = load(name, saved)
    expected = outputs_of(model)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs_for(model))[0]
    assert close(found, expected)


@pytest.mark.parametrize("runtime", ["int4", "stream"])
def test_exported(runtime: str, saved: Callable[[str], Path]):
    model = load("bert", saved, runtime)
    inputs = inputs_for(model)
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs=dict(inputs))
        assert close(program.module()(**inputs)[0], outputs_of(model))
    assert any("sqf" in str(node.target) for node in program.graph.nodes)


def test_static_cache(saved: Callable[[str], Path]):
    model = load("llama", saved)
    ids = inputs_for(model)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), model.generate(ids, **options))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_autocast(runtime: str, saved: Callable[[str], Path]):
    model, dense = load("bert", saved, runtime), hf_sqf.dequantize(load("bert", saved))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outputs_of(model), outputs_of(dense)
    assert found.dtype == expected.dtype
    assert close(found, expected, 2e-2)
    linear = next(m for m in model.modules() if isinstance(m, SQFModule) and isinstance(m, nn.Linear))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert linear(torch.randn(2, linear.in_features)).dtype == torch.bfloat16


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", "resnet", "mixtral"])
def test_gradients_reach_what_is_not_compressed(name: str, runtime: str, saved: Callable[[str], Path]):
    model, dense = load(name, saved, runtime), hf_sqf.dequantize(load(name, saved))
    for m in (model, dense):
        for n, p in m.named_parameters():
            p.requires_grad_(p.is_floating_point() and "norm" in n or n.endswith("bias"))
        outputs = m(**inputs_for(m))[0].float().flatten(1)
        (outputs * torch.linspace(-1, 1, outputs.shape[1])).sum().backward()
    expected = dict(dense.named_parameters())
    compared = 0
    for n, p in model.named_parameters():
        if p.grad is not None and float(expected[n].grad.norm()) > 1e-6:
            assert close(p.grad, expected[n].grad, 1e-3), n
            compared += 1
    assert compared


def test_compiled_training_step(saved: Callable[[str], Path]):
    model = load("llama", saved)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    inputs = inputs_for(model)
    model(**inputs).logits.square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits.square().mean().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(expected) == 2
    assert all(close(f, e, 1e-4) for f, e in zip(found, expected, strict=True))


def test_moving_keeps_it_running(saved: Callable[[str], Path]):
    model = load("llama", saved)
    model.to("cpu").to(torch.bfloat16)
    found = outputs_of(model)
    assert found.dtype == torch.bfloat16
    assert close(outputs_of(model.to(torch.float32)), found, 3e-2)


def test_offloaded_weights_stay_packed(saved: Callable[[str], Path], tmp_path: Path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    whole = outputs_of(load("llama", saved))
    for runtime in ("int8", "stream"):
        model = AutoModelForCausalLM.from_pretrained(
            saved("llama"),
            device_map=device_map,
            offload_folder=tmp_path / runtime,
            quantization_config=SQFConfig(runtime=runtime),
        )
        assert model.model.layers[0].mlp.up_proj.weight_factors.is_meta
        assert close(outputs_of(model), whole)


def test_loaded_in_inference_mode(saved: Callable[[str], Path]):
    expected = outputs_of(load("llama_tied", saved))
    with torch.inference_mode():
        model = load("llama_tied", saved)
        assert torch.equal(outputs_of(model), expected)
        assert torch.equal(outputs_of(model), expected)


def test_compressed_in_inference_mode():
    with torch.inference_mode():
        model = hf_sqf.compress(build("llama_tied"), SQFConfig(bits=5.0, structure="grid", runtime="stream"))
        expected = outputs_of(model)
        for runtime in RUNTIMES:
            set_runtime(model, runtime)
            assert close(outputs_of(model), expected)


def test_inputs_that_are_not_contiguous_or_empty(saved: Callable[[str], Path]):
    layer = load("llama", saved).model.layers[0].mlp.up_proj
    weight = layer.dense()
    with torch.no_grad():
        for x in (torch.randn(32, 5).T, torch.randn(2, 3, 64)[..., ::2], torch.randn(32), torch.randn(1, 2, 3, 32)):
            assert close(layer(x), x @ weight.T)
        assert layer(torch.randn(0, 32)).shape == (0, weight.shape[0])
        assert layer(torch.randn(2, 0, 32)).shape == (2, 0, weight.shape[0])
        with pytest.raises(ValueError, match="last dimension of the input is 31, the weight expects 32"):
            layer(torch.randn(2, 31))


def test_lookups_out_of_range_are_an_error(saved: Callable[[str], Path]):
    for runtime in RUNTIMES:
        with pytest.raises(IndexError):
            load("llama", saved, runtime).model.embed_tokens(torch.tensor([5, 128]))
