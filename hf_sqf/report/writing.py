"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a path beside a file, of the same suffix, to write to: it takes the file's name, or is gone after an error.

    Folders that are missing are made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{os.getpid()}.part.{file.name}")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def whole_file(file: Path, text: str) -> None:
    """Write a text, in UTF-8."""
    with whole(file) as part:
        part.write_text(text, encoding="utf-8")
