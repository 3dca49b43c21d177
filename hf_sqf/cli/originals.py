"""Ordinary models as the commands take them: by folder or id on the Hub, and their cards."""

from __future__ import annotations

from pathlib import Path

import transformers
from huggingface_hub import ModelCard
from transformers import AutoConfig, PretrainedConfig

from ..hub.card import known_auto_class


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


def card_of(folder: Path) -> ModelCard | None:
    """Return the card that lies in a model's folder."""
    path = folder / "README.md"
    return ModelCard.load(path) if path.exists() else None
