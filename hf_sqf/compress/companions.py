"""What belongs to a model beside its weights: tokenizer, processor, modules of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

_CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "LICENSE*", "additional_chat_templates/*")
_LEFT = ("config.json", "*.index.json", "*.py")  # written anew; of weights that are not copied; code


def beside_weights(model: str) -> Path:
    """Return a folder with all that belongs to a model but its weights, downloaded if it has an id on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    folder = Path(snapshot_download(model, allow_patterns=[*_CARRIED, "README.md"]))
    parts = _module_folders(folder)
    return Path(snapshot_download(model, allow_patterns=[f"{part}/*" for part in parts])) if parts else folder


def carry_files(source: Path, out: Path) -> None:
    """Copy what belongs to a model beside its weights: tokenizer, processor, modules of sentence-transformers.

    Weights, code and cards stay behind, and so does all that stands in ``out`` already.
    """
    parts = _module_folders(source)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        folder, _, _ = name.rpartition("/")
        top = (not folder or folder == "additional_chat_templates") and any(fnmatch(name, p) for p in _CARRIED)
        carried = (top or folder in parts) and not any(fnmatch(name, p) for p in _LEFT)
        if path.is_file() and carried and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)


def _module_folders(folder: Path) -> list[str]:
    """Return the folders of a sentence encoder's further modules (pooling, projections), weights and all."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    return [module["path"] for module in modules if module.get("path")]
