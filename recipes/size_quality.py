"""The picture at the top of the README: size against quality, from figures that other recipes kept.

    python recipes/size_quality.py

Left, calibrated: bits per weight of SmolLM2-135M's linear layers (``results/calibrated_lm.txt``). Right, without data
but where said: what the files of whole models take, and other tools (``results/peers.json``). Writes
``results/size_quality.svg``, which says in its description what it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from hf_sqf.report import plots
from hf_sqf.report.plots import Series

KEPT = Path(__file__).parent / "results"
CALIBRATED, PEERS, PICTURE = KEPT / "calibrated_lm.txt", KEPT / "peers.json", KEPT / "size_quality.svg"
_METHODS = {
    "hf_sqf": "hf_sqf, grid",
    "GPTQ": "GPTQ, groups of 64",
    "rounding": "round to nearest, groups of 64",
}
_OURS = "hf_sqf"
_LEFT_OUT = (
    "hf_sqf, 4 bits, all weights, bfloat16",  # but for norms the file that is there in float32
    "hf_sqf svd, 4 bits, linear layers",  # at the place of grid, where names would cover one another
    "hf_sqf vq, 4 bits, linear layers",
)


def calibrated(table: str) -> list[Series]:
    """Return bits per weight and KL on text of the calibration's kind, ours first.

    Args:
        table: what ``recipes/calibrated_lm.py`` printed.

    Raises:
        ValueError: a method is not in it.
    """
    found = []
    for name, method in _METHODS.items():
        lines = re.findall(rf"^{re.escape(method)} {{2,}}(.*)$", table, flags=re.MULTILINE)
        # bits, [file MB], same kind, other, seconds
        points = sorted((float(cells[0]), float(cells[-3])) for cells in map(str.split, lines))
        if not points:
            raise ValueError(f"there is no {method} in the table")
        bits, values = zip(*points, strict=True)
        found.append(Series(name, bits, values))
    return found


def without_data(record: dict[str, list[dict[str, float | str]]]) -> list[Series]:
    """Return megabytes and KL of ``results/peers.json``, ours first; without what is not smaller than the original."""
    dense = max(float(row["MB"]) for row in record["rows"])
    small = [row for row in record["rows"] if float(row["MB"]) < dense and row["side"] not in _LEFT_OUT]
    # A line joins what differs in size alone; other structures, and what was calibrated, are points of their own.
    line = [r for r in small if str(r["side"]).startswith(f"{_OURS}, ") and "calibrated" not in str(r["side"])]
    mine = sorted(line, key=lambda row: float(row["MB"]))
    labels = [str(row["side"]).removeprefix(f"{_OURS}, ") for row in mine]
    ours = Series("", [float(r["MB"]) for r in mine], [float(r["KL"]) for r in mine], [f"{_OURS}, {s}" for s in labels])
    others = [Series(str(r["side"]), [float(r["MB"])], [float(r["KL"])]) for r in small if r not in mine]
    return [ours, *others]


def source() -> str:
    """Return what the picture is drawn from: names and the beginnings of SHA-256 hashes."""
    hashes = (f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" for file in (CALIBRATED, PEERS))
    return "drawn by recipes/size_quality.py from " + ", ".join(hashes)


def main() -> None:
    """Draw the picture."""
    figure = plots.blank(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    plots.size_against_quality(
        calibrated(CALIBRATED.read_text("utf-8")), size="bits per weight of the linear layers", axes=left
    )
    plots.size_against_quality(without_data(json.loads(PEERS.read_text("utf-8"))), axes=right)
    left.set_title("SmolLM2-135M-Instruct, calibrated", fontsize="medium")
    right.set_title("SmolLM2-135M-Instruct, files, without data but where said", fontsize="medium")
    plots.save(figure, PICTURE, source())
    print(PICTURE, source(), sep="\n")


if __name__ == "__main__":
    main()
