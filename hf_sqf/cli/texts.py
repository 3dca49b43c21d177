"""Texts to calibrate and measure on, and the lines of ``.jsonl``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..compress.calibration_data import SELF, spread

_SUFFIXES = (".txt", ".md", ".jsonl", ".json")


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each entry of a ``.jsonl`` file, after where it stands.

    Raises:
        ValueError: a line holds no columns with their values.
    """
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: must be JSON, got {line:.60}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: must be columns with their values, got {line:.60}")
        yield where, entry


def read_texts(file: Path) -> list[str]:
    """Return the texts of a file: one a line, or of ``.jsonl`` the field ``text`` of every line.

    Raises:
        ValueError: there are none, or a line of ``.jsonl`` has no text.
    """
    if file.suffix == ".jsonl":
        lines = [_text_of(entry, where) for where, entry in json_lines(file)]
    else:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no text")
    return lines


def _text_of(entry: dict[str, Any], where: str) -> str:
    text = entry.get("text")
    if not isinstance(text, str):
        raise ValueError(f'{where}: must have a "text", got {json.dumps(entry):.60}')
    return text


def calibration_texts(dataset: str) -> list[str] | str:
    """Return what ``SQFConfig(dataset=)`` takes for a file of texts, ``"self"`` or the id of a data set on the Hub.

    Raises:
        FileNotFoundError: a file is named and is not there.
        ImportError: the id of a data set is given, and the package that loads it is missing.
    """
    file = Path(dataset)
    if dataset == SELF:
        return dataset
    if file.is_file():
        return read_texts(file)
    refuse_missing(dataset)
    return dataset


def refuse_missing(dataset: str) -> None:
    """Raise unless ``dataset`` is a file, or the id of a data set that can be loaded from the Hub.

    Raises:
        FileNotFoundError: a file is named and is not there.
        ImportError: the package that loads data sets is missing.
    """
    file = Path(dataset)
    if file.is_file():
        return
    if file.suffix in _SUFFIXES or file.is_absolute() or dataset.startswith("."):
        raise FileNotFoundError(f"there is no file {dataset}")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"{dataset} is no file here, and to load data sets of the Hub takes pip install 'hf-sqf[data]'"
        )


def hub_entries(dataset: str, split: str) -> Iterator[dict[str, Any]]:
    """Iterate over the entries of a data set on the Hub, loaded as they are needed.

    Raises:
        FileNotFoundError, ImportError: see :func:`refuse_missing`.
    """
    refuse_missing(dataset)
    import datasets

    return iter(datasets.load_dataset(dataset, split=split, streaming=True))


def held_out_texts(dataset: str, split: str, samples: int | None) -> list[str]:
    """Return texts to measure on: of a file ``samples`` evenly spread ones, of a data set on the Hub the first ones.

    Raises:
        ValueError: there are none, or an entry has no text.
        FileNotFoundError, ImportError: see :func:`refuse_missing`.
    """
    if Path(dataset).is_file():
        texts = read_texts(Path(dataset))
        return texts if samples is None else spread(texts, samples)
    entries = islice(hub_entries(dataset, split), samples)
    found = [_text_of(entry, f"{dataset}, entry {number}") for number, entry in enumerate(entries, 1)]
    if not found:
        raise ValueError(f"{dataset} holds no text")
    return found
