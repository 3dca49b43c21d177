"""The command line: as a process of its own, and, quicker, within this one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from hf_sqf_command import app
from tests.hub.conftest import ROOT, hub, original  # noqa: F401 (fixtures)

PROSE = "the a of and is the a the of a is and of the and a is a the of"


def command_line() -> list[str]:
    """The console script of this environment, or what does the same where it was not installed."""
    script = Path(sys.executable).with_name("hf-sqf")
    return [str(script)] if script.exists() else [sys.executable, "-m", "hf_sqf"]


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run hf-sqf in a process of its own, in tmp_path: process(*arguments, env=, code=0)."""

    def start(*arguments: object, env: dict[str, str] | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command_line(), *map(str, arguments)],
            cwd=tmp_path,
            env=env or os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return start


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run hf-sqf within this process, in tmp_path: typed(*arguments, code=0)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0) -> Result:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == code, f"exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done

    return call


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of eight short texts that the tiny model's tokenizer knows."""
    words = PROSE.split()
    lines = [" ".join(words[i:] + words[:i]) for i in range(8)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "texts.txt"


@pytest.fixture(scope="session")
def shrunk(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The tiny model, compressed by the command to six bits. Not to be altered."""
    out = tmp_path_factory.mktemp("shrunk") / "small"
    done = CliRunner().invoke(app, ["compress", str(original), str(out), "--bits", "6", "--structure", "grid"])
    assert done.exit_code == 0, done.output
    return out


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def one_sentence(done: Result | subprocess.CompletedProcess[str], *says: str) -> None:
    """Assert that the last of standard error is one line, which says all this."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-sqf: ")]
    assert len(lines) == 1 and done.stderr.rstrip().endswith(lines[0]), done.stderr
    for part in says:
        assert part in lines[0]
