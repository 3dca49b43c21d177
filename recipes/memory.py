"""Memory by the system's figures, in a process of its own. Linux only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_child(code: str, *arguments: str, seconds: float | None = None) -> dict[str, Any]:
    """Run Python code in a fresh process that can import this module; return the JSON of its last line of output.

    Raises:
        subprocess.CalledProcessError: it ended with an error; ``stderr`` has what it wrote.
        subprocess.TimeoutExpired: it took more than ``seconds``, and was killed.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Memory:
    """Bytes that this process holds above what it held when this was made.

    Attributes:
        base: what it held then: the interpreter, imports, pools of threads.
    """

    def __init__(self) -> None:
        import torch
        from transformers.models.llama import modeling_llama  # noqa: F401 (imported lazily, when it is needed first)

        torch.ones(64, 64) @ torch.ones(64, 64)  # wakes the pools of threads
        self.base = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here

    def held(self) -> int:
        """Return the bytes held now."""
        return _status("VmRSS") - self.base

    def peak(self) -> int:
        """Return the most bytes held at any time since."""
        return _status("VmHWM") - self.base


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
