"""Figures as tables and bars on a terminal, or as Markdown."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from transformers.utils import logging as transformers_logging

from ..report.accounts import facts, megabytes
from ..report.fidelity import HEADINGS
from ..runtime.sqf_size import SizeReport, Visit, size_report

_LAYER = re.compile(r"^(.*?\.\d+)\.")
_BAR = 24  # characters of the longest bar
_WIDE = 140  # columns where nobody says how many there are: in a pipe or a file


def silence() -> None:
    """Have the libraries print no bars and no warnings."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # huggingface_hub's, too


def console(quiet: bool = False) -> Console:
    """Return where tables go: standard output, or nowhere."""
    made = Console(quiet=quiet, highlight=False)
    return made if made.is_terminal else Console(quiet=quiet, highlight=False, width=_WIDE)


def inspected(folder: Path, visit: Visit | None = None) -> dict[str, Any]:
    """Return a compressed model's accounts, as ``size_report`` gives them, with its coverage and fidelity.

    Args:
        folder: of the model.
        visit: called with the factors of every weight.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        ValueError: a weight is damaged.
    """
    asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if asked.get("quant_method") != "sqf":
        raise ValueError(f"{folder} does not hold a model compressed by hf_sqf")
    figures: dict[str, Any] = json.loads(size_report(folder, visit).to_json())
    return {**figures, "coverage": asked.get("coverage"), "fidelity": asked.get("fidelity")}


def show_inspected(out: Console, folder: Path, figures: dict[str, Any], each_weight: bool = False) -> None:
    """Print what :func:`inspected` returned: sizes, structures, coverage, and bits per weight of each layer."""
    packed = SizeReport(figures["total_bytes"], figures["rows"]).compressed_rows
    out.print(f"[bold]{folder}[/bold]")
    for name, value in facts(figures):
        out.print(f"  {name}: {value}")
    table = Table("weight" if each_weight else "layer", *_right("parameters", "zeros", "bits per weight"), "")
    groups = [(row["name"], [row]) for row in packed] if each_weight else layers(packed)
    widths = {name: 8 * sum(r["bytes"] for r in rows) / sum(r["parameters"] for r in rows) for name, rows in groups}
    for name, rows in groups:
        count = sum(row["parameters"] for row in rows)
        zeros = sum(row["sparsity"] * row["parameters"] for row in rows) / count
        bar = ("#" if out.options.ascii_only else "█") * round(_BAR * widths[name] / max(widths.values()))
        table.add_row(name, f"{count:,}", f"{zeros:.1%}", f"{widths[name]:.3f}", bar)
    out.print(table)


def layers(rows: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Group rows by layer, which is what stands before and with the first number in a weight's name."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        match = _LAYER.match(row["name"])
        groups.setdefault(match[1] if match else row["name"], []).append(row)
    return sorted(
        groups.items(), key=lambda group: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", group[0])]
    )


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of what :func:`hf_sqf.cli.measuring.evaluate` measured."""
    known = [name for name in HEADINGS if any(name in row for row in rows)]
    head = ["model", "size", "bits per weight", *(HEADINGS[name][rows[0]["metric"]] for name in known), "measured on"]
    body = []
    for row in rows:
        figures = [_figure(name, row) for name in known]
        on = f"{row['name']}, {row['count']} {'predictions' if row['metric'] == 'kl' else 'inputs'}"
        on += f", context {row['context']}, {row['dtype']}"
        body.append([str(row["model"]), megabytes(row["bytes"]), f"{row['bits_per_weight']:.3f}", *figures, on])
    return head, body


def show_rows(out: Console, rows: list[dict[str, Any]]) -> None:
    """Print the table of an evaluation, one model a line."""
    head, body = cells(rows)
    table = Table(head[0], *_right(*head[1:-1]), head[-1])
    for line in body:
        table.add_row(*line)
    out.print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of an evaluation as Markdown."""
    head, body = cells(rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _figure(name: str, row: dict[str, Any]) -> str:
    if name not in row:
        return ""
    if name == "agreement" or name.endswith("word_error_rate"):
        return f"{row[name]:.1%}"
    return f"{row[name]:.4f}" if row["metric"] == "cosine" else f"{row[name]:.4g}"


def _right(*headings: str) -> list[Column]:
    return [Column(heading, justify="right") for heading in headings]
