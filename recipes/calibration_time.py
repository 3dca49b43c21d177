"""How long calibrated compression takes, all told, and how much memory: from a checkpoint and a text to a saved model.

    python recipes/calibration_time.py --calibration TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--bits 2.5]

Everything counts from the first import on. Run it with nothing else running. Writes ``results/calibration_time.txt``.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import argparse  # noqa: E402 (imports are timed)
import os  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402
from datetime import date  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hf_sqf import SQFConfig  # noqa: E402

KEPT = Path(__file__).parent / "results" / "calibration_time.txt"


def peak() -> float:
    """Return the largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--structure", default="grid")
    args = parser.parse_args()
    load, imports, imported = os.getloadavg()[0], peak(), time.monotonic() - STARTED
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.calibration.read_text("utf-8")
    config = SQFConfig(
        bits=args.bits, structure=args.structure, dataset=[text], tokenizer=tokenizer, samples=32, context=512
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    total = time.monotonic() - STARTED
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf_sqf", "torch", "transformers", "numba"))
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}, {args.structure}, asked for {args.bits:g} bits, "
        f"has {model.config.quantization_config.coverage['bits']:.3f}; 32 sequences of 512 tokens",
        f"{date.today()}, {packages}, {platform.machine()} x {os.cpu_count()}, load at the start {load:.1f}",
        f"imports {imported:.0f} s, all told {total:.0f} s",
        f"peak resident memory {peak():.0f} MB, of which imports {imports:.0f} MB",
    ]
    print("\n".join(lines))
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
