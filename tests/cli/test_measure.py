"""hf-sqf evaluate and compare: the figures of the fidelity check, in a table, as JSON, in the card, as a picture."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sqf.hub import check
from tests.cli.conftest import one_sentence, saved
from tests.conftest import build


@pytest.fixture(scope="session")
def coarse(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at three bits."""
    from hf_sqf import SQFConfig

    out = tmp_path_factory.mktemp("coarse") / "coarse"
    asked = SQFConfig(bits=3, structure="grid", trellis=None)
    return saved(AutoModelForCausalLM.from_pretrained(original, quantization_config=asked), out)


def test_figures_are_those_of_the_check(shrunk: Path, original: Path, texts: Path, typed):
    (row,) = json.loads(typed("evaluate", shrunk, "--against", original, "--dataset", texts, "--json").stdout)
    found = check(
        AutoModelForCausalLM.from_pretrained(shrunk),
        original=AutoModelForCausalLM.from_pretrained(original),
        texts=texts.read_text().splitlines(),
        tokenizer=AutoTokenizer.from_pretrained(original),
        name="texts.txt",
    )
    assert {name: row[name] for name in found} == found
    assert row["metric"] == "kl" and 0 < row["value"] < 0.1 and row["perplexity"] > 1 and 0 < row["agreement"] <= 1
    assert row["bytes"] == (shrunk / "model.safetensors").stat().st_size


def test_samples_and_context(shrunk: Path, original: Path, texts: Path, typed):
    arguments = ("evaluate", shrunk, "--against", original, "--json")
    (row,) = json.loads(typed(*arguments, "--dataset", texts, "--samples", 2, "--context", 5).stdout)
    assert (row["count"], row["context"]) == (10, 5)
    assert "--dataset, which is missing" in " ".join(typed(*arguments, "--samples", 2, code=2).stderr.split())


def test_an_encoder_gives_a_cosine_and_models_without_tokenizer_take_random_inputs(typed, tmp_path: Path):
    saved(build("bert"), tmp_path / "bert")
    typed("compress", "bert", "small", "--structure", "grid", "--no-trellis")
    shown = typed("evaluate", "small", "--against", "bert").stdout
    assert "cosine" in shown and "random inputs" in shown and "perplexity" not in shown


def test_record_writes_config_and_card(shrunk: Path, original: Path, texts: Path, typed, tmp_path: Path):
    shutil.copytree(shrunk, tmp_path / "small")
    typed("evaluate", "small", "--against", original, "--dataset", texts, "--record")
    fidelity = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["fidelity"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert fidelity["name"] == "texts.txt" and "on texts.txt" in card and "Not measured" not in card
    assert json.loads(typed("inspect", "small", "--json").stdout)["fidelity"] == fidelity
    typed("verify", "small")
    one_sentence(typed("evaluate", "a/b", "--against", original, "--record", code=1), "a/b is none")


def test_compare_shows_a_line_a_model(shrunk: Path, coarse: Path, original: Path, texts: Path, typed, tmp_path: Path):
    arguments = ("compare", shrunk, coarse, "--against", original, "--dataset", texts)
    for picture in ("sizes.png", "sizes.svg") if importlib.util.find_spec("matplotlib") else ():
        typed(*arguments, "--plot", picture)
        head = (tmp_path / picture).read_bytes()[:400]
        assert head.startswith(b"\x89PNG") if picture.endswith("png") else b"<svg" in head
    fine, rough = json.loads(typed(*arguments, "--json").stdout)
    assert fine["value"] < rough["value"] and fine["bytes"] > rough["bytes"]
    shown = typed(*arguments).stdout
    assert "KL (nats)" in shown and "top-1 agreement" in shown and f"{rough['value']:.4g}" in shown


def test_pictures_that_cannot_be_drawn_are_refused_before_any_work(typed, monkeypatch: pytest.MonkeyPatch):
    one_sentence(typed("compare", "a", "b", "--against", "c", "--plot", "x.pdf", code=1), ".png or .svg")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    one_sentence(typed("compare", "a", "b", "--against", "c", "--plot", "x.svg", code=1), "pip install 'hf-sqf[plot]'")


def test_the_original_must_be_one(shrunk: Path, original: Path, typed):
    one_sentence(typed("evaluate", shrunk, "--against", shrunk, code=1), "is quantized already")
    one_sentence(typed("evaluate", original, "--against", original, code=1), "does not hold a model compressed")
    one_sentence(typed("evaluate", shrunk, "--against", original, "--dataset", "x.txt", code=1), "no file x.txt")
