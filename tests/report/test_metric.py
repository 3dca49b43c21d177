"""hf_sqf.report.metric: the figures of the fidelity check, from outputs, as a metric of evaluate."""

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_sqf
from hf_sqf import SQFConfig
from hf_sqf.report.fidelity import compare
from tests.conftest import build

evaluate = pytest.importorskip("evaluate")
metric = pytest.importorskip("hf_sqf.report.metric")


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    compressed = hf_sqf.compress(build(name), SQFConfig(bits=3, structure="grid", trellis=None))
    return compressed, build(name)


def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (5, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_a_language_model_has_the_figures_of_the_check():
    small, original = pair("llama")
    batch = padded()
    expected = compare(small, original, [batch])
    tokens = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    measured = metric.Fidelity()
    for some in (slice(0, 2), slice(2, 5)):
        part = {name: value[some] for name, value in batch.items()}
        measured.add_batch(predictions=small(**part).logits, references=original(**part).logits, tokens=tokens[some])
    found = measured.compute()
    assert found["kl"] == pytest.approx(expected["value"], abs=2e-6) and found["kl"] > 0
    assert found["worst_kl"] == pytest.approx(expected["worst"], abs=2e-6)
    assert (found["agreement"], found["count"]) == (expected["agreement"], expected["count"])
    ratio = expected["perplexity"] / expected["original_perplexity"]
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)


@torch.no_grad()
def test_an_encoder_has_the_cosine_of_the_check():
    small, original = pair("bert")
    ids = padded()["input_ids"]
    expected = compare(small, original, [{"input_ids": ids}])
    own, theirs = (model(input_ids=ids).last_hidden_state.mean(1) for model in (small, original))
    found = metric.Fidelity("embeddings").compute(predictions=own, references=theirs.tolist())
    assert found["cosine"] == pytest.approx(expected["value"], abs=2e-6)
    assert found["lowest_cosine"] == pytest.approx(expected["worst"], abs=2e-6) and found["count"] == 5


def test_two_classes_by_hand():
    """KL((1/2, 1/2) || (3/4, 1/4)) = log(2) - log(3) / 2."""
    found = metric.Fidelity().compute(predictions=[[math.log(3.0), 0.0]], references=[[0.0, 0.0]])
    assert found == {
        "kl": pytest.approx(math.log(2) - math.log(3) / 2, abs=1e-6),
        "worst_kl": pytest.approx(math.log(2) - math.log(3) / 2, abs=1e-6),
        "agreement": 1.0,
        "count": 1,
    }


def test_it_is_a_metric_of_evaluate_among_others():
    measured = metric.Fidelity()
    assert isinstance(measured, evaluate.Metric) and measured.name
    together = evaluate.combine([metric.Fidelity(), metric.Fidelity()], force_prefix=True)
    logits = [[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]
    found = together.compute(predictions=logits, references=logits)
    assert len(found) == 8 and {value for key, value in found.items() if key.endswith("worst_kl")} == {0.0}


def test_computing_begins_anew():
    measured = metric.Fidelity("embeddings")
    measured.add(prediction=[1.0, 0.0], reference=[0.0, 1.0])
    measured.add(prediction=[1.0, 0.0], reference=[1.0, 0.0])
    assert measured.compute() == {"cosine": 0.5, "lowest_cosine": 0.0, "count": 2}
    with pytest.raises(ValueError, match="no inputs"):
        measured.compute()


LOGITS = [[1.0, 2.0]]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("logits", {"predictions": LOGITS, "references": [[1.0, 2.0, 3.0]]}, r"\(1, 2\) and \(1, 3\)"),
    ("logits", {"predictions": [1.0], "references": [1.0]}, "two dimensions or more"),
    ("logits", {"predictions": LOGITS, "references": None}, "references are missing"),
    ("logits", {"predictions": LOGITS, "references": LOGITS, "tokens": [[1, 2]]}, r"tokens must be of shape \(1,\)"),
    ("logits", {"predictions": LOGITS, "references": LOGITS, "weights": 1}, "got weights"),
    ("logits", {"predictions": [[math.nan, 0.0]], "references": LOGITS}, "not finite"),
    ("embeddings", {"predictions": LOGITS, "references": LOGITS, "tokens": [1]}, "come without tokens"),
]


@pytest.mark.parametrize(("kind", "given", "says"), BAD, ids=[says for *_, says in BAD])
def test_what_does_not_fit_is_refused(kind: str, given: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        metric.Fidelity(kind).compute(**given)


def test_odd_options_are_refused():
    with pytest.raises(ValueError, match="kind must be logits or embeddings"):
        metric.Fidelity("pixels")
    with pytest.raises(ValueError, match="num_process=2"):
        metric.Fidelity(num_process=2)
