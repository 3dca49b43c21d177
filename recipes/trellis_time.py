"""What dependent quantization costs in time: compressing a calibrated model along a trellis and without, and decoding.

    python recipes/trellis_time.py --statistics FILE [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--bits 2.5]

All weights of the model are compressed in the metric of the statistics (``calibrated_lm.py --statistics`` keeps them),
with and without a trellis in turns; then all their bytes are decoded to codes, in turns as well. Medians, and of the
differences too. Run it with nothing else running. Writes ``results/trellis_time.txt``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sqf import SQFConfig, compress, set_runtime
from hf_sqf.compress.statistics import Statistics
from hf_sqf.runtime.sqf_model import compressed_modules

KEPT = Path(__file__).parent / "results" / "trellis_time.txt"


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds, and seconds of processor time, that something takes."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def decode(model: PreTrainedModel) -> None:
    """Decode the file's bytes of every compressed weight once."""
    for _, module in compressed_modules(model):
        for name in module.held:
            module.factors(name)


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decodings", type=int, default=9)
    args = parser.parse_args()
    known = Statistics.load(args.statistics)
    sides: dict[str, int | None] = {"scalar": None, f"{args.states} states": args.states}
    models: dict[str, PreTrainedModel] = {}
    took: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for repeat in range(args.repeats + 1):
        for side, states in sides.items():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model)
            config = SQFConfig(bits=args.bits, structure="grid", trellis=states, statistics=known)
            one = timed(lambda model=model, config=config: compress(model, config))  # type: ignore[misc]
            set_runtime(model, "stream")  # holds nothing but the bytes of the file
            models[side] = model
            if repeat:  # the first one compiles
                took[side].append(one)
            print(f"{side}: {one[0]:.1f} s", flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf_sqf", "torch", "numba"))
    parameters = next(iter(models.values())).config.quantization_config.coverage["compressed"]
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}, all {parameters / 1e6:.1f} M weights, grid, {args.bits:g} bits, "
        "calibrated, one pass",
        f"{date.today()}, {packages}, {platform.machine()} x {os.cpu_count()}, {torch.get_num_threads()} threads, "
        f"medians of {args.repeats} and of {args.decodings}",
        "",
        f"{'':<12}{'compressing, s':>16}{'processor, s':>14}{'decoding, s':>13}{'processor, s':>14}",
    ]
    decoded: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for repeat in range(args.decodings + 1):
        for side, model in models.items():
            one = timed(lambda model=model: decode(model))  # type: ignore[misc]
            if repeat:
                decoded[side].append(one)
    for side in sides:
        row = [statistics.median(values) for runs in (took[side], decoded[side]) for values in zip(*runs, strict=True)]
        lines.append(f"{side:<12}{row[0]:>16.1f}{row[1]:>14.1f}{row[2]:>13.3f}{row[3]:>14.3f}")
    scalar, along = sides
    added = [b[0] - a[0] for a, b in zip(took[scalar], took[along], strict=True)]
    speed = [a[0] / b[0] for a, b in zip(decoded[scalar], decoded[along], strict=True)]
    lines.append(
        f"a trellis adds {statistics.median(added):.1f} s to compressing, and decodes at "
        f"{statistics.median(speed):.2f} of the speed of scalar codes"
    )
    print("\n".join(lines))
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
