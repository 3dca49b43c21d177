"""``hf-sqf evaluate`` and ``compare``: compressed models beside their original, on the same texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..compress.companions import beside_weights
from ..hub.card import write_card
from ..hub.checking import CONTEXT, check, tokenizer_of
from ..hub.fetching import folder_of
from ..report.writing import whole_file
from ..runtime.sqf_size import file_bytes
from .labelled import Labelled
from .originals import auto_class_for, card_of, ordinary_config
from .speech import forced, word_error_rate
from .texts import held_out_texts

SPLIT = "validation"
"""Of a data set on the Hub, to measure on."""
Row = dict[str, Any]
"""One model's figures: ``model``, ``bytes``, ``bits_per_weight``, and what :func:`hf_sqf.hub.check` measures."""


def evaluate(
    models: Iterable[str],
    against: str,
    dataset: str | None = None,
    samples: int | None = None,
    context: int | None = None,
    record: bool = False,
    labelled: Labelled | None = None,
    split: str = SPLIT,
) -> list[Row]:
    """Measure how far compressed models lie from the original that they were all made from.

    Args:
        models: folders or ids on the Hub.
        against: the original's folder or id.
        dataset: a file of texts, one a line, or the id of a data set on the Hub; by default prose that comes with
            Python, and random inputs for models that no tokenizer comes with.
        samples: how many of a file's texts, evenly spread, or the first of a data set; by default all.
        context: tokens of each text.
        record: write the result into each folder's config.json and card.
        labelled: data with classes, or speech with what is said, in place of texts: the first ``samples`` of it. Adds
            accuracies, or the share of words that are wrong.
        split: of a data set on the Hub.

    Raises:
        ValueError: one of them is not compressed, the original is, an output is not finite, or labels do not fit.
    """
    models = list(models)
    if record and (repos := [model for model in models if not Path(model).is_dir()]):
        raise ValueError(f"results are recorded in folders, and {repos[0]} is none")
    ordinary_config(against)
    texts = None if dataset is None else held_out_texts(dataset, split, samples)
    source = dataset if labelled is None else labelled.dataset
    name = Path(source).name if source is not None and Path(source).is_file() else source
    data: list[dict[str, Tensor]] | None = None
    originals: dict[tuple[type, str], PreTrainedModel] = {}
    original_errors: dict[tuple[type, str], float] = {}
    rows = []
    for model in models:
        folder = folder_of(model)
        compressed = load_compressed(folder)
        native = getattr(type(compressed), "sqf_native", type(compressed))
        key = native, str(compressed.dtype)
        if key not in originals:
            originals[key] = native.from_pretrained(against, dtype=compressed.dtype)
        tokenizer = tokenizer_of(against, local_files_only=False) or tokenizer_of(str(folder))
        if labelled is not None and data is None:
            data = labelled.batches(originals[key], against, samples, context or CONTEXT)
        speech = data is not None and compressed.main_input_name == "input_features"
        inputs = [forced(batch, compressed) for batch in data] if data is not None and speech else data
        found = check(compressed, originals[key], texts, tokenizer, inputs, name=name, context=context or CONTEXT)
        if data is not None and speech:
            if key not in original_errors:
                original_errors[key] = word_error_rate(originals[key], data, against)
            found["word_error_rate"] = word_error_rate(compressed, data, against)
            found["original_word_error_rate"] = original_errors[key]
        if record:
            record_fidelity(folder, found, card_of(beside_weights(against)))
        bits = compressed.config.quantization_config.coverage["bits"]
        rows.append({"model": model, "bytes": file_bytes(folder), "bits_per_weight": bits, **found})
    return rows


def load_compressed(folder: Path) -> PreTrainedModel:
    """Return the model in a folder.

    Raises:
        ValueError: it is not compressed by hf_sqf.
    """
    config = AutoConfig.from_pretrained(folder)
    asked = getattr(config, "quantization_config", None)
    if asked is None or asked.get("quant_method") != "sqf":
        raise ValueError(f"{folder} does not hold a model compressed by hf_sqf")
    loads: Any = auto_class_for(config)
    return loads.from_pretrained(folder)


def record_fidelity(folder: Path, found: dict[str, Any], base_card: ModelCard | None = None) -> None:
    """Write the result of a fidelity check into a folder's config.json, and renew its card.

    ``base_card`` is the original's; see :func:`hf_sqf.hub.write_card`.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["fidelity"] = found
    whole_file(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_card(folder, base_card=base_card)
