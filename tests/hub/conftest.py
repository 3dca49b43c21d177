"""A Hub on loopback, and processes that talk to it and to nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.server import OWNER_TOKEN, HubServer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer().start()
    yield server
    server.stop()


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a process of its own: run(source, *arguments, token=, home=, env=).

    huggingface_hub reads its environment when it is imported, so whatever talks to the server needs a process.
    ``home`` names a cache; processes with the same name share it.
    """

    def start(
        source: str,
        *arguments: str,
        token: str | None = OWNER_TOKEN,
        home: str = "home",
        fails: bool = False,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "SQF_", "TRANSFORMERS_"))}
        kept |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        if token is not None:
            kept["HF_TOKEN"] = token
        kept |= env
        done = subprocess.run(
            [sys.executable, "-c", source, *arguments],
            cwd=tmp_path,
            env=kept,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return start
