"""A loaded model holds the bytes of its file until it first runs."""

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sqf
from hf_sqf import SQFConfig, set_runtime
from hf_sqf.runtime import sqf_forms
from hf_sqf.runtime.sqf_jit import HAVE_NUMBA
from hf_sqf.runtime.sqf_modules import SUFFIX, SQFModule
from hf_sqf.runtime.sqf_resident import is_resident
from tests.conftest import build, inputs_for, outputs_of

pytestmark = pytest.mark.skipif(not HAVE_NUMBA, reason="compiled kernels: auto is dense without them")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("forms")
    hf_sqf.compress(build("llama_tied"), SQFConfig(bits=3.0, structure="grid", trellis=None)).save_pretrained(made)
    return made


def load(folder: Path, runtime: str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=SQFConfig(runtime=runtime))


def modules_of(model: torch.nn.Module) -> list[SQFModule]:
    return [module for module in model.modules() if isinstance(module, SQFModule)]


def packed(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(SUFFIX)]


def expected(folder: Path) -> torch.Tensor:
    model = load(folder, "stream")
    set_runtime(model, "int4")
    assert not any(module.waiting for module in modules_of(model)) and all(map(is_resident, packed(model)))
    return outputs_of(model)


def test_all_take_their_form_when_the_first_runs(folder: Path):
    model = load(folder)
    assert all(module.waiting for module in modules_of(model)) and not any(map(is_resident, packed(model)))
    assert torch.equal(outputs_of(model), expected(folder))
    assert not any(module.waiting for module in modules_of(model)) and all(map(is_resident, packed(model)))


def test_stream_waits_for_nothing(folder: Path):
    model = load(folder, "stream")
    assert not any(module.waiting for module in modules_of(model))
    outputs_of(model)
    assert not any(map(is_resident, packed(model)))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_waiting_model_run_on_their_own(again, folder: Path):
    model = load(folder)
    other = again(model)
    assert torch.equal(outputs_of(other), expected(folder))
    assert all(module.waiting for module in modules_of(model))
    assert torch.equal(outputs_of(model), expected(folder))


def test_a_waiting_model_saves_what_it_was_loaded_from(folder: Path, tmp_path: Path):
    load(folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_another_runtime_before_the_first_run(folder: Path):
    model = load(folder)
    set_runtime(model, "stream")
    assert not any(module.waiting for module in modules_of(model)) and not any(map(is_resident, packed(model)))
    outputs_of(model)
    assert not any(map(is_resident, packed(model)))


def test_threads_that_run_first_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, model, found, kept = expected(folder), load(folder), [], []
    keep_all = sqf_forms.keep_all
    monkeypatch.setattr(sqf_forms, "keep_all", lambda modules: (kept.append(modules), keep_all(modules)))
    barrier, inputs = threading.Barrier(4), inputs_for(model)  # drawn once: threads share one random generator

    @torch.no_grad()
    def run() -> None:
        barrier.wait()
        found.append(model(**inputs)[0])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, wanted) for one in found)
    assert len(kept) == 1  # one thread decoded for all


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_program_that_is_compiled_before_anything_ran(folder: Path, backend: str):
    """Nothing waits behind its back, with packed bytes beside those that run; and it is made once."""
    torch._dynamo.reset()  # of programs of models that are gone
    model = load(folder)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        found = [compiled(input_ids=ids).logits for _ in range(2)]
    assert not any(module.waiting for module in modules_of(model)) and all(map(is_resident, packed(model)))
    with torch.no_grad():
        torch.testing.assert_close(found, [load(folder)(input_ids=ids).logits] * 2)
