"""Where results may be written, and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_overwriting(out: Path, force: bool, source: str | Path | None = None) -> None:
    """Raise unless ``out`` may be written.

    Args:
        out: a folder to be written.
        force: it may be replaced, if there is a model in it.
        source: a folder that is read meanwhile; ``out`` must not hold it. A repository's id does no harm.

    Raises:
        FileExistsError: something stands there that must stay.
    """
    if out.is_file():
        raise FileExistsError(f"{out} is a file")
    if source is not None and Path(source).exists() and Path(source).resolve().is_relative_to(out.resolve()):
        raise FileExistsError(f"{out} cannot take the place of {source}, which is read for it")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} is not empty; --force replaces it")
    if not (out / "config.json").exists():
        raise FileExistsError(f"{out} holds no model (config.json), so that --force does not replace it")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a new folder beside ``out`` to write to, which takes its name at the end, or is removed after an error."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        for left in (part, old):
            if left.exists():
                shutil.rmtree(left)


def refuse_file(out: Path, suffix: str, force: bool) -> None:
    """Raise unless a file may be written to ``out``.

    Raises:
        ValueError: its name does not end as it should.
        FileExistsError: something stands there that must stay.
    """
    if out.suffix.lower() != suffix:
        raise ValueError(f"{out}: the name should end in {suffix}")
    if out.is_dir() or (out.exists() and not force):
        raise FileExistsError(f"{out} is a folder" if out.is_dir() else f"{out} exists; --force replaces it")
