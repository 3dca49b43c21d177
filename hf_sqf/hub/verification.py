"""Looks through a repository or folder: is its code the package's own, and is every weight whole?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging as transformers_logging

from .. import runtime
from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_container import unpack
from ..runtime.sqf_modules import SUFFIX
from .fetching import folder_of

RUNTIME = Path(runtime.__file__).parent
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it should be.

    Attributes:
        where: file, or file and tensor.
        what: is wrong with it.
        fatal: the model cannot be loaded, or is not what was saved; otherwise something in it cannot be vouched for.
    """

    where: str
    what: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(folder_or_repo: str | Path, revision: str | None = None, token: bool | str | None = None) -> list[Fault]:
    """Check the files of a compressed model: travelling code by its hash, every compressed weight by its CRC.

    Nothing of the model's is executed.

    Args:
        folder_or_repo: a folder, or a repository's id on the Hub, which is downloaded to the local cache.
        revision: of the repository.
        token: of the Hub's user.

    Returns:
        What differs; nothing if all is well.

    Raises:
        FileNotFoundError: there is no such folder or repository, or no config.json in it.
        ValueError: config.json does not describe a compressed model.
    """
    folder = folder_of(folder_or_repo, revision, token)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    asked = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(asked, dict) or asked.get("quant_method") != "sqf":
        raise ValueError(f"{folder / 'config.json'} does not describe a model compressed by hf_sqf")
    return [*_config_faults(config), *_code_faults(folder), *_weight_faults(folder, asked)]


def travelling() -> dict[str, Path]:
    """Return name -> path of the package's files that travel with every model."""
    hub = RUNTIME / "sqf_hub.py"
    needed = {Path(file).name: Path(file) for file in get_relative_import_files(hub)}
    return dict(sorted((needed | {hub.name: hub}).items()))


def sha256(path: Path) -> str:
    """Return a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _config_faults(config: dict[str, object]) -> Iterator[Fault]:
    try:
        SQFConfig.from_dict(dict(config["quantization_config"]))  # type: ignore[call-overload]
    except ValueError as error:
        yield Fault("config.json", f"quantization_config: {error}")
    auto_map = config.get("auto_map") or {}
    for kind, target in auto_map.items() if isinstance(auto_map, dict) else [("auto_map", auto_map)]:
        if kind != "AutoConfig" or not str(target).startswith("sqf_hub."):
            yield Fault("config.json", f"auto_map has {kind} run {target}, which is not hf_sqf's code", fatal=False)


def _code_faults(folder: Path) -> Iterator[Fault]:
    known = travelling()
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    for name, path in known.items():
        if name not in found:
            yield Fault(name, "is missing: the model loads only where hf_sqf is installed", fatal=False)
        elif (theirs := sha256(found[name])) != (own := sha256(path)):
            yield Fault(name, f"differs from the installed package's: sha256 {theirs}, here {own}", fatal=False)
    for name in sorted(found.keys() - known.keys()):
        yield Fault(name, "is no file of hf_sqf's", fatal=False)
    for path in sorted(folder.rglob("*")):
        if path.suffix in PICKLES:
            yield Fault(path.relative_to(folder).as_posix(), "is a pickle; hf_sqf writes none", fatal=False)


def _weight_faults(folder: Path, asked: dict[str, object]) -> Iterator[Fault]:
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                # A bar after two seconds: large weights take their time to decode.
                for key in transformers_logging.tqdm(opened.keys(), desc=f"Checking {file.name}", delay=2.0):
                    if key.endswith(SUFFIX):
                        count += 1
                        yield from _tensor_faults(f"{file.name}: {key}", opened.get_tensor(key))
                    elif (tensor := opened.get_tensor(key)).is_floating_point() and not torch.isfinite(tensor).all():
                        yield Fault(f"{file.name}: {key}", "has NaN or infinite entries")
        except SafetensorError as error:
            yield Fault(file.name, f"is no whole safetensors file: {error}")
    coverage = asked.get("coverage")
    expected = coverage.get("weights") if isinstance(coverage, dict) else None
    if expected != count:
        yield Fault("config.json", f"names {expected} compressed weights, the files have {count}")


def _tensor_faults(name: str, packed: torch.Tensor) -> Iterator[Fault]:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        yield Fault(name, f"must be 1-D uint8, found {packed.dtype} of shape {tuple(packed.shape)}")
        return
    try:
        unpack(packed, name)
    except ValueError as error:
        yield Fault(name, str(error))
