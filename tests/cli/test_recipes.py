"""hf-sqf run: recipes, the ones in recipes/ too, on the tiny model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.cli.conftest import ROOT, one_sentence, saved
from tests.conftest import ARCHITECTURES

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


_SIZES = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_SIZES |= {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 16}
_WHISPER = WhisperConfig(
    vocab_size=128, max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    **_SIZES,
)  # fmt: skip
_CLASSIFIER = DistilBertConfig(vocab_size=128, dim=32, hidden_dim=64, n_layers=2, n_heads=2, initializer_range=0.1)
TINY = {
    "whisper": lambda: WhisperForConditionalGeneration(_WHISPER),
    "classifier": lambda: DistilBertForSequenceClassification(_CLASSIFIER),
    **ARCHITECTURES,
}
# recipe -> the tiny model that stands in, and its model on the Hub
MODELS = {
    "image_classification": ("resnet", "microsoft/resnet-50"),
    "language_model": (None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "mixture_of_experts": ("qwen2_moe", "Qwen/Qwen1.5-MoE-A2.7B"),
    "sentence_embeddings": ("bert", "sentence-transformers/all-MiniLM-L6-v2"),
    "speech": ("whisper", "openai/whisper-tiny"),
    "text_classification": ("classifier", "distilbert/distilbert-base-uncased-finetuned-sst-2-english"),
}


def stand_in(kind: str | None, original: Path, folder: Path) -> Path:
    """Save a tiny random model, with the tokenizer of the tiny language model where it reads tokens."""
    if kind is None:
        return original
    torch.manual_seed(0)
    model = TINY[kind]()
    if model.main_input_name == "input_ids":
        AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return saved(model, folder)


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_run(recipe: Path, original: Path, typed, tmp_path: Path):
    """Each as it stands, but for the model, fewer steps of training, and labelled data of our own."""
    said = yaml.safe_load(recipe.read_text())
    words = [{"sentence": "the a of and"[: 3 + i % 9], "label": i % 2} for i in range(16)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, words)))
    said["evaluations"] = said.get("evaluations", [{}])
    for entry in said["evaluations"]:
        if "labels" in entry:
            entry["dataset"] = "labelled.jsonl"
    for entry in said["compressions"]:
        if "train" in entry:
            entry["train"] = {**entry["train"], "steps": 2, "batch": 2}
            if "labels" in entry["train"]:
                entry["train"]["dataset"] = "labelled.jsonl"
    (tmp_path / "shipped.yaml").write_text(yaml.safe_dump(said))
    model = stand_in(MODELS[recipe.stem][0], original, tmp_path / "model")
    arguments = ("run", "shipped.yaml", "--set", f"model={model}", "--set", "out=results")
    rows = json.loads(typed(*arguments, "--json").stdout)
    plain = [f"{entry['bits']}-bit" for entry in said["compressions"] if "bits" in entry]
    trained = [f"{entry['from']}-trained" for entry in said["compressions"] if "from" in entry]
    assert [row["model"] for row in rows] == (plain + trained) * len(said["evaluations"])
    for row, entry in zip(rows[:: len(plain + trained)], said["evaluations"], strict=True):
        assert ("accuracy" in row) == ("labels" in entry)
    values = [row["value"] for row in rows[: len(plain)]]
    nearest, *_, furthest = values if rows[0]["metric"] == "kl" else values[::-1]
    assert nearest < furthest  # the most bits, and the least
    out = tmp_path / "results"
    kept = json.loads((out / "table.json").read_text())
    assert kept["rows"] == rows and kept["recipe"]["model"] == str(model) and "torch" in kept["made"]
    table = (out / "table.md").read_text()
    assert table.count("\n| ") == len(rows) + 2 and kept["made"] in table
    cards = sorted(path.stem for path in (out / "cards").iterdir())
    assert cards == sorted(plain + trained)
    assert all("Not measured" not in card.read_text() for card in (out / "cards").iterdir())


def test_shipped_recipes_name_models_of_the_hub():
    assert {path.stem: yaml.safe_load(path.read_text())["model"] for path in SHIPPED} == {
        name: model for name, (_, model) in MODELS.items()
    }


def small_recipe(folder: Path, original: Path, **changes: object) -> None:
    recipe = {
        "model": str(original),
        "out": "results",
        "dataset": "texts.txt",
        "compressions": [
            {"bits": 4, "structure": "grid", "trellis": None, "samples": 4, "context": 8},
            {"from": "4-bit", "train": {"steps": 30, "context": 16, "batch": 4, "learning_rate": 0.002}},
        ],
        "evaluations": [{"dataset": "texts.txt", "context": 16}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe | changes))


def written(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("results/*/model.safetensors")}


def test_training_brings_a_model_closer_and_an_interrupted_run_goes_on(
    original: Path, texts: Path, typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(original, initializer_range=0.3)  # predictions that say something
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "sure")
    small_recipe(tmp_path, saved(AutoModelForCausalLM.from_config(config), tmp_path / "sure"))
    with monkeypatch.context() as context:
        context.setattr("hf_sqf.cli.recipe.tune", lambda *_: (_ for _ in ()).throw(OSError("no room on the disk")))
        one_sentence(typed("run", "mine.yaml", code=1), "no room on the disk")
    first = written(tmp_path)
    assert first.keys() == {"4-bit"}
    rows = json.loads(typed("run", "mine.yaml", "--json").stdout)
    assert written(tmp_path)["4-bit"] == first["4-bit"]  # not made again
    plain, trained = rows
    assert trained["model"] == "4-bit-trained" and trained["value"] < plain["value"]
    before = written(tmp_path)
    with monkeypatch.context() as context:  # all is there: nothing is measured, either
        context.setattr("hf_sqf.cli.recipe.evaluate", lambda *_, **__: pytest.fail("measured again"))
        assert json.loads(typed("run", "mine.yaml", "--json").stdout) == rows
    assert written(tmp_path) == before
    typed("run", "mine.yaml", "--force")
    assert all(written(tmp_path)[name] > before[name] for name in before)


def test_what_was_made_of_other_settings_is_refused(original: Path, texts: Path, typed, tmp_path: Path):
    small_recipe(tmp_path, original)
    typed("run", "mine.yaml")
    before = written(tmp_path)
    small_recipe(tmp_path, original, evaluations=[{"context": 16}])  # measured anew, not made anew
    (row, _) = json.loads(typed("run", "mine.yaml", "--json").stdout)
    assert row["name"].startswith("pydoc_data.topics") and written(tmp_path) == before
    with texts.open("a") as file:
        file.write("of of of of and and and\n")
    one_sentence(typed("run", "mine.yaml", code=1), "4-bit is not empty; --force replaces it")
    assert written(tmp_path) == before


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


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"labels": "label", "dataset": "labelled.jsonl"}, "labelled.jsonl has no column label; it has text, class"),
        ({"dataset": "missing.txt"}, "there is no file missing.txt"),
    ],
    ids=["no column", "no file"],
)
def test_data_that_does_not_fit(train: dict[str, object], says: str, original: Path, typed, tmp_path: Path):
    (tmp_path / "labelled.jsonl").write_text('{"text": "the a", "class": 1}\n')
    tiny = {"bits": 4, "structure": "grid", "trellis": None}
    small_recipe(tmp_path, original, dataset=None, compressions=[tiny, {"from": "4-bit", "train": train}])
    one_sentence(typed("run", "mine.yaml", code=1), says)
    assert not (tmp_path / "results" / "4-bit-trained").exists()


def test_training_on_texts_takes_a_tokenizer(typed, tmp_path: Path):
    model = saved(TINY["llama"](), tmp_path / "bare")
    tiny = {"bits": 4, "structure": "grid", "trellis": None}
    small_recipe(tmp_path, model, dataset=None, compressions=[tiny, {"from": "4-bit", "train": {"steps": 1}}])
    one_sentence(typed("run", "mine.yaml", code=1), f"no tokenizer comes with {model}")


GOOD = {"model": "m", "out": "results", "compressions": [{"bits": 4}]}
BAD = [
    (GOOD | {"modle": "x"}, "unknown key modle"),
    (GOOD | {"compressions": [{"bit": 4}]}, "compressions of a recipe: unknown key bit"),
    (GOOD | {"evaluations": [{"contxt": 4}]}, "evaluations of a recipe: unknown key contxt"),
    (GOOD | {"evaluations": [{"labels": "label"}]}, "labels are those of a dataset, which is missing"),
    (GOOD | {"evaluations": [{"dataset": "a.txt", "inputs": "text"}]}, "inputs go with labels"),
    ({"out": "results"}, "lacks model, compressions"),
    (GOOD | {"compressions": []}, "compressions must be a list"),
    (GOOD | {"compressions": [{"bits": 4}, {"bits": 4, "structure": "grid"}]}, "need different names"),
    (GOOD | {"compressions": [{"name": "../x"}]}, "cannot be the name"),
    (GOOD | {"compressions": [{"bits": 99}]}, "bits must be a number in (0, 16]"),
    (GOOD | {"model": 3}, "model must be text"),
    (GOOD | {"dataset": "missing.txt"}, "no file missing.txt"),
    (GOOD | {"compressions": [{"from": "4-bit", "train": {}}]}, "from must name a compression above, got '4-bit'"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit"}]}, "from and train go together"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": {}, "bits": 3}]}, "with nothing else but a name"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": 3}]}, "train must be options"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": {"step": 3}}]}, "unknown key step"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": {"steps": 0}}]}, "steps must be a whole number"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": {"mode": "x"}}]}, "mode must be one of light"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": {"learning_rate": "2e-3"}}]}, "such as 2.0e-3"),
    (GOOD | {"compressions": [{"bits": 4}, {"from": "4-bit", "train": {"labels": "label"}}]}, "labels are those of"),
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


def test_the_list_of_recipes_is_whole():
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in SHIPPED} == {
        line.split("`")[1] for line in listed.splitlines() if line.startswith("| `") and ".yaml`" in line.split("|")[1]
    }
