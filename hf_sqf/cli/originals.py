"""Ordinary models as the commands take them: by folder or id on the Hub, with the files that belong to them."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import transformers
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoConfig, PretrainedConfig

from ..hub.card import known_auto_class

_CARRIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "LICENSE*", "additional_chat_templates/*")
_LEFT = ("config.json", "*.index.json", "*.py")  # written anew; of weights that are not copied; code


def ordinary_config(model: str) -> PretrainedConfig:
    """Return the config of a model that is to be compressed.

    Args:
        model: folder or id on the Hub.

    Raises:
        ValueError: the model is quantized already.
    """
    config = AutoConfig.from_pretrained(model)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") or type(quantized).__name__
        raise ValueError(f"{model} is quantized already ({method}); compress the model it was made from")
    return config


def auto_class_for(config: PretrainedConfig, name: str | None = None) -> type:
    """Return the Auto class that loads a model whole, its head included.

    Args:
        config: the model's.
        name: of the class, where it cannot be told from the config.

    Raises:
        ValueError: there is no such class, or none can be told.
    """
    if name is not None:
        found = getattr(transformers, name, None) if name.startswith("AutoModel") else None
        if found is None:
            raise ValueError(f"transformers {transformers.__version__} has no Auto class {name} for models")
        return found
    architecture = (config.architectures or ["a model whose config names no architecture"])[0]
    known = known_auto_class(architecture)
    if known is None:
        raise ValueError(f"transformers has no Auto class for {architecture}; name one with --auto-class")
    return getattr(transformers, known)


def beside_weights(model: str) -> Path:
    """Return a folder with all that belongs to a model but its weights, downloaded if it has an id on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    folder = Path(snapshot_download(model, allow_patterns=[*_CARRIED, "README.md"]))
    parts = _module_folders(folder)
    return Path(snapshot_download(model, allow_patterns=[f"{part}/*" for part in parts])) if parts else folder


def card_of(folder: Path) -> ModelCard | None:
    """Return the card that lies in a model's folder."""
    path = folder / "README.md"
    return ModelCard.load(path) if path.exists() else None


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
