"""Size against quality, as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .showing import COLUMNS

FORMATS = (".png", ".svg")


def refuse_plot(file: Path) -> None:
    """Raise unless a picture can be drawn into ``file``.

    Raises:
        ValueError: it is to be of another kind than PNG or SVG.
        ImportError: matplotlib is missing.
    """
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"{file}: pictures are written as {' or '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a picture takes matplotlib: pip install 'hf-sqf[plot]'")


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the size of models (MB) against KL divergence or cosine.

    Args:
        rows: what :func:`hf_sqf.cli.measuring.evaluate` returned.
        file: ``.png`` or ``.svg``.
    """
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: int(row["bytes"]))
    sizes, values = [row["bytes"] / 1e6 for row in rows], [row["value"] for row in rows]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(sizes, values, "o-")
    for row, size, value in zip(rows, sizes, values, strict=True):
        name = Path(str(row["model"])).name
        axes.annotate(name, (size, value), xytext=(4, 4), textcoords="offset points", fontsize="small")
    kl = rows[0]["metric"] == "kl"
    if kl and min(values) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("size of the weight files (MB)")
    axes.set_ylabel(f"{COLUMNS['value'][rows[0]['metric']]}, {'less' if kl else 'more'} is better")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
