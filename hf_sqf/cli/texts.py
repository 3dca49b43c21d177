"""Texts to calibrate and measure on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from ..compress.calibration_data import SELF

_SUFFIXES = (".txt", ".md", ".jsonl", ".json")


def read_texts(file: Path) -> list[str]:
    """Return the texts of a file: one a line, or of ``.jsonl`` the field ``text`` of every line.

    Raises:
        ValueError: there are none, or a line of ``.jsonl`` has no text.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix == ".jsonl":
        lines = [_text_of(line, f"{file}, text {number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise ValueError(f"{file} holds no text")
    return lines


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{where}: must be JSON with a "text", got {line:.60}') from error
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" must be text, got {text!r:.60}')
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
    if file.suffix in _SUFFIXES or file.is_absolute() or dataset.startswith("."):
        raise FileNotFoundError(f"there is no file {dataset}")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"{dataset} is no file here, and to load data sets of the Hub takes pip install 'hf-sqf[data]'"
        )
    return dataset
