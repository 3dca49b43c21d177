"""Where the results of a run wait on disk, weight by weight, so that an interrupted run goes on where it stopped.

A run is deterministic: the same source, data, config and version ask for the same weights at the same noise steps, in
the same order. So a result is kept under the name of its weight and its step, and what a run before has found is
found again. Files appear whole or not at all (written beside their place, flushed to disk, renamed).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..runtime.sqf_container import weight_name
from ..runtime.sqf_memory import release
from .statistics import Statistics

_JOB, _STATISTICS = "job.json", "statistics.safetensors"


class Workspace:
    """A folder of results, held by one run at a time.

    Args:
        folder: is created where there is none.
        job: what the results depend on, as text by topic; asked of each run that resumes.
        resume: take up what is there; otherwise it is deleted.
        holds: whether this process is the one of its run that holds the folder. The others come in after it.

    Raises:
        RuntimeError: another process holds the folder.
        ValueError: what is there belongs to another job; says what differs.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, job: Mapping[str, str], resume: bool = True, holds: bool = True) -> None:
        self.folder = folder
        self._lock = FileLock(folder / "lock")  # releasing what was never acquired does nothing
        if not holds:
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another process is compressing in {folder}; wait for it or stop it") from None
        try:
            self._take_up(dict(job), resume)
        except BaseException:
            self._lock.release()
            raise

    def _take_up(self, job: dict[str, str], resume: bool) -> None:
        path = self.folder / _JOB
        if not resume:
            for file in self.folder.iterdir():
                if file.name != "lock":
                    file.unlink() if file.is_file() else shutil.rmtree(file)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(topic for topic in before.keys() | job.keys() if before.get(topic) != job.get(topic))
            if differing:
                said = "; ".join(f"{t} was {before.get(t)}, is {job.get(t)}" for t in differing)
                raise ValueError(f"{self.folder} holds the results of another run: {said}. resume=False deletes them")
        else:
            self.write(_JOB, json.dumps(job, indent=1).encode())

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def get(self, weight: str, step: float) -> Tensor | None:
        """Return the packed bytes of a weight at a noise step, mapped from their file; None where there are none."""
        path = self._path(weight, step)
        if not path.exists():
            return None
        data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        if weight_name(data, str(path)) != weight:  # checks the bytes, too
            raise ValueError(f"{path} does not hold {weight}: delete it")
        release(data)  # not needed before the model is saved
        return data

    def of_other(self, weight: str, step: float) -> Tensor:
        """Return the packed bytes that another process of the run has put here, mapped from their file.

        Raises:
            RuntimeError: they are not here.
        """
        found = self.get(weight, step)
        if found is None:
            raise RuntimeError(f"{self.folder} lacks {weight}: the target must lie on a disk that all ranks share")
        return found

    def put(self, weight: str, step: float, packed: Tensor) -> Tensor:
        """Keep the packed bytes of a weight at a noise step; return them mapped from their file."""
        self.write(self._path(weight, step).name, packed.numpy().tobytes())
        found = self.get(weight, step)
        assert found is not None
        return found

    def statistics(self) -> Statistics | None:
        """Return the calibration statistics that were kept, if any."""
        path = self.folder / _STATISTICS
        return Statistics.load(path) if path.exists() else None

    def keep_statistics(self, found: Statistics) -> None:
        """Keep calibration statistics."""
        found.save(self.folder / f"{_STATISTICS}.part")
        self._settle(self.folder / f"{_STATISTICS}.part", self.folder / _STATISTICS)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder: it is there as a whole or not at all."""
        beside = self.folder / f"{name}.part"
        beside.write_bytes(data)
        self._settle(beside, self.folder / name)

    def remove(self) -> None:
        """Delete the folder with all results."""
        self._lock.release()
        shutil.rmtree(self.folder)

    def _path(self, weight: str, step: float) -> Path:
        return self.folder / f"{hashlib.sha256(f'{weight} {step.hex()}'.encode()).hexdigest()[:32]}.sqf"

    @staticmethod
    def _settle(beside: Path, path: Path) -> None:
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
