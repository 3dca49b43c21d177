"""Time and memory of compressing checkpoints of growing size, data-free.

    python recipes/scale.py [--billions 0.1 0.3 1 3] [--bits 3] [--structure grid] [--trellis 64]

Makes a sharded Llama checkpoint of random bfloat16 weights for each size in a temporary folder, compresses it by
``compress_checkpoint`` in a fresh process, and deletes both. Memory is the most that the process ever held above its
imports, by the system's figures, pages of mapped files included. Writes ``results/scale.{txt,json,png}``, with a
straight line through the sizes extrapolated to 70 billion. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

KEPT = Path(__file__).parent / "results" / "scale"
SHARD = 1 << 30
WIDTHS = {0.1: (768, 12), 0.3: (1024, 22), 1.0: (2048, 20), 3.0: (3072, 26)}
"""Billions of parameters -> width and number of layers."""
CHILD = """
import json, sys, time
import hf_sqf, torch, transformers
from hf_sqf import SQFConfig, compress_checkpoint

def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

source, target, options = sys.argv[1:]
torch.ones(64, 64) @ torch.ones(64, 64)  # wakes the pools of threads
transformers.models.llama.modeling_llama  # imported lazily
base = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is counted from here
began, used = time.perf_counter(), time.process_time()
compress_checkpoint(source, target, SQFConfig(**json.loads(options)))
took = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used}
print(json.dumps({"base": base, "peak": status("VmHWM") - base, **took}))
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
        vocab_size=32000,
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
        command = [sys.executable, "-c", CHILD, str(source), str(target), json.dumps(options)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        return {"parameters": count, "bits": 8 * size / count, **found}


def plot(rows: list[dict[str, float]], line: np.ndarray, path: Path) -> None:
    """Draw seconds and memory against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6))
    sizes = [row["parameters"] for row in rows]
    wide = np.array([sizes[0], 70e9])
    left.loglog(sizes, [row["seconds"] for row in rows], "ko", label="measured")
    left.loglog(wide, np.polyval(line, wide), "k:", label="straight line")
    left.set(xlabel="parameters", ylabel="seconds")
    left.legend(frameon=False)
    right.semilogx(sizes, [row["peak"] / 1e6 for row in rows], "ko-")
    right.set(xlabel="parameters", ylabel="peak memory above imports, MB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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
        sizes = np.array([row["parameters"] for row in rows])
        line = np.polyfit(sizes, [row["seconds"] for row in rows], 1, w=1 / sizes)
        memory = np.polyfit(sizes, [row["peak"] for row in rows], 1, w=1 / sizes)
        hours, peak = np.polyval(line, 70e9) / 3600, np.polyval(memory, 70e9)
        lines += ["", f"A straight line says {hours:.1f} hours and {peak / 1e9:.1f} GB for 70 billion parameters here."]
        plot(rows, line, KEPT.with_suffix(".png"))
    print("\n".join(lines[-2:]))
    KEPT.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    KEPT.with_suffix(".json").write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
