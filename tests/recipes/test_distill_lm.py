"""What recipes/distill_lm.py trains: factors, or the decoded weights."""

import argparse

import pytest
import torch
from transformers import Trainer

from hf_sqf import SQFCallback
from hf_sqf.runtime.sqf_model import compressed_modules
from tests.conftest import build, inputs_for, module_of
from tests.training.conftest import compressed, rows


@pytest.mark.parametrize("mode", ["light", "dense"])
def test_what_is_trained(mode, tmp_path):
    recipe = module_of("recipes/distill_lm.py")
    before = dict(compressed("llama").dequantize().named_parameters())
    args = argparse.Namespace(
        mode=mode, code_rate=0.5, block_steps=0, bf16=False, hidden_states=0.0, steps=2, batch=4,
        learning_rate=1e-3, warmup=0,
    )  # fmt: skip
    model, callbacks, loss = recipe.to_train(args, compressed("llama"), build("llama"), train="all")
    given = recipe.training_arguments(args, str(tmp_path), logging_steps=1)
    Trainer(model, given, train_dataset=rows(16), callbacks=callbacks, compute_loss_func=loss).train()

    assert [type(callback) for callback in callbacks] == ([SQFCallback] if mode == "light" else [])
    assert bool(list(compressed_modules(model))) == (mode == "light")
    assert model(**inputs_for(model)).logits.isfinite().all()
    if mode == "dense":
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {name for name in before if name not in moved} == {"model.embed_tokens.weight"}
