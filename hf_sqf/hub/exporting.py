"""Makes an ordinary checkpoint of a compressed model, for programs that know nothing of factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers

from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_quantizer import SQFQuantizer
from .fetching import folder_of

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    folder_or_repo: str | Path,
    out: str | Path,
    dtype: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> Path:
    """Write a dense checkpoint with the decoded weights: tensors of the original's names and shapes, no code.

    Converters of other programs read it as they read the original, ``convert_hf_to_gguf.py`` of llama.cpp for one;
    ``dtype="float16"`` or ``"float32"`` suits it best.

    Args:
        folder_or_repo: a folder, or a repository's id on the Hub.
        out: folder to write; must not exist, or be empty.
        dtype: "float32", "float16" or "bfloat16"; by default the one that the model was saved in.
        revision: of the repository.
        token: of the Hub's user.

    Returns:
        ``out``.

    Raises:
        ValueError: the dtype is unknown, or the model is not compressed.
        FileNotFoundError: there is no such folder or repository.
        FileExistsError: ``out`` has something in it.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    folder = folder_of(folder_or_repo, revision, token)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") != "sqf":
        raise ValueError(f"{folder} does not hold a model compressed by hf_sqf")
    cls = getattr(transformers, (config.get("architectures") or ["AutoModel"])[0], None)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no {config['architectures'][0]}")
    own = cls.config_class.from_pretrained(folder)
    own.quantization_config = SQFConfig.from_dict({**config["quantization_config"], "dequantize": True})
    model = cls.from_pretrained(folder, config=own, dtype=_DTYPES.get(dtype or "", "auto"))
    assert not isinstance(getattr(model, "hf_quantizer", None), SQFQuantizer)
    model.save_pretrained(out)
    _copy_rest(folder, out)
    return out


def _copy_rest(folder: Path, out: Path) -> None:
    """Copy tokenizer, processor and their like; not weights, code, or a card that speaks of factors."""
    for path in sorted(folder.rglob("*")):
        target = out / path.relative_to(folder)
        left = path.name.endswith(_WEIGHTS) or path.suffix == ".py" or path.name == "README.md"
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if path.is_file() and not left and not hidden and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
