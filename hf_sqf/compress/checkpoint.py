"""From a checkpoint to a compressed one, weight by weight: memory does not grow with the model, and runs resume."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..runtime.sqf_config import SQFConfig
from .companions import beside_weights, carry_files
from .mapped import releasing
from .model import compress
from .ranks import Ranks
from .statistics import Statistics, fingerprint
from .workspace import Workspace

_COMPLETE = "complete.json"
_VERSION = 2  # of the results of a run that go into a workspace: raised when the same job gives other bytes


def compress_checkpoint(
    source: str | Path, target: str | Path, config: SQFConfig | None = None, *, resume: bool = True
) -> Path:
    """Compress a checkpoint into a new folder. The bytes are those of compression on load.

    Weights are mapped from the source's files, read one at a time and given back, and the results wait on disk: memory
    is that of the largest weight and its work space. Interrupted at any moment, the next call goes on at the weight
    where the last one stopped.

    Where ``torch.distributed`` is initialised, all ranks call it alike and share the work; the target must lie on a
    disk that all of them see. The first rank writes it.

    Args:
        source: a folder, or an id on the Hub.
        target: the folder to be made; must not exist, or be empty. It appears when it is complete. Until then results
            lie beside it, in ``.<its name>.partial``.
        config: what is asked for; without one, ``SQFConfig()``.
        resume: go on with what an interrupted run left. Otherwise it is deleted.

    Returns:
        The target.

    Raises:
        ValueError: see :func:`hf_sqf.compress`; the target is not empty; or there is the beginning of a run with
            another source, data, config or version (says what differs).
        RuntimeError: another process is at work on the same target; or another rank stopped (says why), died, or did
            not come.
        OSError: the disk is full, or the target's parent cannot be written to. What was done stays for the next call.
    """
    target, config = Path(target), copy.deepcopy(config) if config is not None else SQFConfig()
    folder, ranks = target.parent / f".{target.name}.partial", Ranks.here()
    complete = ranks.from_first(lambda: _is_complete(folder, target) or _check_free(target))
    config.runtime = "stream"  # nothing is to run: bytes stay as they are
    model = ranks.together(lambda: load(source))
    job = ranks.together(partial(job_of, model, config))
    with ranks.together(lambda: Workspace(folder, job, resume or complete, ranks.first)) as workspace:
        if not complete:
            compress(model, config, workspace=workspace)
            ranks.from_first(partial(_write, model, source, workspace, target))
        del model  # its bytes are mapped from the workspace
        ranks.from_first(workspace.remove)
    return target


def _check_free(target: Path) -> bool:
    """Return False: nothing is complete; raise ValueError where something else stands in the target's place."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: name another target, or delete it")
    return False


def _write(model: PreTrainedModel, source: str | Path, workspace: Workspace, target: Path) -> None:
    """Save a model that is compressed, with what belongs to it, as a whole or not at all."""
    made = workspace.folder / "made"
    if made.exists():
        shutil.rmtree(made)
    with releasing(list(model.parameters())):  # results wait on disk: not all of them need be in memory at once
        model.save_pretrained(made)
    carry_files(beside_weights(str(source)), made)
    workspace.write(_COMPLETE, json.dumps(_files(made)).encode())
    if target.exists():
        target.rmdir()
    os.replace(made, target)


def _files(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _is_complete(folder: Path, target: Path) -> bool:
    """Whether the last run was interrupted between its last two steps: the target is there, and its workspace too."""
    listed = folder / _COMPLETE
    return listed.exists() and target.is_dir() and _files(target) == json.loads(listed.read_text())


def load(source: str | Path) -> PreTrainedModel:
    """Return the model of a checkpoint in the class that it names, its weights mapped, in their own dtype."""
    found = AutoConfig.from_pretrained(source)
    kind = getattr(transformers, (found.architectures or [""])[0], AutoModel)
    model: PreTrainedModel = kind.from_pretrained(source, dtype="auto")
    return model.eval()


def job_of(model: PreTrainedModel, config: SQFConfig) -> dict[str, str]:
    """Return what the bytes depend on, by topic."""
    options = config.to_dict()
    job = {
        "source": fingerprint(model),
        "data": _data_of(config),
        "version": f"{version('hf-sqf')}/{_VERSION}",
        "torch": torch.__version__,
    }
    ignored = ("coverage", "fidelity", "base_model", "runtime", "dequantize")
    return job | {key: json.dumps(value) for key, value in sorted(options.items()) if key not in ignored}


def _data_of(config: SQFConfig) -> str:
    """Return a text that tells one calibration from another."""
    parts = []
    if isinstance(config.statistics, Statistics):
        parts.append(f"statistics of {config.statistics.fingerprint}")
    elif config.statistics is not None:
        parts.append(f"statistics {hashlib.sha256(Path(config.statistics).read_bytes()).hexdigest()}")
    if config.dataset is None:
        return ", ".join(parts) or "none"
    if isinstance(config.dataset, str):
        data = config.dataset
    elif isinstance(config.dataset, (list, tuple)) and all(isinstance(text, str) for text in config.dataset):
        data = hashlib.sha256("\0".join(config.dataset).encode()).hexdigest()
    else:
        raise ValueError("dataset: a run that may be resumed takes a list of texts, a name, or statistics= from a file")
    parts += [data, f"samples {config.samples}", f"context {config.context}", f"own text {config.own_text}"]
    return ", ".join(parts)
