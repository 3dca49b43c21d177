"""From a checkpoint to a compressed one: the bytes of compression on load whatever interrupts; nothing half-written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_sqf
from hf_sqf import SQFConfig, compress_checkpoint
from hf_sqf.compress import job as job_module
from hf_sqf.compress import model as model_module
from hf_sqf.compress.calibration_data import Calibration
from hf_sqf.compress.workspace import Workspace
from hf_sqf.runtime.sqf_container import pack
from tests.conftest import build

OPTIONS = {"bits": 4.0, "structure": "grid"}
RUN = """
import sys
from hf_sqf import SQFConfig, compress_checkpoint
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
    solve, solved = job_module.solve, []

    def failing(*args, **options):
        solved.append(args)
        if len(solved) == 20:
            raise OSError(28, "No space left on device")
        return solve(*args, **options)

    monkeypatch.setattr(job_module, "solve", failing)
    with pytest.raises(OSError, match="No space left"):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert not (tmp_path / "small").exists()
    kept = len(list((tmp_path / ".small.partial").glob("*.sqf")))
    assert kept >= 3
    first, solved[:] = len(solved), []
    monkeypatch.setattr(job_module, "solve", lambda *args, **options: solved.append(args) or solve(*args, **options))
    target = compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    assert weights(target) == expected
    # Sixteen weights are sampled anew; what was solved before is not solved again.
    whole: list[object] = []
    monkeypatch.setattr(job_module, "solve", lambda *args, **options: whole.append(args) or solve(*args, **options))
    compress_checkpoint(source, tmp_path / "again", SQFConfig(**OPTIONS))
    assert first == 20 and len(solved) == len(whole) - kept


@pytest.mark.parametrize(("change", "said"), [({"bits": 3.0}, "bits was 4.0, is 3.0"), ({"seed": 7}, "seed was")])
def test_the_beginning_of_another_run_is_refused(source, tmp_path, monkeypatch, change, said):
    partial = tmp_path / ".small.partial"
    solve = job_module.solve
    monkeypatch.setattr(job_module, "solve", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    monkeypatch.setattr(job_module, "solve", solve)
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


@pytest.fixture(params=["behind a file", "read-only", "system"])
def impossible(request, tmp_path):
    """A target that cannot be made."""
    if request.param == "system":
        if not sys.platform.startswith("linux"):
            pytest.skip("needs a folder that even the administrator cannot write to")
        return Path("/proc/small")
    folder = tmp_path / "folder"
    if request.param == "behind a file":
        folder.write_text("")
    elif os.name != "posix" or os.geteuid() == 0:
        pytest.skip("whoever runs this may write everywhere")
    else:
        folder.mkdir(mode=0o555)
    return folder / "small"


def test_an_impossible_target_is_an_error_before_any_work(source, tmp_path, impossible, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(job_module, "solve", lambda *args, **options: pytest.fail("work was begun"))
    with pytest.raises(OSError):
        compress_checkpoint(source, impossible, SQFConfig(**OPTIONS))
    assert sorted(tmp_path.rglob("*")) == before


def test_without_progress_bars(source, tmp_path):
    logging.disable_progress_bar()
    try:
        target = compress_checkpoint(source, tmp_path / "small", SQFConfig(**OPTIONS))
    finally:
        logging.enable_progress_bar()
    assert weights(target)


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
    ids = [torch.randint(128, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    data = Calibration([{"input_ids": some} for some in ids[:3]], [{"input_ids": ids[3]}])
    config = SQFConfig(dataset=["words " * 5] * 4, **OPTIONS)
    measure, calls = model_module.measure, []

    def measured(*args, **options):
        calls.append(1)
        return measure(*args, **options)

    monkeypatch.setattr(model_module, "data_for", lambda model, config: data)
    monkeypatch.setattr(model_module, "measure", measured)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job_module, "solve", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        compress_checkpoint(source, tmp_path / "small", config)
    resumed = weights(compress_checkpoint(source, tmp_path / "small", config))
    assert len(calls) == 1
    assert resumed == weights(compress_checkpoint(source, tmp_path / "once", config)) and len(calls) == 2


class Runs:
    """Starts runs in processes that are forked from one which has run once and need not import or compile anything.

    That process has one thread: a child of a process with several may wait for the others for ever.
    """

    SCRIPT = """
import os, signal, sys, time
import torch
from transformers.utils import logging
from hf_sqf import SQFConfig, compress_checkpoint

def run(target):
    compress_checkpoint(sys.argv[1], target, SQFConfig(bits=4.0, structure="grid"))

logging.disable_progress_bar()
torch.set_num_threads(1)
run(sys.argv[2])
for line in sys.stdin:
    seconds, target = line.rstrip().split(" ", 1)
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            run(target)
            code = 0
        finally:
            os._exit(code)
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        if time.monotonic() > began + float(seconds):
            os.kill(child, signal.SIGKILL)  # not waited for yet, so that the number is still its own
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    print(os.waitstatus_to_exitcode(status), time.monotonic() - began, flush=True)
"""

    def __init__(self, source: Path, first: Path) -> None:
        command = [sys.executable, "-c", self.SCRIPT, str(source), str(first)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, target: Path, seconds: float = 1e9) -> tuple[int, float]:
        """Start a run and kill it after so many seconds; return its exit code and how long it took."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seconds} {target}\n")
        self._process.stdin.flush()
        code, took = self._process.stdout.readline().split()
        return int(code), float(took)

    def close(self) -> None:
        self._process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_killed_at_any_moment(source, tmp_path):
    """Fifty times, at moments spread evenly over the time that a run takes; a run that got through starts over."""
    expected = on_load(source, tmp_path / "on_load")
    target, dice, kills, left = tmp_path / "small", random.Random(0), 0, []
    run = Runs(source, tmp_path / "first")
    try:
        _, whole = run(tmp_path / "second")
        while kills < 50:
            code, _ = run(target, dice.uniform(0.0, whole))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            assert not target.exists() or weights(target) == expected  # whole, or not there
            left.append(len(list((tmp_path / ".small.partial").glob("*.sqf"))))
            if code == 0:
                shutil.rmtree(target)
        assert run(target)[0] == 0
    finally:
        run.close()
    assert weights(target) == weights(tmp_path / "first") == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "on_load", "second", "small", "source"]
    assert left.count(0) > 1 and len(set(left)) >= 5  # they fell before, between and behind the weights
