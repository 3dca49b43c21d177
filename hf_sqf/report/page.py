"""One HTML page about a compressed model: where its bytes go, and what its codes look like.

The page is one file without scripts, fonts or pictures from elsewhere: it can be mailed, kept beside the model, and
printed. Shades always come with their figures, so that it reads in black and white.
"""

from __future__ import annotations

import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..runtime.sqf_container import records
from ..runtime.sqf_modules import SUFFIX
from ..runtime.sqf_size import SizeReport

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<name>.*)$")
_LARGEST = 8  # codes further from zero share a bar
_DARK = 0.55  # share of black from which figures are white
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #111 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd } th:first-child, td:first-child
{ text-align: left } .map td { border: 1px solid #fff; text-align: center } .bar { background: #444; height: 1em }
.bars td { border: 0 } .wide { overflow-x: auto }
"""


def code_counts(folder: Path) -> Counter[int]:
    """Return how often each code of the factors occurs in a compressed model; indices of codebooks do not count.

    Args:
        folder: with the safetensors.

    Raises:
        ValueError: a weight is damaged; names it.
    """
    counts: Counter[int] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if not name.endswith(SUFFIX):
                    continue
                for record in records(tensors.get_tensor(name), name):
                    for term in record.factors().terms:
                        if not term.one_hot:
                            values, found = term.codes.unique(return_counts=True)
                            counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
    return counts


def page(name: str, figures: dict[str, Any], counts: Counter[int]) -> str:
    """Return the page.

    Args:
        name: of the model, its heading.
        figures: what :func:`hf_sqf.cli.showing.inspected` says of the model.
        counts: of the codes, from :func:`code_counts`.
    """
    packed = SizeReport(figures["total_bytes"], figures["rows"]).compressed_rows
    title = escape(name)
    parts = [
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>",
        _facts(figures, packed),
        "<h2>Bits per weight, layer by layer</h2>",
        _heat_map(packed),
        "<h2>How often each code occurs</h2>",
        _histogram(counts),
        "<h2>All weights</h2>",
        _weights(packed),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _facts(figures: dict[str, Any], packed: list[dict[str, Any]]) -> str:
    coverage, fidelity = figures["coverage"] or {}, figures["fidelity"]
    total = figures["total_bytes"]
    facts = [("files", f"{total / 1e6:,.1f} MB"), ("bits per weight", f"{figures['bits_per_weight']:.3f}")]
    if coverage.get("parameters"):
        count = coverage["parameters"]
        facts.append(("parameters", f"{count:,}, of which {100 * coverage['compressed'] / count:.2f} % compressed"))
        facts.append(
            ("in 16 bits they would take", f"{2 * count / 1e6:,.1f} MB, {2 * count / total:.1f} times as much")
        )
    structures = Counter(row["structure"] for row in packed)
    facts.append(("structures", ", ".join(f"{k}: {v} weights" for k, v in sorted(structures.items()))))
    if fidelity:
        kind = "KL to the original, nats" if fidelity["metric"] == "kl" else "mean cosine to the original"
        facts.append((kind, f"{fidelity['value']:.4g}, on {fidelity['name']}"))
    facts += [("left as it is", f"{k}: {v}") for k, v in (coverage.get("dense") or {}).items()]
    rows = "".join(f"<tr><th>{escape(k)}</th><td style='text-align:left'>{escape(v)}</td></tr>" for k, v in facts)
    return f"<table>{rows}</table>"


def _heat_map(packed: list[dict[str, Any]]) -> str:
    """A line for each layer, a column for each weight that layers have; weights outside of layers have lines below."""
    layers: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    others = []
    for row in packed:
        match = _LAYER.match(row["name"])
        if match:
            layers.setdefault((match["stack"], int(match["index"])), {})[match["name"]] = row
        else:
            others.append(row)
    columns = list(dict.fromkeys(name for weights in layers.values() for name in weights))
    rates = [row["bits_per_weight"] for row in packed] or [0.0]
    low, high = min(rates), max(rates)

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "<td></td>"
        shade = 0.08 + 0.8 * (row["bits_per_weight"] - low) / (high - low) if high > low else 0.08
        grey, ink = round(255 * (1 - shade)), "#fff" if shade > _DARK else "#000"
        return f"<td style='background:rgb({grey},{grey},{grey});color:{ink}'>{row['bits_per_weight']:.2f}</td>"

    head = "".join(f"<th>{escape(name.removesuffix('.weight'))}</th>" for name in columns)
    lines = [f"<tr><th>layer</th>{head}</tr>"] if layers else []
    for (stack, index), weights in sorted(layers.items()):
        cells = "".join(cell(weights.get(name)) for name in columns)
        lines.append(f"<tr><th>{escape(stack)}.{index}</th>{cells}</tr>")
    for row in others:
        lines.append(f"<tr><th>{escape(row['name'])}</th>{cell(row)}</tr>")
    return f"<div class='wide'><table class='map'>{''.join(lines)}</table></div>"


def _histogram(counts: Counter[int]) -> str:
    total = sum(counts.values())
    if not total:
        return "<p>There are no codes: all weights are looked up in codebooks.</p>"
    bars: Counter[int] = Counter()
    for code, count in counts.items():
        bars[max(-_LARGEST, min(_LARGEST, code))] += count
    most, lines = max(bars.values()), []
    for code in range(min(bars), max(bars) + 1):
        label = {-_LARGEST: f"≤ {-_LARGEST}", _LARGEST: f"≥ {_LARGEST}"}.get(code, str(code))
        width = 30 * bars[code] / most
        lines.append(
            f"<tr><td>{label}</td><td>{100 * bars[code] / total:.2f} %</td>"
            f"<td><div class='bar' style='width:{width:.2f}em'></div></td></tr>"
        )
    return f"<table class='bars'>{''.join(lines)}</table>"


def _weights(packed: list[dict[str, Any]]) -> str:
    head = (
        "<tr><th>weight</th><th>structure</th><th>shape</th><th>zeros</th><th>bytes</th><th>bits per weight</th></tr>"
    )
    lines = [
        f"<tr><td>{escape(row['name'])}</td><td>{escape(row['structure'])}</td>"
        f"<td>{' x '.join(map(str, row['shape']))}</td><td>{row['sparsity']:.1%}</td><td>{row['bytes']:,}</td>"
        f"<td>{row['bits_per_weight']:.3f}</td></tr>"
        for row in packed
    ]
    return f"<div class='wide'><table>{head}{''.join(lines)}</table></div>"
