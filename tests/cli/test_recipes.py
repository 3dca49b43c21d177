"""hf-sqf run: recipes, the ones in recipes/ too, on the tiny model."""

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import ROOT, one_sentence

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_run(recipe: Path, original: Path, typed, tmp_path: Path):
    arguments = ("run", recipe, "--set", f"model={original}", "--set", "out=results")
    rows = json.loads(typed(*arguments, "--json").stdout)
    said = yaml.safe_load(recipe.read_text())
    assert [row["model"] for row in rows] == [f"{entry['bits']}-bit" for entry in said["compressions"]]
    values = [row["value"] for row in rows]
    assert values == sorted(values)  # less bits, more divergence
    out = tmp_path / "results"
    kept = json.loads((out / "table.json").read_text())
    assert kept["rows"] == rows and kept["recipe"]["model"] == str(original) and "torch" in kept["made"]
    table = (out / "table.md").read_text()
    assert table.count("\n| ") == len(rows) + 2 and kept["made"] in table
    cards = sorted(path.stem for path in (out / "cards").iterdir())
    assert cards == sorted(row["model"] for row in rows)
    assert all("Not measured" not in card.read_text() for card in (out / "cards").iterdir())
    one_sentence(typed(*arguments, code=1), "is not empty; --force replaces it")


def test_shipped_recipes_name_models_of_the_hub():
    models = {path.stem: yaml.safe_load(path.read_text())["model"] for path in SHIPPED}
    assert models == {
        "language_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "sentence_embeddings": "sentence-transformers/all-MiniLM-L6-v2",
    }


def test_names_and_several_evaluations(original: Path, texts: Path, typed, tmp_path: Path):
    recipe = {
        "model": str(original),
        "out": "results",
        "compressions": [{"name": "tiny", "target_size": "60kB", "structure": "grid", "trellis": None}],
        "evaluations": [{"dataset": "texts.txt", "samples": 3}, {"context": 16}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    shown = typed("run", "mine.yaml").stdout
    assert shown.count("tiny") == 2 and "texts.txt" in shown and "table.md" in shown
    fidelity = json.loads((tmp_path / "results" / "tiny" / "config.json").read_text())["quantization_config"][
        "fidelity"
    ]
    assert fidelity["name"] == "texts.txt"
    typed("run", "mine.yaml", "--force")


GOOD = {"model": "m", "out": "results", "compressions": [{"bits": 4}]}
BAD = [
    (GOOD | {"modle": "x"}, "unknown key modle"),
    (GOOD | {"compressions": [{"bit": 4}]}, "compressions of a recipe: unknown key bit"),
    (GOOD | {"evaluations": [{"contxt": 4}]}, "evaluations of a recipe: unknown key contxt"),
    ({"out": "results"}, "lacks model, compressions"),
    (GOOD | {"compressions": []}, "compressions must be a list"),
    (GOOD | {"compressions": [{"bits": 4}, {"bits": 4, "structure": "grid"}]}, "need different names"),
    (GOOD | {"compressions": [{"name": "../x"}]}, "cannot be the name"),
    (GOOD | {"compressions": [{"bits": 99}]}, "bits must be a number in (0, 16]"),
    (GOOD | {"model": 3}, "model must be text"),
    (GOOD | {"dataset": "missing.txt"}, "no file missing.txt"),
    (["model"], "must hold keys and values"),
]


@pytest.mark.parametrize(("recipe", "says"), BAD, ids=[says for _, says in BAD])
def test_what_does_not_fit_is_refused_by_name(recipe: object, says: str, typed, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    one_sentence(typed("run", "mine.yaml", code=1), says)
    assert not (tmp_path / "results").exists()


def test_what_is_no_yaml_and_odd_settings(typed, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("model: [")
    one_sentence(typed("run", "mine.yaml", code=1), "is no YAML")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(GOOD))
    one_sentence(typed("run", "mine.yaml", "--set", "color=red", code=1), "unknown key color")
    assert "KEY=VALUE" in typed("run", "mine.yaml", "--set", "model", code=2).stderr
