"""Distillation block by block, before training from end to end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer

from hf_sqf import SQFCallback
from hf_sqf.compress.blocks import find_stacks
from hf_sqf.runtime.sqf_modules import SUFFIX
from hf_sqf.training.blockwise import distill_blocks, relative_error
from hf_sqf.training.modules import TrainedModule
from tests.conftest import build
from tests.training.conftest import compressed, rows

MakeTrainer = Callable[..., Trainer]
STEPS = 24


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    ids = torch.stack([row["input_ids"] for row in rows(8 * count)])
    return [{"input_ids": some} for some in ids.split(8)]


@torch.no_grad()
def errors(model: PreTrainedModel, teacher: PreTrainedModel) -> list[float]:
    """Return the relative error of what each block gives on data that nothing was fitted to."""
    ids = torch.stack([row["input_ids"] for row in rows(64)[48:]])
    states = [m.eval()(input_ids=ids, output_hidden_states=True).hidden_states[1:] for m in (model, teacher)]
    return [float(relative_error(one, other)) for one, other in zip(*states, strict=True)]


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert"])
def test_blocks_come_nearer_to_the_teachers(name: str):
    model, teacher = compressed(name, bits=2.0), build(name)
    callback = SQFCallback()
    callback.start(model)
    first, last = distill_blocks(model, teacher, batches(), STEPS, 1e-2, lambda block, step: None)
    assert last < 0.95 * first
    callback.finish()


@pytest.mark.parametrize("mode", ["light", "latent", "hard"])
def test_the_trainer_begins_with_blocks(mode: str, trainer_for: MakeTrainer):
    model, teacher = compressed("llama_tied", bits=2.0), build("llama_tied")
    before = errors(model, teacher)
    callback = SQFCallback(mode, code_rate=0.2, block_steps=STEPS, original=teacher)
    trainer_for(model, callback, teacher, learning_rate=1e-2, max_steps=1, lr_scheduler_type="constant").train()
    after = errors(model, teacher)
    assert not any(isinstance(module, TrainedModule) for module in model.modules())
    assert all(one < other for one, other in zip(after, before, strict=True))


def test_a_run_that_resumes_has_had_its_blocks(trainer_for: MakeTrainer, tmp_path: Path):
    ends = []
    for stop in (None, 2):
        model, teacher = compressed("llama_tied"), build("llama_tied")
        options = {"folder": f"out{stop}", "save_strategy": "steps", "save_steps": 2}
        trainer_for(model, SQFCallback(block_steps=3, original=teacher), teacher, **options).train()
        if stop:
            model = compressed("llama_tied")
            trainer = trainer_for(model, SQFCallback(block_steps=3, original=teacher), teacher, **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / f"out{stop}/checkpoint-{stop}"))
        ends.append({name: value for name, value in model.state_dict().items() if name.endswith(SUFFIX)})
    assert ends[0] and all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_masked_tokens_do_not_count():
    expected, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 0, 0]])
    states = expected.clone()
    states[0, 2], states[1, 1:] = 100.0, -100.0
    assert float(relative_error(states, expected, mask)) == 0.0
    states[0, 0] = 2.0 * expected[0, 0]
    assert float(relative_error(states, expected, mask)) == pytest.approx(1 / 3)


# What must fail


def test_models_without_blocks():
    model, teacher = compressed("resnet"), build("resnet")
    assert not find_stacks(teacher.eval(), {"pixel_values": torch.randn(2, 3, 32, 32)})
    with pytest.raises(ValueError, match="block_steps: 0 blocks of the model can be run one by one"):
        distill_blocks(model, teacher, [{"pixel_values": torch.randn(2, 3, 32, 32)}], 1, 1e-3, lambda block, step: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_steps": 2}, "block_steps needs the original that blocks are fitted to"),
        ({"block_steps": -1, "original": torch.nn.Linear(1, 1)}, "block_steps must be an integer of 0 or more"),
        ({"block_steps": 1.5, "original": torch.nn.Linear(1, 1)}, "block_steps must be an integer of 0 or more"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SQFCallback(**options)
