"""Speech with what is said: word errors in evaluate and in recipes, and what is refused."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_sqf.cli.labelled import Labelled
from hf_sqf.cli.speech import word_error_rate, word_errors
from tests.cli.conftest import one_sentence, saved

RATE = 16_000
SAID = ["the a of", "Of, and is!", "a"]
_CONFIG = WhisperConfig(
    vocab_size=16, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=50,
    max_target_positions=16, decoder_start_token_id=7, pad_token_id=0, bos_token_id=7, eos_token_id=0,
    suppress_tokens=None, begin_suppress_tokens=None, init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def listener(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper with the tiny model's tokenizer, of one second of sound."""
    folder = tmp_path_factory.mktemp("listener")
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return saved(WhisperForConditionalGeneration(_CONFIG), folder)


def recordings(folder: Path, rate: int = RATE, width: int = 2, channels: int = 1, said: list[str] = SAID) -> Path:
    draw = np.random.default_rng(0)
    for number in range(len(said)):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((channels, width, rate, 0, "NONE", ""))
            file.writeframes(draw.integers(0, 256, rate // 2 * width * channels, np.uint8).tobytes())
    lines = [json.dumps({"audio": f"{number}.wav", "text": text}) for number, text in enumerate(said)]
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "clips.jsonl"


@pytest.mark.parametrize(
    ("written", "said", "errors"),
    [
        ("the cat sat", "the cat sat", 0),
        ("the bat sat", "the cat sat", 1),  # one replaced
        ("the cat", "the cat sat", 1),  # one left out
        ("well the cat sat", "the cat sat", 1),  # one inserted
        ("cat the sat", "the cat sat", 2),
        ("", "the cat sat", 3),
        ("the cat sat", "", 3),
    ],
)
def test_word_errors(written: str, said: str, errors: int):
    assert word_errors(written.split(), said.split()) == errors


def test_the_rate_is_over_all_words_and_heeds_neither_case_nor_punctuation(listener: Path, tmp_path: Path):
    """A model that always writes "a of and": 3 of 3 words wrong, none, and 2 inserted beside the one that is right."""
    model = WhisperForConditionalGeneration.from_pretrained(listener)
    tokenizer = AutoTokenizer.from_pretrained(listener)
    said = ["the and the", "a of and", "of"]
    batches = Labelled(str(recordings(tmp_path, said=said)), "text").batches(model, str(listener), None, 16)
    model.generate = lambda *_, **__: tokenizer("a of and", return_tensors="pt")["input_ids"]
    assert word_error_rate(model, batches, str(listener)) == pytest.approx((3 + 0 + 2) / 7)
    model.generate = lambda *_, **__: torch.zeros(1, 0, dtype=torch.long)
    assert word_error_rate(model, batches, str(listener)) == 1.0


def test_evaluate_tells_word_errors_beside_the_original(listener: Path, typed, tmp_path: Path):
    data = recordings(tmp_path)
    typed("compress", listener, "small", "--bits", 12, "--structure", "grid", "--no-trellis")
    arguments = ("evaluate", "small", "--against", listener, "--dataset", data, "--labels", "text")
    (row,) = json.loads(typed(*arguments, "--json").stdout)
    original = WhisperForConditionalGeneration.from_pretrained(listener)
    batches = Labelled(str(data), "text").batches(original, str(listener), None, 16)
    assert row["original_word_error_rate"] == word_error_rate(original, batches, str(listener)) > 0
    assert row["word_error_rate"] == pytest.approx(row["original_word_error_rate"], abs=0.5)
    assert row["count"] == sum(batch["labels"].numel() for batch in batches) and row["value"] < 0.01
    shown = typed(*arguments, "--samples", 2, "--record").stdout
    assert shown.count("errors") == 2 and "%" in shown
    assert "word error rate" in (tmp_path / "small" / "README.md").read_text()


def test_training_on_speech(listener: Path, typed, tmp_path: Path):
    """Held to what is said, predictions of it become likelier."""
    recordings(tmp_path)
    recipe = {
        "model": str(listener),
        "out": "results",
        "compressions": [
            {"bits": 4, "structure": "grid", "trellis": None},
            {"from": "4-bit", "train": {"steps": 30, "batch": 3, "dataset": "clips.jsonl", "labels": "text",
                                        "learning_rate": 1.0e-2}},
        ],
        "evaluations": [{"dataset": "clips.jsonl", "labels": "text"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    before, after = json.loads(typed("run", "mine.yaml", "--json").stdout)
    assert before["original_word_error_rate"] == after["original_word_error_rate"]

    def loss(name: str) -> float:
        model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "results" / name)
        batches = Labelled(str(tmp_path / "clips.jsonl"), "text").batches(model, str(listener), None, 16)
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches)

    assert loss("4-bit-trained") < loss("4-bit")


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 2), (4, 1)])
def test_sounds_of_all_widths_are_within_bounds(width: int, channels: int, listener: Path, tmp_path: Path):
    model = WhisperForConditionalGeneration.from_pretrained(listener)
    recordings(tmp_path, width=width, channels=channels)
    reader = Labelled(str(tmp_path / "clips.jsonl"), "text").reader(model, str(listener), 16)
    features = reader.encode("0.wav")["input_features"]
    assert features.shape == (8, 100) and torch.isfinite(features).all()


def test_what_does_not_fit_is_refused(listener: Path, tmp_path: Path):
    model = WhisperForConditionalGeneration.from_pretrained(listener)
    reader = Labelled(str(recordings(tmp_path, rate=8_000)), "text").reader(model, str(listener), 16)
    with pytest.raises(ValueError, match="has 8000 samples a second, and the model takes 16000"):
        reader.encode("0.wav")
    with pytest.raises(ValueError, match="what is said must be text, got 3"):
        reader.label(3)
    with pytest.raises(ValueError, match=r"read from \.wav files of PCM"):
        reader.encode("clips.jsonl")
    with pytest.raises(ValueError, match="must be paths"):
        reader.encode(3)
    sound = {"array": [0.0] * 8000, "sampling_rate": RATE}  # as datasets decodes it
    assert reader.encode(sound)["input_features"].shape == (8, 100)


def test_speech_takes_a_tokenizer(listener: Path, typed, tmp_path: Path):
    bare = saved(WhisperForConditionalGeneration(_CONFIG), tmp_path / "bare")
    typed("compress", bare, "small", "--bits", 8, "--structure", "grid", "--no-trellis")
    arguments = ("evaluate", "small", "--against", bare, "--dataset", recordings(tmp_path), "--labels", "text")
    one_sentence(typed(*arguments, code=1), "labels of speech take a tokenizer")
