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

from ..hub.card import megabytes
from ..report.fidelity import HEADINGS
from ..runtime.sqf_size import SizeReport, size_report

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


def inspected(folder: Path) -> dict[str, Any]:
    """Return a compressed model's accounts, as ``size_report`` gives them, with its coverage and fidelity.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        ValueError: a weight is damaged.
    """
    asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if asked.get("quant_method") != "sqf":
        raise ValueError(f"{folder} does not hold a model compressed by hf_sqf")
    figures: dict[str, Any] = json.loads(size_report(folder).to_json())
    return {**figures, "coverage": asked.get("coverage"), "fidelity": asked.get("fidelity")}


def show_inspected(out: Console, folder: Path, figures: dict[str, Any], each_weight: bool = False) -> None:
    """Print what :func:`inspected` returned: sizes, structures, coverage, and bits per weight of each layer."""
    report = SizeReport(figures["total_bytes"], figures["rows"])
    packed = report.compressed_rows
    out.print(f"[bold]{folder}[/bold]: {megabytes(report.total_bytes)}, {report.bits_per_weight:.3f} bits per weight")
    for structure in sorted({row["structure"] for row in packed}):
        rows = [row for row in packed if row["structure"] == structure]
        out.print(f"  {structure}: {len(rows)} weights, {megabytes(sum(row['bytes'] for row in rows))}")
    dense = [row for row in report.rows if row["structure"] == "dense"]
    out.print(f"  dense: {len(dense)} tensors, {megabytes(sum(row['bytes'] for row in dense))}")
    coverage = figures["coverage"] or {}
    if coverage.get("parameters"):
        share = 100 * coverage["compressed"] / coverage["parameters"]
        out.print(f"  compressed: {share:.2f} % of {coverage['parameters']:,} parameters")
    for name, reason in (coverage.get("dense") or {}).items():
        out.print(f"  left as it is: {name} ({reason})")
    if figures["fidelity"]:
        found = figures["fidelity"]
        out.print(f"  {HEADINGS['value'][found['metric']]} to the original: {found['value']:.4g}, on {found['name']}")
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
    if name == "agreement":
        return f"{row[name]:.1%}"
    return f"{row[name]:.4f}" if row["metric"] == "cosine" else f"{row[name]:.4g}"


def _right(*headings: str) -> list[Column]:
    return [Column(heading, justify="right") for heading in headings]
