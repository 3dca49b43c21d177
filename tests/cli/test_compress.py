"""hf-sqf compress: what is written, what is refused before any work, and that nothing is left half-written."""

import importlib.util
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_sqf.cli.folders import whole_folder
from hf_sqf.hub import verify
from tests.cli.conftest import ROOT, command_line, one_sentence, saved
from tests.conftest import build

QUICK = ("--structure", "grid", "--no-trellis")


def test_all_that_belongs_to_the_model_is_there(shrunk: Path, original: Path):
    assert verify(shrunk) == []
    config = AutoConfig.from_pretrained(shrunk)
    assert (config.quantization_config["structure"], config.quantization_config["trellis"]) == ("grid", 64)
    assert config.quantization_config["coverage"]["bits"] == pytest.approx(6, abs=0.05)
    assert type(AutoModelForCausalLM.from_pretrained(shrunk)).__name__.endswith("LlamaForCausalLM")
    assert AutoTokenizer.from_pretrained(shrunk).get_vocab() == AutoTokenizer.from_pretrained(original).get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (shrunk / name).read_bytes() == (original / name).read_bytes()
    card = (shrunk / "README.md").read_text()
    assert 'from_pretrained("small")' in card and "part" not in card.split("## Use")[1].split("##")[0]
    assert [path.name for path in shrunk.parent.iterdir()] == ["small"]


def test_a_sentence_encoder_stays_one(minilm: Path, typed, tmp_path: Path):
    """Modules beside the transformer, licence and language of the original's card come along."""
    typed("compress", minilm, "small", "--bits", 5, *QUICK, "--no-include-embeddings")
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (minilm / name).read_bytes()
    assert "license: apache-2.0" in (tmp_path / "small" / "README.md").read_text()
    dense = AutoConfig.from_pretrained(tmp_path / "small").quantization_config["coverage"]["dense"]
    assert "embeddings.word_embeddings.weight" in dense


@pytest.mark.parametrize("architecture", ["bert_masked", "t5", "vit", "gpt2"])
def test_the_auto_class_keeps_the_head(architecture: str, typed, tmp_path: Path):
    model = build(architecture)
    saved(model, tmp_path / "model")
    typed("compress", "model", "small", "--bits", 6, *QUICK)
    assert AutoConfig.from_pretrained(tmp_path / "small").architectures == [type(model).__name__]
    assert verify(tmp_path / "small") == []


def test_target_size_dtype_and_json(original: Path, typed, tmp_path: Path):
    arguments = ("--target-size", "60kB", "--dtype", "bfloat16", "--seed", 3, *QUICK, "--json")
    made = json.loads(typed("compress", original, "small", *arguments).stdout)
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert made["bytes"] == size <= 60_000 and size > 55_000
    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert str(config.dtype) == "torch.bfloat16" and config.quantization_config["seed"] == 3
    assert made["original_bytes"] == 2 * made["parameters"]


def asked_for(folder: Path, *names: str) -> list[object]:
    """Return fields of the config of a compressed model."""
    config = AutoConfig.from_pretrained(folder).quantization_config
    return [config[name] for name in names]


def test_options_of_a_file(original: Path, typed, tmp_path: Path):
    (tmp_path / "options.yaml").write_text("{bits: 5.5, structure: grid, trellis: null, seed: 3, dtype: bfloat16}")
    typed("compress", original, "as_said", "--recipe", "options.yaml")
    assert asked_for(tmp_path / "as_said", "bits", "structure", "trellis", "seed") == [5.5, "grid", None, 3]
    assert str(AutoConfig.from_pretrained(tmp_path / "as_said").dtype) == "torch.bfloat16"
    typed("compress", original, "changed", "--recipe", "options.yaml", "--target-size", "60kB", "--seed", 0)
    assert asked_for(tmp_path / "changed", "target_size", "structure", "seed") == ["60kB", "grid", 0]


def test_a_recipe_of_one_compression_is_options_too(original: Path, texts: Path, typed, tmp_path: Path):
    entry = "{name: small, bits: 6, structure: grid, trellis: null, samples: 4, context: 16}"
    recipe = f"{{model: elsewhere, out: nowhere, dataset: {texts}, compressions: [{entry}]}}"
    (tmp_path / "recipe.yaml").write_text(recipe)
    typed("compress", original, "out", "--recipe", "recipe.yaml", "--bits", 5)
    assert asked_for(tmp_path / "out", "bits", "structure") == [5, "grid"]
    assert AutoConfig.from_pretrained(tmp_path / "out").quantization_config["coverage"]["calibration"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("{bits: 3, colour: red}", "unknown key colour"),
        ("[1, 2]", "must hold keys and values"),
        ("{bits: [", "is no YAML"),
        ("{model: m, out: o, compressions: [{bits: 3}, {bits: 2}]}", "has 2 compressions (3-bit, 2-bit)"),
    ],
)
def test_odd_files_of_options(recipe: str, says: str, original: Path, typed, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    one_sentence(typed("compress", original, "out", "--recipe", "recipe.yaml", code=1), says)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("kind", ["texts", "jsonl", "self"])
def test_calibration_data(kind: str, original: Path, texts: Path, typed, tmp_path: Path):
    if kind == "jsonl":
        lines = [json.dumps({"text": line}) for line in texts.read_text().splitlines()]
        texts = tmp_path / "texts.jsonl"
        texts.write_text("\n".join(lines))
    data = kind if kind == "self" else texts
    typed("compress", original, "small", "--dataset", data, "--samples", 4, "--context", 16, *QUICK)
    assert AutoConfig.from_pretrained(tmp_path / "small").quantization_config["coverage"]["calibration"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bits", 3, "--target-size", "1MB"), "not both"),
        (("--trellis", 8, "--no-trellis"), "not both"),
        (("--trellis", 7), "trellis must be"),
        (("--bits", 99), "bits must be a number in (0, 16]"),
        (("--structure", "magic"), "structure must be"),
        (("--samples", 9), "give --dataset"),
        (("--dtype", "int3"), "is not one of 'auto', 'float32'"),
        (("--nonsense",), "No such option"),
    ],
)
def test_bad_combinations_are_errors_of_usage(arguments: tuple, says: str, original: Path, typed, tmp_path: Path):
    done = typed("compress", original, "small", *arguments, code=2)
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_sentence(original: Path, shrunk: Path, typed, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama"}')
    before = sorted(tmp_path.iterdir())
    one_sentence(typed("compress", "./nowhere", "out", code=1), "nowhere")
    one_sentence(typed("compress", shrunk, "out", code=1), "is quantized already (sqf)")
    one_sentence(typed("compress", original, "file", code=1), "file is a file")
    one_sentence(typed("compress", original, "out", "--dataset", "missing.txt", code=1), "no file missing.txt")
    one_sentence(typed("compress", "odd", "out", code=1), "names no architecture", "--auto-class")
    one_sentence(typed("compress", original, "out", "--auto-class", "AutoModelForNothing", code=1), "no Auto class")
    one_sentence(typed("compress", original, "out", "--bits", 0.01, *QUICK, code=1), "cannot be reached")
    one_sentence(typed("compress", original, "out", "--target-size", "1kB", *QUICK, code=1), "cannot be reached")
    assert "holds no text" in typed("compress", original, "out", "--dataset", "empty.txt", code=2).stderr
    assert sorted(tmp_path.iterdir()) == before


def test_data_sets_of_the_hub_take_their_package(original: Path, typed, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name))
    done = typed("compress", original, "out", "--dataset", "owner/texts", code=1)
    one_sentence(done, "owner/texts is no file here", "pip install 'hf-sqf[data]'")


def test_debug_shows_where(original: Path, typed):
    done = typed("compress", original, "out", "--bits", 0.01, *QUICK, "--debug", code=1)
    assert isinstance(done.exception, ValueError) and "hf-sqf:" not in done.stderr


def test_what_stands_there_is_replaced_only_by_force(original: Path, typed, tmp_path: Path):
    typed("compress", original, "small", "--bits", 6, *QUICK)
    before = (tmp_path / "small" / "model.safetensors").read_bytes()
    one_sentence(typed("compress", original, "small", "--bits", 3, *QUICK, code=1), "not empty", "--force")
    # What fails on the way leaves the old model as it was.
    typed("compress", original, "small", "--bits", 0.01, *QUICK, "--force", code=1)
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == before
    typed("compress", original, "small", "--bits", 3, *QUICK, "--force")
    assert len((tmp_path / "small" / "model.safetensors").read_bytes()) < len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_force_takes_models_only_and_never_the_source(original: Path, typed, tmp_path: Path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear")
    one_sentence(typed("compress", original, "letters", "--force", code=1), "holds no model")
    one_sentence(typed("compress", original, original, "--force", code=1), "cannot take the place of")
    one_sentence(typed("compress", original, original.parent, "--force", code=1), "cannot take the place of")
    assert (tmp_path / "letters" / "to_mother.txt").exists() and (original / "model.safetensors").exists()


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").write_text("")

    def refused(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no"), whole_folder(out) as part:
        (part / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [out]


def test_an_interrupt_leaves_nothing(minilm: Path, tmp_path: Path):
    """Ctrl-C while weights are compressed, by all structures in turn, which takes minutes."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [*command_line(), "compress", str(minilm), str(tmp_path / "small"), "--bits", "3"]
    # A shell's background job ignores Ctrl-C, and so would the process that it starts.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heeds) as running:
        assert running.stderr is not None
        said = b""
        while b"Compressing weights" not in said and running.poll() is None:
            said += os.read(running.stderr.fileno(), 4096)
        assert [path.name for path in tmp_path.iterdir()] == [f".small.{running.pid}.part"]
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=120)
    assert running.returncode == 130, rest.decode()
    assert b"Traceback" not in rest and rest.rstrip().endswith(b"hf-sqf: interrupted")
    assert list(tmp_path.iterdir()) == []
