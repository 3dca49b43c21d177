"""Checkpoints: ordinary compressed models, from which training goes on as if it had not stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_sqf import SQFCallback
from hf_sqf.runtime.sqf_modules import SUFFIX
from tests.conftest import build, outputs_of
from tests.training.conftest import compressed

MakeTrainer = Callable[..., Trainer]
CASES = [
    pytest.param("light", {}, id="light"),
    pytest.param("light", {"structure": "vq"}, id="dictionary"),
    pytest.param("latent", {}, id="latent"),
    pytest.param("latent", {"trellis": 8}, id="trellis"),
    pytest.param("latent", {"structure": "vq"}, id="vq", marks=pytest.mark.slow),
    pytest.param("hard", {}, id="hard"),
    pytest.param("latent", {"original": True}, id="original"),
]
SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def callback(mode: str, original: bool = False) -> SQFCallback:
    return SQFCallback(mode, code_rate=60.0, every=2, original=build("llama") if original else None)


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("mode", "options"), CASES)
def test_resumes_to_the_same_trajectory(mode: str, options: dict, trainer_for: MakeTrainer, tmp_path: Path):
    options = dict(options)
    original = options.pop("original", False)
    straight = compressed("llama", **options)
    trainer_for(straight, callback(mode, original), build("llama"), **SAVING).train()
    resumed = compressed("llama", **options)
    trainer = trainer_for(resumed, callback(mode, original), build("llama"), folder="again", **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert same_state(straight, resumed)


def test_resumes_from_the_checkpoint_as_a_model(trainer_for: MakeTrainer, tmp_path: Path):
    """The model that is trained on may be the checkpoint's as well as the one at the start."""
    straight = compressed("llama")
    trainer_for(straight, callback("latent"), build("llama"), **SAVING).train()
    saved = str(tmp_path / "out/checkpoint-3")
    resumed = AutoModelForCausalLM.from_pretrained(saved)
    trainer_for(resumed, callback("latent"), build("llama"), folder="again", **SAVING).train(saved)
    assert same_state(straight, resumed)


@pytest.mark.parametrize(
    ("mode", "options"), [CASES[0], pytest.param("latent", {"trellis": 8}, marks=pytest.mark.slow)]
)
def test_checkpoints_are_ordinary_models(mode: str, options: dict, trainer_for: MakeTrainer, tmp_path: Path):
    model = compressed("llama_tied", **options)
    trainer = trainer_for(model, callback(mode), build("llama_tied"), **SAVING)
    names = set(compressed("llama_tied", **options).state_dict())
    at_save = {}

    def keep(*args, **kwargs):
        at_save[trainer.state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}

    trainer.callback_handler.callbacks[-1].on_save = keep
    trainer.train()
    assert set(at_save) == {3, 6}
    for step, state in at_save.items():
        folder = tmp_path / f"out/checkpoint-{step}"
        again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert set(again.state_dict()) == names == set(state)
        assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
        again.save_pretrained(tmp_path / "again")
        files = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
        first, second = files
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("mode", ["latent", pytest.param("light", marks=pytest.mark.slow)])
def test_the_best_model_at_the_end(mode: str, trainer_for: MakeTrainer):
    model = compressed("llama")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that it is not the last
    trainer = trainer_for(model, callback(mode), build("llama"), **{**SAVING, **options})
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < max(losses)
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_state(model, best)
    assert torch.equal(outputs_of(model.eval()), outputs_of(best))


def test_a_checkpoint_of_other_factors_is_refused(trainer_for: MakeTrainer, tmp_path: Path):
    trainer_for(compressed("llama"), callback("latent"), build("llama"), **SAVING).train()
    trainer = trainer_for(compressed("llama", structure="vq"), callback("latent"), build("llama"), folder="again")
    with pytest.raises(ValueError, match=r"_factors: the factors have another form"):
        trainer.train(str(tmp_path / "out/checkpoint-3"))


PROGRAM = """
import sys, time
from pathlib import Path
from transformers import Trainer, TrainerCallback, TrainingArguments
from hf_sqf import SQFCallback, distillation_loss
from tests.conftest import build
from tests.training.conftest import compressed, rows

class Slowly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[2]))

args = TrainingArguments(sys.argv[1], max_steps=40, per_device_train_batch_size=4, use_cpu=True, report_to="none",
                         disable_tqdm=True, save_steps=1, learning_rate=5e-3)
model = compressed("llama")
trainer = Trainer(model, args, train_dataset=rows(), callbacks=[SQFCallback("latent", code_rate=60.0), Slowly()],
                  compute_loss_func=distillation_loss(build("llama")))
trainer.train(resume_from_checkpoint=True if len(sys.argv) > 3 else None)
trainer.save_model(sys.argv[1] + "/final")
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path):
    """SIGKILL in the middle; what was saved before goes on to the same model."""

    def start(folder: str, pause: float, *more: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / folder), str(pause), *more], env=environment
        )

    assert start("straight", 0.0).wait() == 0
    killed = start("killed", 0.2)
    while not (tmp_path / "killed/checkpoint-5/trainer_state.json").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert get_last_checkpoint(str(tmp_path / "killed")) is not None
    assert start("killed", 0.0, "resume").wait() == 0
    first, second = (load_file(tmp_path / folder / "final/model.safetensors") for folder in ("straight", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first) and SUFFIX in "".join(first)
