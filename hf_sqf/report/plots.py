"""Pictures: size against quality, bits by layer, codes, singular values, training.

Each function returns a matplotlib Figure, which :func:`save` writes as PNG or SVG. All are drawn in black and greys;
series differ in their markers and lines and have their names beside them, so that nothing is lost in print. It takes
matplotlib: ``pip install 'hf-sqf[plot]'``.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..compress.threads import one_thread
from .accounts import bits_by_layer, code_shares
from .fidelity import HEADINGS
from .writing import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

FORMATS = (".png", ".svg")
SIZE = "size of the weight files (MB)"
_STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", "-"), ("P", "--"), ("X", ":"), ("*", "-."))
_PLACES = ((6, 4, "left"), (6, -10, "left"), (-6, 4, "right"), (-6, -10, "right"), (6, 14, "left"), (6, -20, "left"))
_CURVES = ("loss", "bits", "sparsity", "codes_changed")  # what SQFCallback and the Trainer log
_UNITS = {"bits": "bits per weight", "sparsity": "share of zeros", "codes_changed": "codes changed a step, share"}
_STOPS = 24  # along a line, that names should not cover
_LIGHT = 0.45  # share of the way from white to black up to which figures on it are black


@dataclass(frozen=True)
class Series:
    """Models that belong together, such as those of one tool.

    Attributes:
        name: stands at the series' last point; empty where the points' own labels say enough.
        sizes: in the unit of the axis.
        values: of quality, as many.
        labels: of the points, as many, or none.
    """

    name: str
    sizes: Sequence[float]
    values: Sequence[float]
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.values) or len(self.labels) not in (0, len(self.sizes)):
            counts = f"{len(self.sizes)} sizes, {len(self.values)} values, {len(self.labels)} labels"
            raise ValueError(
                f"series {self.name!r} needs as many sizes as values, and a label for each or none: {counts}"
            )


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


def save(figure: Figure, file: Path, description: str | None = None) -> None:
    """Write a figure; SVG keeps text as text, and is the same bytes every time.

    Args:
        figure: what one of the functions here returned.
        file: ``.png`` or ``.svg``.
        description: kept in the file's metadata.

    Raises:
        ValueError: the file is to be of another kind.
    """
    refuse_plot(file)
    import matplotlib

    svg = file.suffix.lower() == ".svg"
    metadata: dict[str, Any] = {"Date": None} if svg else {}
    if description is not None:
        metadata["Description"] = description
    with matplotlib.rc_context({"svg.hashsalt": "hf_sqf", "svg.fonttype": "none"}), whole(file) as part:
        figure.savefig(part, dpi=150, metadata=metadata)


def blank(width: float = 6.0, height: float = 4.0) -> Figure:
    """Return an empty figure, in inches, to draw several plots into: ``axes=blank(10, 4).subplots(1, 2)[0]``.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # measures text, and leaves alone what the caller's pyplot shows
    return figure


def models(rows: Sequence[dict[str, Any]], name: str = "") -> Series:
    """Return the series of models that were measured, by size.

    Args:
        rows: with ``model``, ``bytes`` and ``value``: what ``hf-sqf compare --json`` prints.
        name: of the series.
    """
    rows = sorted(rows, key=lambda row: int(row["bytes"]))
    labels = [Path(str(row["model"])).name for row in rows]
    return Series(name, [row["bytes"] / 1e6 for row in rows], [row["value"] for row in rows], labels)


def size_against_quality(
    series: Sequence[Series], metric: str = "kl", size: str = SIZE, axes: Axes | None = None
) -> Figure:
    """Draw the size of models against their fidelity, a line for each series.

    Args:
        series: ours and others'; all must have been measured in the same way.
        metric: "kl", in nats, on a logarithmic axis unless a value is 0, or "cosine".
        size: label of the axis of sizes, with its unit.
        axes: to draw into; by default those of a new figure.

    Raises:
        ValueError: the metric is unknown, or there is no series.
    """
    if metric not in HEADINGS["value"]:
        raise ValueError(f"metric must be {' or '.join(HEADINGS['value'])}, got {metric!r}")
    if not series:
        raise ValueError("there is no series to draw")
    axes = axes or _axes()
    kl = metric == "kl"
    if kl and min(value for one in series for value in one.values) > 0:
        axes.set_yscale("log")
    marks: list[tuple[float, float, str]] = []
    for number, one in enumerate(series):
        marker, line = _STYLES[number % len(_STYLES)]
        grey = "black" if number == 0 else "0.35"
        axes.plot(one.sizes, one.values, line, marker=marker, color=grey, fillstyle="full" if number == 0 else "none")
        marks += [(x, y, text) for x, y, text in zip(one.sizes, one.values, one.labels, strict=False) if text]
        if one.name:
            marks.append((one.sizes[-1], one.values[-1], one.name))
    axes.set_xlabel(size)
    axes.set_ylabel(f"{HEADINGS['value'][metric]}, {'less' if kl else 'more'} is better")
    axes.margins(x=0.2)  # room for names
    axes.grid(color="0.9")
    _label(axes, marks)
    return _figure_of(axes)


def layer_bits(rows: list[dict[str, Any]], axes: Axes | None = None) -> Figure:
    """Draw bits per weight as a map: layers down, their weights across; each field has its figure.

    Args:
        rows: ``size_report(folder).compressed_rows``; weights outside of layers are left to the table.
        axes: to draw into; by default those of a new figure.

    Raises:
        ValueError: no weight belongs to a layer.
    """
    found = bits_by_layer(rows)
    if not found.layers:
        raise ValueError("none of these weights belongs to a layer")
    axes = axes or _axes(1.5 + 0.9 * len(found.weights), 1.6 + 0.28 * len(found.layers))
    values = torch.tensor([[float("nan") if bits is None else bits for bits in line] for line in found.bits])
    low, high = found.range()
    floor, ceiling = low - 0.2, max(high, low + 0.2)
    axes.imshow(values.numpy(), cmap="Greys", vmin=floor, vmax=ceiling, aspect="auto")
    for y, line in enumerate(found.bits):
        for x, bits in enumerate(line):
            if bits is not None:
                ink = "black" if (bits - floor) / (ceiling - floor) < _LIGHT else "white"
                axes.text(x, y, f"{bits:.2f}", ha="center", va="center", color=ink, fontsize="x-small")
    axes.set_xticks(range(len(found.weights)), found.weights, rotation=30, ha="right", fontsize="small")
    axes.set_yticks(range(len(found.layers)), found.layers, fontsize="small")
    axes.set_title("bits per weight", fontsize="medium")
    return _figure_of(axes)


def code_histogram(counts: Counter[int], axes: Axes | None = None) -> Figure:
    """Draw how often each code occurs, in percent.

    Args:
        counts: from :func:`hf_sqf.report.accounts.code_counts`.
        axes: to draw into; by default those of a new figure.

    Raises:
        ValueError: there are no codes, since all weights are looked up in codebooks.
    """
    shares = code_shares(counts)
    if not shares:
        raise ValueError("there are no codes: all weights are looked up in codebooks")
    axes = axes or _axes()
    bars = axes.bar(
        [code for code, _ in shares], [100 * s for _, s in shares], color="0.8", edgecolor="black", hatch="//"
    )
    axes.bar_label(bars, fmt="%.1f", fontsize="x-small")
    axes.set_xlabel("code")
    axes.set_ylabel("% of all codes")
    return _figure_of(axes)


def singular_values(original: Tensor, kept: Tensor, name: str = "", axes: Axes | None = None) -> Figure:
    """Draw the singular values of a weight and of what compression kept of it.

    Args:
        original: the weight, (m, n); a convolution's as (out, everything else).
        kept: what it decodes to, of the same shape.
        name: of the weight, for the title.
        axes: to draw into; by default those of a new figure.

    Raises:
        ValueError: these are not two matrices of one shape, or one of them is not finite.
    """
    if original.dim() != 2 or original.shape != kept.shape:
        raise ValueError(f"two matrices of one shape are needed, got {tuple(original.shape)} and {tuple(kept.shape)}")
    pair = original.detach().float().cpu(), kept.detach().float().cpu()
    if not all(bool(torch.isfinite(weight).all()) for weight in pair):
        raise ValueError(f"{name or 'the weight'} or what was kept of it is not finite")
    axes = axes or _axes()
    with one_thread():
        spectra = [torch.linalg.svdvals(weight) for weight in pair]
    share = 1.0 - float((pair[0] - pair[1]).square().sum() / pair[0].square().sum())
    least = float(spectra[0][0]) * 1e-4  # what is smaller than this counts as nothing
    looks = {"original": ("-", "0.75", 4.0), "kept": ("--", "black", 1.2)}  # the one shows behind the other
    for values, (label, (line, grey, width)) in zip(spectra, looks.items(), strict=True):
        shown = values[values > least]
        axes.plot(range(1, len(shown) + 1), shown.tolist(), line, color=grey, linewidth=width, label=label)
    axes.legend(frameon=False)
    axes.set_yscale("log")
    axes.set_xlabel("number")
    axes.set_ylabel("singular value")
    axes.set_title(f"{name}{': ' if name else ''}{100 * share:.2f} % of the energy kept", fontsize="medium")
    axes.grid(color="0.9")
    return _figure_of(axes)


def training_curves(log_history: Sequence[dict[str, Any]]) -> Figure:
    """Draw what training logged against its steps: loss, and what :class:`hf_sqf.SQFCallback` adds to it.

    Args:
        log_history: ``trainer.state.log_history``.

    Raises:
        ValueError: nothing of it was logged.
    """
    found = {name: [(e["step"], e[name]) for e in log_history if name in e and "step" in e] for name in _CURVES}
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    shown = [name for name in _CURVES if found[name] or (name == "loss" and held_out)]
    if not shown:
        raise ValueError(f"the log has none of {', '.join(_CURVES)}: set logging_steps in TrainingArguments")
    figure = blank(3.6 * min(len(shown), 2), 2.6 * ((len(shown) + 1) // 2))
    grid = figure.subplots((len(shown) + 1) // 2, min(len(shown), 2), squeeze=False).ravel()
    for axes, name in zip(grid, shown, strict=False):
        if found[name]:
            axes.plot(*zip(*found[name], strict=True), "-", marker=".", color="black", label="training")
        if name == "loss" and held_out:
            axes.plot(*zip(*held_out, strict=True), "--", marker="s", color="0.35", fillstyle="none", label="held out")
            axes.legend(frameon=False)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(_UNITS.get(name, name))
        axes.grid(color="0.9")
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    return figure


def _axes(width: float = 6.0, height: float = 4.0) -> Axes:
    return blank(width, height).subplots()


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _label(axes: Axes, marks: list[tuple[float, float, str]]) -> None:
    """Write names beside points, each where it covers no line and no name that stands already, if it can be."""
    figure = _figure_of(axes)
    figure.draw_without_rendering()  # so that places are known
    drawn: list[Any] = []  # points of all lines, and of the way between them
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata())
        ways = np.linspace(ends[:-1], ends[1:], _STOPS)
        drawn += [*ends, *ways.reshape(-1, 2)]
    taken: list[Any] = []
    for x, y, text in marks:
        tried: list[tuple[int, int, Annotation, Any]] = []
        for order, (right, up, side) in enumerate(_PLACES):
            note = axes.annotate(
                text, (x, y), xytext=(right, up), textcoords="offset points", ha=side, fontsize="small"
            )
            box = note.get_window_extent()
            covered = 2 * sum(box.overlaps(other) for other in taken) + any(box.contains(*point) for point in drawn)
            outside = not axes.bbox.contains(box.x0, box.y0) or not axes.bbox.contains(box.x1, box.y1)
            tried.append((int(covered) + 3 * outside, order, note, box))
        best = min(tried, key=lambda one: one[:2])
        for one in tried:
            if one is not best:
                one[2].remove()
        taken.append(best[3])
