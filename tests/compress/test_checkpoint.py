"""From a checkpoint to a compressed one: the bytes of compression on load whatever interrupts; nothing half-written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sqf
from hf_sqf import SQFConfig, compress_checkpoint
from hf_sqf.compress import model as model_module
from hf_sqf.compress.workspace import Workspace
from hf_sqf.runtime.sqf_container import pack
from tests.conftest import build

OPTIONS = {"bits": 4.0, "structure": "grid"}
RUN = """
import sys
from hf_sqf import SQFConfig, compress_checkpoint
print("started", flush=True)
compress_checkpoint(sys.argv[1], sys.argv[2], SQFConfig(bits=4.0, structure="grid"))
"""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    build("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def on_load(source: Path, folder: Path) -> dict[str, bytes]:
    config = SQFConfig(**OPTIONS)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder)
    return weights(folder)


def test_the_bytes_are_those_of_compression_on_load(source, tmp_path):
    target = compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert weights(target) == on_load(source, tmp_path / "on_load")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["on_load", "small", "source"]
    assert (target / "tokenizer.json").read_text() == "{}"
    said, loaded = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("small", "on_load"))
    assert said == loaded
    assert AutoModelForCausalLM.from_pretrained(target)(torch.arange(5)[None]).logits.isfinite().all()


def test_an_interrupted_run_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    expected = on_load(source, tmp_path / "on_load")
    solve, solved = model_module.solve, []

    def failing(*args, **options):
        solved.append(args)
        if len(solved) == 20:
            raise OSError(28, "No space left on device")
        return solve(*args, **options)

    monkeypatch.setattr(model_module, "solve", failing)
    with pytest.raises(OSError, match="No space left"):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert not (tmp_path / "small").exists()
    kept = len(list((tmp_path / ".small.partial").glob("*.sqf")))
    assert kept >= 3
    first, solved[:] = len(solved), []
    monkeypatch.setattr(model_module, "solve", lambda *args, **options: solved.append(args) or solve(*args, **options))
    target = compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert weights(target) == expected
    # Sixteen weights are sampled anew; what was solved before is not solved again.
    whole: list[object] = []
    monkeypatch.setattr(model_module, "solve", lambda *args, **options: whole.append(args) or solve(*args, **options))
    compress_checkpoint(source, tmp_path / "again", SQFConfig(**OPTIONS))
    assert first == 20 and len(solved) == len(whole) - kept


@pytest.mark.parametrize(("change", "said"), [({"bits": 3.0}, "bits was 4.0, is 3.0"), ({"seed": 7}, "seed was")])
def test_the_beginning_of_another_run_is_refused(source, tmp_path, monkeypatch, change, said):
    partial = tmp_path / ".small.partial"
    solve = model_module.solve
    monkeypatch.setattr(model_module, "solve", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    monkeypatch.setattr(model_module, "solve", solve)
    with pytest.raises(ValueError, match=said):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**{**OPTIONS, **change}))
    assert partial.exists()
    compress_checkpoint(source, tmp_path / "small", SQFConfig(**{**OPTIONS, **change}), resume=False)
    assert not partial.exists() and weights(tmp_path / "small")


def test_another_source_is_refused(source, tmp_path):
    with Workspace(tmp_path / ".small.partial", {"source": "another"}):
        pass
    with pytest.raises(ValueError, match="source was another"):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))


def test_a_second_run_is_refused(source, tmp_path):
    with Workspace(tmp_path / ".small.partial", {}), pytest.raises(RuntimeError, match="another process"):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))


def test_a_target_in_use_is_refused(source, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not an empty folder"):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert [file.name for file in (tmp_path / "small").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / ".small.partial").exists()


def test_an_impossible_target_writes_nothing(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        compress_checkpoint(source, tmp_path / "file" / "small", SQFConfig(**OPTIONS))


@pytest.mark.skipif(os.name != "posix", reason="limits what a process may write")
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_no_room_is_an_error_and_loses_nothing(source, tmp_path, share):
    """The system refuses files longer than a share of the result: those of weights, or but the last one."""
    import resource

    expected = on_load(source, tmp_path / "on_load")
    limit = int(share * max(map(len, expected.values())))
    command = [sys.executable, "-c", RUN, str(source), str(tmp_path / "small")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and "OSError" in done.stderr and "File too large" in done.stderr, done.stderr
    assert not (tmp_path / "small").exists()
    kept = list((tmp_path / ".small.partial").glob("*.sqf"))
    assert share < 0.1 or kept
    assert weights(compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))) == expected


def test_interrupted_between_the_last_two_steps(source, tmp_path, monkeypatch):
    expected = on_load(source, tmp_path / "on_load")

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "remove", killed)
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert weights(tmp_path / "small") == expected and (tmp_path / ".small.partial").exists()
    assert weights(compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))) == expected
    assert not (tmp_path / ".small.partial").exists()


def test_results_are_whole_or_not_there(tmp_path):
    packed = pack([hf_sqf.factorize(torch.randn(32, 24), "grid", 8.0).factors], "a.weight")
    with Workspace(tmp_path / "w", {}) as workspace:
        assert workspace.get("a.weight", 0.5) is None
        assert torch.equal(workspace.put("a.weight", 0.5, packed), packed)
        (file,) = (tmp_path / "w").glob("*.sqf")
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=file.name):
            workspace.get("a.weight", 0.5)


def test_calibration_resumes(source, tmp_path, monkeypatch):
    data = [torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    config = SQFConfig(dataset=["words " * 5] * 4, **OPTIONS)
    calls = []

    def measured(model, targets, config):
        from hf_sqf.compress.collect import collect

        calls.append(1)
        return collect(model, targets, [{"input_ids": ids} for ids in data[:3]], [{"input_ids": data[3]}])

    monkeypatch.setattr(model_module, "measure", measured)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_module, "solve", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        compress_checkpoint(source, tmp_path / "small", config)
    resumed = weights(compress_checkpoint(source, tmp_path / "small", config))
    assert len(calls) == 1
    assert resumed == weights(compress_checkpoint(source, tmp_path / "once", config)) and len(calls) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_killed_at_any_moment(source, tmp_path):
    expected = on_load(source, tmp_path / "on_load")
    target, dice, kills = tmp_path / "small", random.Random(0), 0
    for _ in range(200):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(source), str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        if kills < 50:
            time.sleep(dice.uniform(0.0, 1.5))
            process.send_signal(signal.SIGKILL)
            kills += process.poll() is None or process.wait() != 0
        code = process.wait()
        if code == 0:
            assert weights(target) == expected
            if kills >= 50:
                break
            for file in target.rglob("*"):
                file.unlink()
            target.rmdir()
    assert kills >= 50 and weights(target) == expected
