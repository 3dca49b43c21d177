"""The fidelity check: is a compressed model still close enough to its original to be shared?"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ..report.fidelity import TEXTS, Inputs, compare, default_texts, padding, random_inputs, text_inputs
from ..runtime.sqf_backends import packed_bytes
from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_modules import SUFFIX

CONTEXT = 128
"""Tokens of each text that the models are compared on, unless told otherwise."""


class Unfaithful(ValueError):
    """A model lies further from its original than its config allows."""


class OriginalMissing(LookupError):
    """There is nothing to compare a model with on this machine."""


def check(
    model: PreTrainedModel,
    original: PreTrainedModel | str | Path | None = None,
    texts: Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Iterable[Inputs] | None = None,
    name: str | None = None,
    context: int = CONTEXT,
) -> dict[str, Any]:
    """Compare a compressed model with its original and note the result in ``quantization_config.fidelity``.

    Args:
        model: the compressed model.
        original: the model it was made from, its folder or id; by default where it was loaded from, if it is on this
            machine (nothing is downloaded for this).
        texts: to compare on; without texts and inputs, prose that comes with Python; random inputs for models that
            no tokenizer comes with.
        tokenizer: the original's, unless it can be loaded from where the original is.
        inputs: instead of texts: batches of keyword arguments for ``forward``.
        name: of the texts or inputs, with their split, for the card.
        context: tokens of each text.

    Returns:
        What :func:`hf_sqf.report.fidelity.compare` says, with the inputs' ``name``, ``context``, ``dtype``, and
        ``weights``, a fingerprint of the weights that were compared.

    Raises:
        OriginalMissing: there is no original on this machine.
        ValueError: the model is not compressed, or an output is not finite.
    """
    config = config_of(model)
    where = None if isinstance(original, PreTrainedModel) else _locate(model, original)
    if not isinstance(original, PreTrainedModel):
        original = _load(model, str(where))
    if inputs is None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context
        context = min(context, limit)
        tokenizer = tokenizer or tokenizer_of(where or str(original.name_or_path))
        if tokenizer is not None and model.main_input_name == "input_ids":
            inputs = list(text_inputs(tokenizer, default_texts() if texts is None else texts, context, model))
            name = name or (TEXTS if texts is None else "texts given by hand")
        elif texts is not None:
            raise ValueError("texts need a tokenizer, and none lies with the original; give tokenizer=")
        else:
            inputs, name = random_inputs(model, context), "random inputs"
    found = compare(model, original, inputs)
    found |= {"name": name or "inputs given by hand", "context": context, "dtype": str(model.dtype).split(".")[1]}
    config.fidelity = found | {"weights": fingerprint(model)}
    return config.fidelity


def judge(config: SQFConfig) -> str | None:
    """Return in a sentence why a model with this config must not be shared, or None."""
    found = config.fidelity
    if found is None:
        return None
    value, limits = found.get("value"), {"kl": config.max_kl, "cosine": config.min_cosine}
    limit = limits.get(str(found.get("metric")))
    if limit is None or not isinstance(value, (int, float)):
        return None
    if found["metric"] == "kl" and value > limit:
        return f"its KL divergence from the original is {value:.3g} nats, above max_kl={limit:g}"
    if found["metric"] == "cosine" and value < limit:
        return f"its mean cosine to the original is {value:.3g}, below min_cosine={limit:g}"
    return None


def config_of(model: PreTrainedModel) -> SQFConfig:
    """Return a compressed model's own SQFConfig.

    Raises:
        ValueError: the model is not compressed.
    """
    config = getattr(model.config, "quantization_config", None)
    if getattr(config, "quant_method", None) != "sqf":
        raise ValueError("the model is not compressed by hf_sqf")
    return config  # type: ignore[return-value]


def fingerprint(model: PreTrainedModel) -> str:
    """Return eight hex digits that change when a compressed weight does, but not when it only runs in another form."""
    crc = 0
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if name.endswith(SUFFIX):
            packed = packed_bytes(parameter).detach()
            crc = zlib.crc32(packed.cpu().numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _locate(model: PreTrainedModel, original: str | Path | None) -> str:
    config = config_of(model)
    where = original or config.base_model or model.name_or_path
    if not where:
        raise OriginalMissing("the model does not say what it was made from; give original=")
    return str(where)


def _load(model: PreTrainedModel, where: str) -> PreTrainedModel:
    native = getattr(type(model), "sqf_native", type(model))
    try:
        original = native.from_pretrained(where, dtype=model.dtype, local_files_only=True)
    except OSError as error:
        raise OriginalMissing(f"the original, {where}, is not on this machine; give original=") from error
    if getattr(original.config, "quantization_config", None) is not None:
        raise OriginalMissing(f"{where} is compressed itself; give original=")
    return original


def tokenizer_of(where: str, local_files_only: bool = True) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies with a model, in its folder or under its id on the Hub, able to pad; or None."""
    if not where:
        return None
    # Where there is none, transformers makes one up for many kinds of models, with special tokens and nothing else.
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(where, "tokenizer_config.json", local_files_only=local_files_only, **quiet) is None:
        return None
    return padding(AutoTokenizer.from_pretrained(where, local_files_only=local_files_only))
