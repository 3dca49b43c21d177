"""Labelled data: texts or pictures with their classes, as inputs of a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, DataCollatorWithPadding, PreTrainedModel, default_data_collator

from ..hub.checking import tokenizer_of
from .texts import calibration_texts

Encoder = Callable[[Any], dict[str, Any]]
"""Makes a model's inputs of one text or picture."""
_BATCH = 8
_COLUMNS = {"input_ids": "text", "pixel_values": "image"}
"""A model's main input -> the column that it is made from, unless told otherwise."""


@dataclass(frozen=True)
class Labelled:
    """Where labelled data lies.

    Attributes:
        dataset: a ``.jsonl`` file, or the id of a data set on the Hub. In a file, pictures are named by their paths,
            relative to it.
        labels: the column of classes: their numbers, or their names as the model's config has them.
        inputs: the column of texts or pictures; None for ``text`` or ``image``.
        split: of a data set on the Hub.
    """

    dataset: str
    labels: str
    inputs: str | None = None
    split: str = "train"

    def entries(self) -> Iterable[dict[str, Any]]:
        """Yield the entries as they are.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: the package that loads data sets is missing.
            ValueError: a line of the file is no JSON.
        """
        file = Path(self.dataset)
        if file.suffix == ".jsonl" and file.is_file():
            return _lines(file)
        calibration_texts(self.dataset)  # says what is missing to load it
        if file.is_file():
            raise ValueError(f"{file}: labels take a .jsonl file, each line with the columns that are named")
        import datasets

        found: Iterable[dict[str, Any]] = datasets.load_dataset(self.dataset, split=self.split, streaming=True)
        return found

    def examples(self, model: PreTrainedModel, where: str, count: int | None, context: int) -> list[dict[str, Any]]:
        """Return the first ``count`` examples as a model's inputs, each with ``labels``.

        Args:
            model: a classifier.
            where: folder or id of the original, which its tokenizer or image processor comes with.
            count: None for all.
            context: tokens of a text, at most.

        Raises:
            ValueError: a column is missing, a class is unknown, or the model takes neither texts nor pictures.
            FileNotFoundError, ImportError: see :meth:`entries`.
        """
        if model.main_input_name not in _COLUMNS:
            raise ValueError(f"labels go with texts and pictures, and the model takes {model.main_input_name}")
        column = self.inputs or _COLUMNS[model.main_input_name]
        encode = _texts(where, context) if model.main_input_name == "input_ids" else self._pictures(where)
        found = []
        for entry in islice(self.entries(), count):
            if missing := [name for name in (column, self.labels) if name not in entry]:
                raise ValueError(f"{self.dataset} has no column {missing[0]}; it has {', '.join(entry)}")
            found.append({**encode(entry[column]), "labels": _number(entry[self.labels], model)})
        if not found:
            raise ValueError(f"{self.dataset} holds no examples")
        return found

    def batches(self, model: PreTrainedModel, where: str, count: int | None, context: int) -> list[dict[str, Tensor]]:
        """Return the examples in batches, padded where they are texts; see :meth:`examples`."""
        examples = self.examples(model, where, count, context)
        tokenizer = tokenizer_of(where, local_files_only=False) if model.main_input_name == "input_ids" else None
        if tokenizer is not None and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collate = default_data_collator if tokenizer is None else DataCollatorWithPadding(tokenizer)
        return [dict(collate(examples[at : at + _BATCH])) for at in range(0, len(examples), _BATCH)]

    def _pictures(self, where: str) -> Encoder:
        processor = AutoImageProcessor.from_pretrained(where)
        folder = Path(self.dataset).parent

        def encode(picture: Any) -> dict[str, Any]:  # noqa: ANN401
            if isinstance(picture, str):
                from PIL import Image

                with Image.open(folder / picture) as opened:
                    picture = opened.convert("RGB")
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels[0]}

        return encode


def _texts(where: str, context: int) -> Encoder:
    tokenizer = tokenizer_of(where, local_files_only=False)
    if tokenizer is None:
        raise ValueError(f"labels of texts take a tokenizer, and none comes with {where}")
    names = ("input_ids", "attention_mask", "token_type_ids")

    def encode(text: Any) -> dict[str, Any]:  # noqa: ANN401
        if not isinstance(text, str):
            raise ValueError(f"texts must be text, got {text!r:.60}")
        encoded = tokenizer(text, truncation=True, max_length=context)
        return {name: encoded[name] for name in names if name in encoded}

    return encode


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: must be JSON, got {line:.60}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{file}, line {number}: must be columns with their values, got {line:.60}")
        yield entry


def _number(label: Any, model: PreTrainedModel) -> int:  # noqa: ANN401
    """Return the number of a class."""
    names: dict[str, Any] = dict(model.config.label2id or {})
    count = len(model.config.id2label or {})
    if isinstance(label, str) and label in names:
        label = names[label]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        known = ", ".join(map(str, islice(names, 8)))
        raise ValueError(f"class {label!r} is none of the model's {count}, by number or name ({known})")
    return label
