"""Labelled data: what is read, what is refused, and what it is good for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from hf_sqf.cli.labelled import Example, Labelled
from hf_sqf.report.fidelity import compare
from tests.cli.conftest import one_sentence, saved

WORDS = ["the a", "of and is", "a is the of", "and the"]
_TEXTS = DistilBertConfig(
    vocab_size=128, dim=32, hidden_dim=64, n_layers=1, n_heads=2, initializer_range=0.3, id2label={0: "bad", 1: "good"},
    label2id={"bad": 0, "good": 1},
)  # fmt: skip
_PICTURES = ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
)


@pytest.fixture(scope="module")
def reader(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of texts with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return saved(DistilBertForSequenceClassification(_TEXTS), folder)


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of pictures."""
    folder = tmp_path_factory.mktemp("viewer")
    torch.manual_seed(0)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return saved(ResNetForImageClassification(_PICTURES), folder)


def read(labelled: Labelled, model: PreTrainedModel, where: Path, count: int | None = None) -> list[Example]:
    return labelled.examples(model, labelled.reader(model, str(where), 16), count)


def as_lines(folder: Path, entries: list[object], name: str = "data.jsonl") -> Path:
    (folder / name).write_text("\n".join(map(json.dumps, entries)) + "\n")
    return folder / name


def pictures(folder: Path, count: int) -> Path:
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number}.png")
    return as_lines(folder, [{"image": f"{number}.png", "label": number % 3} for number in range(count)])


def predicted(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[int]:
    with torch.no_grad():
        return [
            int(i) for b in batches for i in model(**{k: v for k, v in b.items() if k != "labels"}).logits.argmax(-1)
        ]


def test_accuracy_is_that_of_the_model_itself(reader: Path, typed, tmp_path: Path):
    """Classes by name or number; the original is right where labels are what it predicts."""
    model = DistilBertForSequenceClassification.from_pretrained(reader).eval()
    data = as_lines(tmp_path, [{"sentence": text, "label": 0} for text in WORDS])
    asked = Labelled(str(data), "label", "sentence")
    found = predicted(model, asked.batches(model, str(reader), None, 16))
    names = ["bad", "good"]
    entries = [
        {"sentence": t, "label": names[f] if i else f} for i, (t, f) in enumerate(zip(WORDS, found, strict=True))
    ]
    entries[3]["label"] = names[1 - found[3]]
    as_lines(tmp_path, entries)
    typed("compress", reader, "small", "--bits", 8, "--structure", "grid", "--no-trellis")
    arguments = ("evaluate", "small", "--against", reader, "--dataset", data, "--labels", "label")
    (row,) = json.loads(typed(*arguments, "--inputs", "sentence", "--json").stdout)
    assert row["agreement"] == 1.0 and row["accuracy"] == row["original_accuracy"] == 0.75
    assert row["count"] == len(WORDS) and row["name"] == "data.jsonl"
    shown = typed(*arguments, "--inputs", "sentence", "--samples", 3).stdout
    assert "original's accuracy" in shown and "3 predictions" in shown
    one_sentence(typed(*arguments, code=1), "data.jsonl has no column text; it has sentence, label")


def test_pictures_are_read_and_train(viewer: Path, typed, tmp_path: Path):
    data = pictures(tmp_path, 6)
    model = ResNetForImageClassification.from_pretrained(viewer)
    examples = read(Labelled(str(data), "label"), model, viewer, 4)
    assert [e["labels"] for e in examples] == [0, 1, 2, 0] and examples[0]["pixel_values"].shape == (3, 32, 32)
    recipe = {
        "model": str(viewer),
        "out": "results",
        "compressions": [
            {"bits": 4, "structure": "grid", "trellis": None},
            {"from": "4-bit", "train": {"steps": 40, "batch": 6, "dataset": "data.jsonl", "labels": "label",
                                        "mode": "latent", "learning_rate": 5.0e-3}},
        ],
        "evaluations": [{"dataset": "data.jsonl", "labels": "label"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    before, after = json.loads(typed("run", "mine.yaml", "--json").stdout)
    assert before["original_accuracy"] == after["original_accuracy"] and before["count"] == 6
    assert after["accuracy"] > before["accuracy"]
    assert "original's accuracy" in (tmp_path / "results" / "table.md").read_text()


def test_pictures_reach_models_of_half_precision(viewer: Path, tmp_path: Path):
    model = ResNetForImageClassification.from_pretrained(viewer, dtype=torch.bfloat16)
    batches = Labelled(str(pictures(tmp_path, 3)), "label").batches(model, str(viewer), None, 16)
    found = compare(model, model, batches)
    assert found["value"] == 0.0 and found["agreement"] == 1.0
    assert found["accuracy"] == found["original_accuracy"]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"text": "the", "label": 2}], "class 2 is none of the model's 2, by number or name (bad, good)"),
        ([{"text": "the", "label": "fine"}], "class 'fine' is none"),
        ([{"text": "the", "label": True}], "class True is none"),
        ([{"text": 3, "label": 1}], "texts must be text, got 3"),
        ([["the", 1]], "line 1: must be columns with their values"),
        ([], "holds no examples"),
    ],
    ids=["class", "name", "kind", "text", "columns", "empty"],
)
def test_what_does_not_fit_is_refused(entries: list[object], says: str, reader: Path, tmp_path: Path):
    model = DistilBertForSequenceClassification.from_pretrained(reader)
    with pytest.raises(ValueError) as error:
        read(Labelled(str(as_lines(tmp_path, entries)), "label"), model, reader)
    assert says in str(error.value)


def test_files_that_are_none(reader: Path, tmp_path: Path):
    model = DistilBertForSequenceClassification.from_pretrained(reader)
    (tmp_path / "data.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match="line 1: must be JSON"):
        read(Labelled(str(tmp_path / "data.jsonl"), "label"), model, reader)
    (tmp_path / "data.txt").write_text("the\n")
    with pytest.raises(ValueError, match="labels take a .jsonl file"):
        read(Labelled(str(tmp_path / "data.txt"), "label"), model, reader)
    with pytest.raises(FileNotFoundError, match=r"no file missing\.jsonl"):
        read(Labelled("missing.jsonl", "label"), model, reader)


def test_labels_take_a_classifier(original: Path, shrunk: Path, typed, tmp_path: Path):
    data = as_lines(tmp_path, [{"text": "the a of", "label": 0}])
    arguments = ("evaluate", shrunk, "--against", original, "--dataset", data)
    one_sentence(typed(*arguments, "--labels", "label", code=1), "does not predict one for each input")
    assert "which is missing" in " ".join(typed(*arguments, "--inputs", "text", code=2).stderr.split())
    assert "which is missing" in " ".join(typed(*arguments[:4], "--labels", "label", code=2).stderr.split())


def test_data_sets_of_the_hub_are_read_in_the_split_that_is_named(reader: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, *, split: str, streaming: bool) -> object:
        asked.append((name, split, streaming))
        return datasets.Dataset.from_dict({"sentence": WORDS, "label": [0, 1, 0, 1]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    model = DistilBertForSequenceClassification.from_pretrained(reader)
    found = read(Labelled("owner/data", "label", "sentence", "validation"), model, reader, 3)
    assert [e["labels"] for e in found] == [0, 1, 0] and asked == [("owner/data", "validation", True)]


def test_the_tokenizer_is_loaded_once(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = as_lines(tmp_path, [{"text": text, "label": 0} for text in WORDS])
    model, loaded = DistilBertForSequenceClassification.from_pretrained(reader), []
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    Labelled(str(data), "label").batches(model, str(reader), None, 16)
    assert len(loaded) == 1


def test_the_command_takes_data_sets_of_the_hub_and_their_split(reader: Path, typed, monkeypatch: pytest.MonkeyPatch):
    """With labels and without, in the split that is named, and in validation where none is."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, *, split: str, streaming: bool) -> object:
        asked.append(split)
        return datasets.Dataset.from_dict({"text": WORDS, "label": [0, 1, 0, 1]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    typed("compress", reader, "small", "--bits", 8, "--structure", "grid", "--no-trellis")
    arguments = ("evaluate", "small", "--against", reader, "--dataset", "owner/data", "--json", "--samples", 3)
    (row,) = json.loads(typed(*arguments, "--labels", "label", "--split", "test").stdout)
    assert row["count"] == 3 and row["name"] == "owner/data" and 0 <= row["accuracy"] <= 1
    (row,) = json.loads(typed(*arguments).stdout)
    assert row["count"] == 3 and "accuracy" not in row and asked == ["test", "validation"]
    assert "--split is of --dataset, which is missing" in " ".join(
        typed("evaluate", "small", "--against", reader, "--split", "test", code=2).stderr.replace("│", " ").split()
    )
