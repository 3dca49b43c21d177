"""What recipes/distill_lm.py trains, factors or the decoded weights, and what it keeps."""

import argparse
import json

import pytest
import torch
from transformers import Trainer

from hf_sqf import SQFCallback, size_report
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


def test_what_is_kept_of_decoded_weights_has_bits_of_the_start_alone(tmp_path):
    recipe, model = module_of("recipes/distill_lm.py"), compressed("llama")
    sizes = size_report(model), size_report(model.dequantize())
    args = argparse.Namespace(model="some/model", mode="dense", keep=tmp_path / "kept", steps=2)
    points = [{"step": 0, "kl": 0.3}, {"step": 2, "kl": 0.2}]
    recipe.write(args, "distill_lm", {"kl": [0.3, 0.2], "steps": 2, "curve": points}, sizes, "kl", "KL divergence")

    text = (tmp_path / "kept.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["bits"] == [sizes[0].bits_per_weight, None] and "NaN" not in text
    assert record["bytes"] == [size.total_bytes for size in sizes]
    assert record["kl"] == [0.3, 0.2] and record["curve"] == points and record["model"] == "model"
    assert (tmp_path / "kept.png").stat().st_size > 0
