"""The fidelity check: what it measures, what it notes, and what it refuses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sqf import SQFConfig, compress
from hf_sqf.hub import OriginalMissing, check
from hf_sqf.hub.checking import config_of, fingerprint, judge
from hf_sqf.report.fidelity import compare, default_texts

TEXTS = ["the a of and is", "is the of", "a a a and of the is the of and"]


@torch.no_grad()
def test_kl_is_what_its_definition_says(model: PreTrainedModel, original: Path):
    dense = LlamaForCausalLM.from_pretrained(original)
    tokens = torch.randint(0, 128, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    found = compare(model, dense, [{"input_ids": tokens, "attention_mask": mask}])
    p = F.log_softmax(dense(tokens, attention_mask=mask).logits, -1)
    q = F.log_softmax(model(tokens, attention_mask=mask).logits, -1)
    kl = (p.exp() * (p - q)).sum(-1)[mask.bool()]
    assert found["value"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=2e-6)
    assert found["count"] == 18
    same = (p.argmax(-1) == q.argmax(-1))[mask.bool()].float()
    assert found["agreement"] == pytest.approx(float(same.mean()), abs=1e-6)
    kept = mask[:, 1:].bool()
    nll = F.cross_entropy(dense(tokens, attention_mask=mask).logits[:, :-1][kept], tokens[:, 1:][kept])
    assert found["original_perplexity"] == pytest.approx(math.exp(nll), rel=1e-3)


def test_a_model_is_faithful_to_itself(original: Path):
    dense = LlamaForCausalLM.from_pretrained(original)
    found = compare(dense, dense, [{"input_ids": torch.arange(20)[None]}])
    assert found["value"] == 0 and found["agreement"] == 1
    assert found["perplexity"] == found["original_perplexity"]


def test_vectors_are_compared_by_their_cosine():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    other = BertModel(bert.config)
    tokens = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    found = compare(other, bert, [tokens])
    with torch.no_grad():
        a, b = (m.eval()(**tokens).last_hidden_state for m in (bert, other))
    pooled = [torch.stack([h[0].mean(0), h[1, :3].mean(0)]) for h in (a, b)]
    cosines = F.cosine_similarity(*pooled)
    assert found["metric"] == "cosine" and found["count"] == 2
    assert found["value"] == pytest.approx(float(cosines.mean()), abs=2e-6)
    assert found["worst"] == pytest.approx(float(cosines.min()), abs=2e-6)


def _bert() -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


def _vit() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))


def _t5() -> PreTrainedModel:
    sizes = {"vocab_size": 90, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))


@pytest.mark.parametrize(("dense", "metric"), [(_bert, "cosine"), (_vit, "kl"), (_t5, "kl")])
def test_models_without_a_tokenizer_get_random_inputs(dense, metric: str, tmp_path: Path):
    torch.manual_seed(0)
    dense().save_pretrained(tmp_path)
    model = type(dense()).from_pretrained(tmp_path, quantization_config=SQFConfig(bits=8, structure="grid"))
    found = check(model)  # the original is where it was loaded from
    assert found["metric"] == metric and found["name"] == "random inputs"
    assert found["value"] > 0.99 if metric == "cosine" else 0 <= found["value"] < 0.1
    assert judge(config_of(model)) is None


def test_result_is_noted_with_all_that_it_was_measured_on(model: PreTrainedModel, original: Path, tmp_path: Path):
    found = check(model, original, TEXTS, name="three sentences (test)", context=8)
    assert found["name"] == "three sentences (test)" and found["context"] == 8 and found["dtype"] == "float32"
    assert found["weights"] == fingerprint(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert config_of(again).fidelity == found
    assert fingerprint(again) == found["weights"]


def test_default_texts_are_prose(model: PreTrainedModel, original: Path):
    assert len(default_texts()) == 16 and min(map(len, default_texts())) > 1000
    assert check(model, original)["count"] == 16 * 64  # the model's own limit on its context


def test_fingerprint_knows_the_weights(model: PreTrainedModel):
    before = fingerprint(model)
    packed = model.model.layers[0].mlp.up_proj.weight_factors
    packed.data[-1] ^= 1
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("options", "fidelity", "says"),
    [
        ({}, None, None),
        ({}, {"metric": "kl", "value": 0.9}, None),
        ({}, {"metric": "kl", "value": 1.1}, "1.1 nats, above max_kl=1"),
        ({"max_kl": 0.5}, {"metric": "kl", "value": 0.9}, "above max_kl=0.5"),
        ({"max_kl": None}, {"metric": "kl", "value": 9.0}, None),
        ({}, {"metric": "cosine", "value": 0.8}, "0.8, below min_cosine=0.9"),
        ({"min_cosine": 0.7}, {"metric": "cosine", "value": 0.8}, None),
    ],
)
def test_judgement(options: dict, fidelity: dict | None, says: str | None):
    reason = judge(SQFConfig(fidelity=fidelity, **options))
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    "options",
    [
        {"max_kl": -1},
        {"max_kl": True},
        {"min_cosine": 1.5},
        {"base_model": "/home/me/x"},
        {"base_model": "../x"},
        {"fidelity": 3},
    ],
)
def test_thresholds_out_of_range_are_refused(options: dict):
    with pytest.raises(ValueError, match=next(iter(options))):
        SQFConfig(**options)


def test_without_the_original_there_is_no_check(small: Path, tmp_path: Path):
    reloaded = LlamaForCausalLM.from_pretrained(small)
    with pytest.raises(OriginalMissing, match="compressed itself"):
        check(reloaded)
    with pytest.raises(OriginalMissing, match="not on this machine"):
        check(reloaded, tmp_path / "nowhere")


def test_texts_need_a_tokenizer(model: PreTrainedModel, original: Path, tmp_path: Path):
    LlamaForCausalLM.from_pretrained(original).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give tokenizer="):
        check(model, tmp_path, TEXTS)


def test_broken_outputs_are_no_result(model: PreTrainedModel, original: Path):
    dense = LlamaForCausalLM.from_pretrained(original)
    with torch.no_grad():
        dense.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        check(model, dense, inputs=[{"input_ids": torch.arange(4)[None]}])
    assert config_of(model).fidelity is None


def test_training_mode_is_left_as_it_was(model: PreTrainedModel, original: Path):
    model.train()
    check(model, original, TEXTS)
    assert model.training


def test_compression_starts_from_no_result(original: Path):
    dense = LlamaForCausalLM.from_pretrained(original)
    model = compress(dense, SQFConfig(bits=6, structure="grid", fidelity={"metric": "kl", "value": 0.0}))
    assert config_of(model).fidelity is None
