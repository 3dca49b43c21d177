"""What the command line, the page and the plots show of a model: facts, bits by layer, how often each code occurs."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.sqf_factors import Factors
from ..runtime.sqf_size import SizeReport, size_report
from .fidelity import HEADINGS

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.(?P<name>.*)$")
_LARGEST = 8  # codes further from zero are counted together


class BitsByLayer(NamedTuple):
    """Bits per weight as a table: a line for each layer, a column for each weight that layers have.

    Attributes:
        layers: names of the lines, in the layers' order.
        weights: names of the columns.
        bits: (layers, weights); None where a layer has no such weight.
        others: (name, bits) of weights that stand outside of layers.
    """

    layers: list[str]
    weights: list[str]
    bits: list[list[float | None]]
    others: list[tuple[str, float]]

    def range(self) -> tuple[float, float]:
        """Return the least and the largest of all; zeros where there are none."""
        known = [bits for line in self.bits for bits in line if bits is not None] + [bits for _, bits in self.others]
        return (min(known), max(known)) if known else (0.0, 0.0)


def bits_by_layer(rows: list[dict[str, Any]]) -> BitsByLayer:
    """Arrange the rates of weights.

    Args:
        rows: of the compressed weights, as :class:`hf_sqf.runtime.sqf_size.SizeReport` has them.
    """
    layers: dict[tuple[str, int], dict[str, float]] = {}
    others = []
    for row in rows:
        match = _LAYER.match(row["name"])
        if match:
            name = match["name"].removesuffix(".weight")
            layers.setdefault((match["stack"], int(match["index"])), {})[name] = row["bits_per_weight"]
        else:
            others.append((row["name"].removesuffix(".weight"), row["bits_per_weight"]))
    weights = list(dict.fromkeys(name for found in layers.values() for name in found))
    ordered = sorted(layers.items())
    bits = [[found.get(name) for name in weights] for _, found in ordered]
    return BitsByLayer([f"{stack}.{index}" for (stack, index), _ in ordered], weights, bits, others)


def facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what there is to say of a model as a whole, as names and values.

    Args:
        figures: ``size_report(folder).to_json()``, read, with ``coverage`` and ``fidelity`` of the model's config.
    """
    report, coverage = SizeReport(figures["total_bytes"], figures["rows"]), figures["coverage"] or {}
    found = [("files", megabytes(report.total_bytes)), ("bits per weight", f"{report.bits_per_weight:.3f}")]
    groups: dict[str, list[int]] = {}
    for row in report.rows:
        groups.setdefault(row["structure"], []).append(row["bytes"])
    groups.pop("file headers", None)
    dense = groups.pop("dense", [])
    found += [(name, f"{len(sizes)} weights, {megabytes(sum(sizes))}") for name, sizes in sorted(groups.items())]
    found.append(("dense", f"{len(dense)} tensors, {megabytes(sum(dense))}"))
    if count := coverage.get("parameters"):
        found.append(("compressed", f"{100 * coverage['compressed'] / count:.2f} % of {count:,} parameters"))
        times = 2 * count / report.total_bytes
        found.append(("in 16 bits", f"{megabytes(2 * count)}, {times:.1f} times as much"))
    if fidelity := figures["fidelity"]:
        heading = f"{HEADINGS['value'][fidelity['metric']]} to the original"
        found.append((heading, f"{fidelity['value']:.4g}, on {fidelity['name']}"))
    return found + [("left as it is", f"{name} ({reason})") for name, reason in (coverage.get("dense") or {}).items()]


def megabytes(size: int) -> str:
    """Return a size in bytes as text, in units of 10^6 or 10^9."""
    return f"{size / 1e6:,.2f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def code_counts(folder: Path) -> Counter[int]:
    """Return how often each code of the factors occurs in a compressed model; indices of codebooks do not count.

    Args:
        folder: with the safetensors.

    Raises:
        ValueError: a weight is damaged; names it.
    """
    counts: Counter[int] = Counter()
    size_report(folder, partial(count_codes, counts))
    return counts


def count_codes(counts: Counter[int], factors: Factors) -> None:
    """Add the codes of a weight to ``counts``."""
    for term in factors.terms:
        if not term.one_hot:
            values, found = term.codes.unique(return_counts=True)
            counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))


def code_shares(counts: Counter[int]) -> list[tuple[str, float]]:
    """Return (code, share of all in [0, 1]) in the codes' order; those far from zero are taken together.

    There is nothing in it where there are no codes.
    """
    total = sum(counts.values())
    together: Counter[int] = Counter()
    for code, count in counts.items():
        together[max(-_LARGEST, min(_LARGEST, code))] += count
    if not total:
        return []
    ends = {-_LARGEST: f"≤ {-_LARGEST}", _LARGEST: f"≥ {_LARGEST}"}
    return [(ends.get(c, str(c)), together[c] / total) for c in range(min(together), max(together) + 1)]
