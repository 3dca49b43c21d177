"""Labelled data: texts or pictures with their classes, or speech with what is said, as a model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, DataCollatorWithPadding, PreTrainedModel, default_data_collator

from ..hub.checking import tokenizer_of
from .speech import Listener, stacked
from .texts import hub_entries, json_lines, refuse_missing

Example = dict[str, Any]
"""Inputs of a model, with ``labels``."""
_BATCH = 8
_COLUMNS = {"input_ids": "text", "pixel_values": "image", "input_features": "audio"}
"""A model's main input -> the column that it is made from, unless told otherwise."""


@dataclass(frozen=True)
class Reader:
    """Makes a model's inputs of labelled data.

    Attributes:
        encode: input of a column (text, picture or sound) -> the model's inputs.
        label: what stands in the column of labels -> the number of a class, or the tokens of what is said.
        collate: examples -> a batch.
        batch: examples that are measured at a time. Speech goes one by one: where a decoder's tokens are padded, what
            it predicts of them would count.
    """

    encode: Callable[[Any], Example]
    label: Callable[[Any], int | Tensor]
    collate: Callable[[list[Example]], dict[str, Any]]
    batch: int = _BATCH


@dataclass(frozen=True)
class Labelled:
    """Where labelled data lies.

    Attributes:
        dataset: a ``.jsonl`` file, or the id of a data set on the Hub. In a file, pictures and sounds are named by
            their paths, relative to it.
        labels: the column of classes: their numbers, or their names as the model's config has them. For speech, the
            column of what is said.
        inputs: the column of texts, pictures or sounds; None for ``text``, ``image`` or ``audio``.
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
        refuse_missing(self.dataset)
        if not file.is_file():
            return hub_entries(self.dataset, self.split)
        if file.suffix != ".jsonl":
            raise ValueError(f"{file}: labels take a .jsonl file, each line with the columns that are named")
        return (entry for _, entry in json_lines(file))

    def reader(self, model: PreTrainedModel, where: str, context: int) -> Reader:
        """Return what makes the model's inputs of this data.

        Args:
            model: a classifier, or one that writes down what it hears.
            where: folder or id of the original, which its tokenizer or processor comes with.
            context: tokens of a text, at most.

        Raises:
            ValueError: the model takes something else, or lacks a tokenizer.
        """
        if model.main_input_name == "input_ids":
            return _texts(model, where, context)
        if model.main_input_name == "pixel_values":
            return Reader(self._pictures(where), lambda label: _number(label, model), default_data_collator)
        if model.main_input_name == "input_features" and model.config.is_encoder_decoder:
            listener = Listener(model, where, Path(self.dataset).parent)
            return Reader(listener.features, listener.tokens, stacked, batch=1)
        raise ValueError(f"labels go with texts, pictures and speech, and the model takes {model.main_input_name}")

    def examples(self, model: PreTrainedModel, reader: Reader, count: int | None) -> list[Example]:
        """Return the first ``count`` examples as a model's inputs, each with ``labels``.

        Args:
            model: that they are for.
            reader: from :meth:`reader`.
            count: None for all.

        Raises:
            ValueError: a column is missing, or a class is unknown.
            FileNotFoundError, ImportError: see :meth:`entries`.
        """
        column = self.inputs or _COLUMNS[model.main_input_name]
        found = []
        for entry in islice(self.entries(), count):
            if missing := [name for name in (column, self.labels) if name not in entry]:
                raise ValueError(f"{self.dataset} has no column {missing[0]}; it has {', '.join(entry)}")
            found.append({**reader.encode(entry[column]), "labels": reader.label(entry[self.labels])})
        if not found:
            raise ValueError(f"{self.dataset} holds no examples")
        return found

    def batches(self, model: PreTrainedModel, where: str, count: int | None, context: int) -> list[dict[str, Tensor]]:
        """Return the examples in batches; see :meth:`reader` and :meth:`examples`."""
        reader = self.reader(model, where, context)
        examples = self.examples(model, reader, count)
        starts = range(0, len(examples), reader.batch)
        return [dict(reader.collate(examples[at : at + reader.batch])) for at in starts]

    def _pictures(self, where: str) -> Callable[[Any], Example]:
        processor = AutoImageProcessor.from_pretrained(where)
        folder = Path(self.dataset).parent

        def encode(picture: Any) -> Example:  # noqa: ANN401
            if isinstance(picture, str):
                from PIL import Image

                with Image.open(folder / picture) as opened:
                    picture = opened.convert("RGB")
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels[0]}

        return encode


def _texts(model: PreTrainedModel, where: str, context: int) -> Reader:
    tokenizer = tokenizer_of(where, local_files_only=False)
    if tokenizer is None:
        raise ValueError(f"labels of texts take a tokenizer, and none comes with {where}")
    names = ("input_ids", "attention_mask", "token_type_ids")

    def encode(text: Any) -> Example:  # noqa: ANN401
        if not isinstance(text, str):
            raise ValueError(f"texts must be text, got {text!r:.60}")
        encoded = tokenizer(text, truncation=True, max_length=context)
        return {name: encoded[name] for name in names if name in encoded}

    return Reader(encode, lambda label: _number(label, model), DataCollatorWithPadding(tokenizer))


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
