"""The card says what is true of the folder it lies in, and respects the hand of others."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import PreTrainedModel

from hf_sqf.hub import card as card_module
from hf_sqf.hub import check, write_card
from hf_sqf.hub.card import MARKER, auto_class, make_card
from hf_sqf.hub.checking import config_of
from hf_sqf.runtime.sqf_size import size_report

BASE = ModelCard(
    "---\nlanguage: [en, de]\nlicense: apache-2.0\nlibrary_name: gguf\npipeline_tag: text-generation\n"
    "datasets: [some/texts]\ntags: [small, tiny]\n---\n# Base\n"
)


@pytest.fixture
def told(model: PreTrainedModel, original: Path, tmp_path: Path) -> Path:
    """A folder whose model has a base on the Hub and has been compared with it."""
    config_of(model).base_model = "org/tiny-llama"
    check(model, original, ["the a of and is"], name="one sentence (test)", context=16)
    model.save_pretrained(tmp_path / "told")
    return tmp_path / "told"


def test_saving_writes_one(small: Path):
    card = ModelCard.load(small / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["sqf"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None and card.data.get("base_model_relation") is None
    assert "Not measured" in card.text


def test_metadata(told: Path):
    card = make_card(told, "me/tiny-sqf", BASE)
    data = card.data
    assert data.library_name == "transformers"
    assert (data.base_model, data.get("base_model_relation")) == ("org/tiny-llama", "quantized")
    assert data.language == ["en", "de"] and data.license == "apache-2.0" and data.datasets == ["some/texts"]
    assert data.tags == ["sqf", "small", "tiny"]
    assert data.model_name == "tiny-sqf"
    fidelity = json.loads((told / "config.json").read_text())["quantization_config"]["fidelity"]
    results = {result.metric_type: result for result in data.eval_results}
    assert results.keys() == {"kl", "agreement", "perplexity"}
    assert results["kl"].metric_value == fidelity["value"]
    assert results["kl"].dataset_name == "one sentence (test)"
    # What the Hub reads is the text.
    name, read = model_index_to_eval_results(ModelCard(str(card)).data.to_dict()["model-index"])
    assert name == "tiny-sqf" and len(read) == 3


def test_sizes_bits_and_coverage_are_those_of_the_files(told: Path):
    text = make_card(told).text
    config = json.loads((told / "config.json").read_text())["quantization_config"]
    coverage = config["coverage"]
    report = size_report(told)
    assert f"**{report.total_bytes / 1e6:,.2f} MB**" in text
    assert f"{coverage['parameters'] * 4 / 1e6:,.2f} MB (float32)" in text
    assert f"{100 * coverage['compressed'] / coverage['parameters']:.2f} % of {coverage['parameters']:,}" in text
    assert f"**{report.bits_per_weight:.3f}**, everything counted" in text


def test_how_it_was_made_is_exact(told: Path):
    text = make_card(told).text
    shown = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    saved = json.loads((told / "config.json").read_text())["quantization_config"]
    assert shown == {k: v for k, v in saved.items() if k not in ("coverage", "fidelity", "base_model")}
    assert shown["bits"] == 6 and shown["structure"] == "grid" and shown["seed"] == 0
    assert re.search(r"hf-sqf \d\S*, transformers \d\S*, torch \d", text)


def test_fidelity_comes_with_what_it_was_measured_on(told: Path):
    text = make_card(told).text
    fidelity = json.loads((told / "config.json").read_text())["quantization_config"]["fidelity"]
    assert f"{fidelity['value']:.4g} nats" in text
    assert f"{fidelity['perplexity']:.4g} ({fidelity['original_perplexity']:.4g})" in text
    assert "Measured in float32 on one sentence (test): 5 predictions, up to 16 tokens of context." in text


def test_three_ways_to_load(told: Path):
    text = make_card(told, "me/tiny-sqf").text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")
        assert 'AutoModelForCausalLM.from_pretrained("me/tiny-sqf"' in block
    assert ["import hf_sqf" in b for b in blocks] == [True, False, False]
    assert ["trust_remote_code=True, revision=" in b for b in blocks] == [False, False, True]
    assert "## Limits" in text


def test_a_card_that_stands_there_stays(model: PreTrainedModel, tmp_path: Path):
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert write_card(tmp_path) is None


def test_our_own_card_is_renewed_until_someone_takes_it_over(small: Path, model: PreTrainedModel, original: Path):
    check(model, original, ["the a of and is"])
    model.save_pretrained(small)
    renewed = (small / "README.md").read_text()
    assert "Not measured" not in renewed and MARKER in renewed
    (small / "README.md").write_text(renewed.replace(MARKER, "Mine now."))
    model.save_pretrained(small)
    assert "Mine now." in (small / "README.md").read_text()


def test_another_process_of_the_same_run_writes_none(model: PreTrainedModel, tmp_path: Path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_what_was_left_out_is_listed(small: Path):
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["coverage"]["dense"] = {f"part{i}.weight": "too small" for i in range(11)}
    (small / "config.json").write_text(json.dumps(config))
    text = make_card(small).text
    assert "Not compressed: `part0.weight` (too small)." in text
    assert "Not compressed: 3 more weights." in text


def test_a_local_folder_is_no_base_model(small: Path, original: Path):
    text = (small / "README.md").read_text() + (small / "config.json").read_text()
    assert str(original) not in text and original.name not in text


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ResNetForImageClassification", "AutoModelForImageClassification"),
        ("OddForPurposesUnknown", "AutoModel"),
    ],
)
def test_auto_classes(architecture: str, expected: str):
    assert auto_class(architecture) == expected


def test_the_base_models_card_comes_from_the_cache(told: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def cached(name: str, local_files_only: bool = False) -> ModelCard:
        asked.append((name, local_files_only))
        return BASE

    monkeypatch.setattr(card_module, "base_card_of", cached)
    assert make_card(told).data.license == "apache-2.0"
    assert asked == [("org/tiny-llama", True)]
