"""One HTML page about a compressed model: where its bytes go, and what its codes look like.

The page is one file without scripts, fonts or pictures from elsewhere: it can be mailed, kept beside the model, and
printed. Shades always come with their figures, so that it reads in black and white.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from ..runtime.sqf_size import SizeReport
from .accounts import bits_by_layer, code_shares, facts

_DARK = 0.55  # share of black from which figures are white
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #111 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd } th:first-child, td:first-child
{ text-align: left } .map td { border: 1px solid #fff; text-align: center } .bar { background: #444; height: 1em }
.bars td { border: 0 } .wide { overflow-x: auto }
"""


def page(name: str, figures: dict[str, Any], counts: Counter[int]) -> str:
    """Return the page.

    Args:
        name: of the model, its heading.
        figures: what :func:`hf_sqf.cli.showing.inspected` says of the model.
        counts: of the codes, from :func:`hf_sqf.report.accounts.code_counts`.
    """
    packed = SizeReport(figures["total_bytes"], figures["rows"]).compressed_rows
    title = escape(name)
    parts = [
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>",
        _facts(figures),
        "<h2>Bits per weight, layer by layer</h2>",
        _heat_map(packed),
        "<h2>How often each code occurs</h2>",
        _histogram(counts),
        "<h2>All weights</h2>",
        _weights(packed),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _facts(figures: dict[str, Any]) -> str:
    rows = (f"<tr><th>{escape(k)}</th><td style='text-align:left'>{escape(v)}</td></tr>" for k, v in facts(figures))
    return f"<table>{''.join(rows)}</table>"


def _heat_map(packed: list[dict[str, Any]]) -> str:
    """A line for each layer, a column for each weight that layers have; weights outside of layers have lines below."""
    found = bits_by_layer(packed)
    low, high = found.range()

    def cell(bits: float | None) -> str:
        if bits is None:
            return "<td></td>"
        shade = 0.08 + 0.8 * (bits - low) / (high - low) if high > low else 0.08
        grey, ink = round(255 * (1 - shade)), "#fff" if shade > _DARK else "#000"
        return f"<td style='background:rgb({grey},{grey},{grey});color:{ink}'>{bits:.2f}</td>"

    # Where a line is too wide for a screen or for paper, names break after a dot.
    head = "".join(f"<th>{escape(name).replace('.', '.<wbr>')}</th>" for name in found.weights)
    lines = [f"<tr><th>layer</th>{head}</tr>"] if found.layers else []
    for layer, rates in zip(found.layers, found.bits, strict=True):
        lines.append(f"<tr><th>{escape(layer)}</th>{''.join(map(cell, rates))}</tr>")
    lines += [f"<tr><th>{escape(name)}</th>{cell(bits)}</tr>" for name, bits in found.others]
    return f"<div class='wide'><table class='map'>{''.join(lines)}</table></div>"


def _histogram(counts: Counter[int]) -> str:
    shares = code_shares(counts)
    if not shares:
        return "<p>There are no codes: all weights are looked up in codebooks.</p>"
    most = max(share for _, share in shares)
    lines = [
        f"<tr><td>{code}</td><td>{100 * share:.2f} %</td>"
        f"<td><div class='bar' style='width:{30 * share / most:.2f}em'></div></td></tr>"
        for code, share in shares
    ]
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
