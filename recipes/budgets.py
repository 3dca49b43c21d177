"""Is the number of bits met, and the size of the file? Five values of each, on a real model.

    python recipes/budgets.py [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--calibration TEXT]

Compresses the whole model, embeddings included, to ``bits`` and to ``target_size``, saves it, and compares what the
files take with what was asked for: never more, and at most 0.5 % less. Exits 1 where that is not so. The table is kept
in ``results/budgets.txt``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sqf import SQFConfig, compress
from hf_sqf.compress.budget import TOLERANCE
from hf_sqf.compress.collect import measure
from hf_sqf.compress.targets import find_targets

KEPT = Path(__file__).parent / "results" / "budgets.txt"
BITS = (1.5, 2.3, 3.5, 5.5, 8.0)


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on; without, no data is used")
    parser.add_argument("--statistics", type=Path, help="calibration statistics measured before, in place of a text")
    parser.add_argument("--trellis", type=int, default=8, help="states; few take less time")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    data = [args.calibration.read_text("utf-8")] if args.calibration else None
    config = SQFConfig(dataset=data, tokenizer=tokenizer, statistics=args.statistics)
    statistics = measure(model, find_targets(model, config)[0], config)
    parameters = model.num_parameters()
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf_sqf", "torch", "transformers"))
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}, {parameters / 1e6:.1f} M parameters, structure grid, "
        f"trellis {args.trellis}, {'calibrated' if statistics else 'without data'}, embeddings included",
        f"{date.today()}, {packages}",
        "",
        f"{'asked':>12}{'file, bytes':>13}{'bits':>9}{'below':>9}",
    ]
    print("\n".join(lines), flush=True)
    missed = 0
    sizes = [round(bits * parameters / 8e6 + 1.0) for bits in BITS]  # a megabyte for what stays dense
    for name, wanted in [("bits", bits) for bits in BITS] + [("target_size", size * 10**6) for size in sizes]:
        asked = SQFConfig(
            statistics=statistics, structure="grid", trellis=args.trellis, sequential=False, **{name: wanted}
        )
        small = compress(AutoModelForCausalLM.from_pretrained(args.model).eval(), asked)
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        bits = small.config.quantization_config.coverage["bits"]
        below = 1.0 - (bits if name == "bits" else size) / wanted
        missed += not -1e-9 <= below <= TOLERANCE
        lines.append(f"{wanted:>12}{size:>13}{bits:>9.4f}{100 * below:>8.3f}%")
        print(lines[-1], flush=True)
    lines.append("all met" if not missed else f"{missed} missed")
    KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
