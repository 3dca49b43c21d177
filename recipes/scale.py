"""Time and memory of compressing checkpoints of growing size, data-free.

    python recipes/scale.py [--billions 0.1 0.3 1 3] [--bits 3] [--structure grid] [--trellis 64]

Makes a sharded Llama checkpoint of random bfloat16 weights for each size in a temporary folder, compresses it by
``compress_checkpoint`` in a fresh process, and deletes both. Memory is the most that the process ever held above its
imports, by the system's figures, pages of mapped files included. Writes ``results/scale.{txt,json,png}``. Linux only.

What 70 billion parameters would take is extrapolated by two straight lines. Time goes with the number of parameters:
every weight is read twice (once to learn what its bits cost, once to be solved), and the cost of both goes with its
entries; without data there are no matrices to be factorized, whose cost would grow faster. Memory goes with the largest
weight, not with the model: weights are solved side by side only as long as they are no larger together than the
largest, and results wait on disk. The largest of a model of that size is its table of embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from memory import in_child
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

KEPT = Path(__file__).parent / "results" / "scale"
SHARD = 1 << 30
WIDTHS = {0.1: (768, 12), 0.3: (1024, 22), 1.0: (2048, 20), 3.0: (3072, 26)}
"""Billions of parameters -> width and number of layers."""
VOCABULARY = 32000
FAR, FAR_LARGEST = 70e9, 128256 * 8192
"""Parameters of a model of 70 billion, and of the largest of its weights (Llama 3)."""
CHILD = """
import json, sys, time
from memory import Memory
from hf_sqf import SQFConfig, compress_checkpoint

source, target, options = sys.argv[1:]
memory = Memory()
began, used = time.perf_counter(), time.process_time()
compress_checkpoint(source, target, SQFConfig(**json.loads(options)))
took = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used}
print(json.dumps({"base": memory.base, "peak": memory.peak(), **took}))
"""


def make(folder: Path, billions: float) -> int:
    """Write a checkpoint of random weights, a shard at a time; return the number of its parameters."""
    width, layers = WIDTHS[billions]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes.items():
        norm = len(shape) == 1
        values = torch.ones(shape) if norm else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        shard[name] = values.bfloat16()
        if sum(2 * t.numel() for t in shard.values()) > SHARD:
            write()
    write()
    count = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def measure(billions: float, options: dict[str, object]) -> dict[str, float]:
    """Return parameters, bytes, seconds and bits of one size."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.mkdir()
        count = make(source, billions)
        found = in_child(CHILD, str(source), str(target), json.dumps(options))
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        width = WIDTHS[billions][0]
        largest = max(VOCABULARY * width, width * width * 8 // 3)
        return {"parameters": count, "largest": largest, "bits": 8 * size / count, **found}


def lines_through(rows: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return two straight lines (slope, intercept): seconds over parameters, bytes of memory over the largest weight.

    Errors are relative, so that small models weigh as much as large ones.
    """
    sizes, largest = (np.array([row[name] for row in rows]) for name in ("parameters", "largest"))
    seconds, peaks = (np.array([row[name] for row in rows]) for name in ("seconds", "peak"))
    return np.polyfit(sizes, seconds, 1, w=1 / seconds), np.polyfit(largest, peaks, 1, w=1 / peaks)


def far(rows: list[dict[str, float]]) -> str:
    """Return what the lines say of 70 billion parameters, and how far they lie from what was measured."""
    time_line, memory_line = lines_through(rows)
    off = [
        max(abs(np.polyval(line, row[over]) / row[name] - 1.0) for row in rows)
        for line, over, name in ((time_line, "parameters", "seconds"), (memory_line, "largest", "peak"))
    ]
    hours, memory = np.polyval(time_line, FAR) / 3600, np.polyval(memory_line, FAR_LARGEST) / 1e9
    return "\n".join([
        f"time: {1e9 * time_line[0]:.0f} ns a parameter and {time_line[1]:.0f} s, within {off[0]:.0%} of the measured",
        f"memory: {memory_line[0]:.1f} bytes an entry of the largest weight and {memory_line[1] / 1e6:.0f} MB, "
        f"within {off[1]:.0%}",
        f"on to 70 billion parameters, the largest weight of {FAR_LARGEST / 1e9:.2f} billion: {hours:.1f} hours and "
        f"{memory:.1f} GB here",
    ])  # fmt: skip


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Draw seconds over parameters, and memory over the largest weight, with the lines on to 70 billion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6))
    time_line, memory_line = lines_through(rows)
    for axes, over, name, scale, line, end in (
        (left, "parameters", "seconds", 1.0, time_line, FAR),
        (right, "largest", "peak", 1e9, memory_line, FAR_LARGEST),
    ):
        places = np.array([row[over] for row in rows])
        axes.loglog(places, [row[name] / scale for row in rows], "ko", label="measured")
        wide = np.geomspace(places[0], end, 64)
        axes.loglog(wide, np.polyval(line, wide) / scale, "k:", label="straight line, on to 70 billion")
        axes.grid(alpha=0.3)
    left.set(xlabel="parameters", ylabel="seconds")
    left.legend(frameon=False)
    right.set(xlabel="entries of the largest weight", ylabel="peak memory above imports, GB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, nargs="+", default=sorted(WIDTHS), choices=sorted(WIDTHS))
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--structure", default="grid")
    parser.add_argument("--trellis", type=int, default=64, help="states; 0 for scalar rounding")
    args = parser.parse_args()
    options = {"bits": args.bits, "structure": args.structure, "trellis": args.trellis or None}
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf-sqf", "torch", "transformers"))
    lines = [
        f"Random Llama checkpoints in bfloat16, {options}",
        f"{date.today()}, Python {platform.python_version()}, {packages}, {os.cpu_count()} cores, {platform.machine()}",
        "",
        f"{'parameters':>14}{'bits':>7}{'seconds':>9}{'processor s':>13}{'ns/parameter':>14}{'peak MB':>9}"
        f"{'bytes/parameter':>17}",
    ]
    print("\n".join(lines), flush=True)
    rows = []
    for billions in args.billions:
        began = time.perf_counter()
        row = measure(billions, options)
        rows.append(row)
        per = 1e9 * row["seconds"] / row["parameters"], row["peak"] / row["parameters"]
        lines.append(
            f"{row['parameters']:>14,}{row['bits']:>7.3f}{row['seconds']:>9.1f}{row['processor']:>13.1f}"
            f"{per[0]:>14.1f}{row['peak'] / 1e6:>9.0f}{per[1]:>17.3f}"
        )
        print(f"{lines[-1]}   ({time.perf_counter() - began:.0f} s in all)", flush=True)
    if len(rows) > 1:
        lines += ["", far(rows)]
        plot(rows, KEPT.with_suffix(".png"))
    print(lines[-1])
    KEPT.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    KEPT.with_suffix(".json").write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
