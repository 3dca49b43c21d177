"""Speed and memory of running a compressed model, beside the dense one, in one run.

Three tables, of medians; all sides take turns within a repetition, so that what else the machine does meets them
alike, and ratios are medians of the ratios within a repetition:

- decoding: greedy generation of 64 tokens at batch 1, in tokens per second, of wall-clock and of processor time;
- products: a linear layer for 1 to 512 rows of input. Layers take turns with copies of themselves that together
  outgrow the processor's caches, as a model's layers do;
- memory: what a fresh process holds more once the model is loaded and has run, by the system's figures; for weights:
  less what the dense model's process holds beside its weights.

Writes ``results/speed.txt`` and ``results/speed.json``, or ``speed_models`` without single layers, or files of another
name (``--name``, for another machine). Linux only.

    python recipes/speed.py FOLDER [--bits 3 4] [--threads 1 2] [--repeats 7]

FOLDER is an ordinary checkpoint of a causal language model; it is compressed first, data-free, everything in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_sqf import Factors, SQFConfig, set_runtime
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_factors import Term
from hf_sqf.runtime.sqf_modules import SQFModule, compress_module, weights_of

KEPT = Path(__file__).parent / "results"
TOKENS = 64
BATCHES = (1, 2, 3, 4, 6, 8, 12, 15, 16, 17, 19, 24, 32, 35, 48, 53, 64, 84, 128, 256, 273, 305, 512)
"""Rows of inputs: powers of two, and such as leave some over beside whole vectors."""
SHAPES = ((4096, 4096), (576, 576), (192, 576), (1536, 576), (576, 1536))
"""A large layer, and those of a small model."""
BEYOND_CACHES = 64 << 20
"""Bytes of dense copies that take turns."""


def load(folder: Path, dtype: torch.dtype, runtime: str | None = None) -> PreTrainedModel:
    """Return a model; compressed ones are told how to run."""
    options = {} if runtime is None else {"quantization_config": SQFConfig(runtime=runtime)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that only the runtime of the config counts
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def take_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor) seconds of each call, ``repeats`` of them, the sides one after another."""
    for call in sides.values():
        call()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            wall, used = time.perf_counter(), time.process_time()
            call()
            found[name].append((time.perf_counter() - wall, time.process_time() - used))
    return found


def ratios(found: dict[str, list[tuple[float, float]]], base: str, side: str) -> tuple[float, float]:
    """Return how many times as fast as ``base`` a side is, by wall clock and by processor time."""
    pairs = list(zip(found[base], found[side], strict=True))
    return median(b[0] / s[0] for b, s in pairs), median(b[1] / s[1] for b, s in pairs)


def generate(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> None:  # noqa: ANN401 (a mixin's method)
    """Generate text."""
    model.generate(ids, **options)


def decoding(dense: Path, small: Path, repeats: int) -> list[dict[str, Any]]:
    """Measure greedy generation at batch 1."""
    models = {"dense float32": load(dense, torch.float32), "dense bfloat16": load(dense, torch.bfloat16)}
    models["auto float32"] = load(small, torch.float32, "auto")
    models["auto bfloat16"] = load(small, torch.bfloat16, "auto")
    models["int8 float32"] = load(small, torch.float32, "int8")
    ids = torch.arange(100, 116)[None]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    found = take_turns({name: partial(generate, model, ids, options) for name, model in models.items()}, repeats)
    rows = []
    for name in models:
        row: dict[str, Any] = {"side": name, "tokens/s": TOKENS / median(wall for wall, _ in found[name])}
        row["tokens/processor s"] = TOKENS / median(used for _, used in found[name])
        for base in ("dense float32", "dense bfloat16"):
            row[f"x {base}"], row[f"x {base}, processor"] = ratios(found, base, name)
        rows.append(row)
    return rows


def compressed_linear(m: int, n: int, spread: float, seed: int) -> nn.Linear:
    """Return a linear layer of random codes whose standard deviation is ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(m, n, generator=generator) * spread).round().clamp(-127, 127).to(torch.int8)
    steps, rows = (torch.randint(-9, 9, (k,), generator=generator, dtype=torch.int32) for k in (n, m))
    layer = nn.Linear(n, m, bias=False)
    packed = pack([Factors((m, n), "grid", (Term(codes, -24000, steps, rows),))])
    held = weights_of(layer, "")["weight"]
    compress_module(layer, {"weight": (held, nn.Parameter(packed, requires_grad=False))}, torch.float32)
    return layer


def products(repeats: int) -> list[dict[str, Any]]:
    """Measure linear layers for many numbers of rows."""
    rows = []
    for m, n in SHAPES:
        copies = max(2, math.ceil(BEYOND_CACHES / (4 * m * n)))
        distinct = [compressed_linear(m, n, 1.5, seed) for seed in range(2)]
        layers: dict[str, list[nn.Linear]] = {"dense": [], "int4": [], "int8": []}
        for i in range(copies):
            plain = nn.Linear(n, m, bias=False)
            source = distinct[i % 2]
            assert isinstance(source, SQFModule)
            plain.weight = nn.Parameter(source.dense(), requires_grad=False)
            layers["dense"].append(plain)
            for runtime in ("int4", "int8"):
                again = compressed_linear(m, n, 1.5, i % 2)
                set_runtime(again, runtime)
                layers[runtime].append(again)
        for batch in BATCHES:
            x = torch.randn(batch, n)
            turns = max(1, (1 << 27) // (copies * m * n * max(batch, 8)))

            def calls(chosen: list[nn.Linear], x: torch.Tensor = x, turns: int = turns) -> Callable[[], None]:
                def run() -> None:
                    for _ in range(turns):
                        for layer in chosen:
                            layer(x)

                return run

            found = take_turns({name: calls(chosen) for name, chosen in layers.items()}, repeats)
            row: dict[str, Any] = {"layer": f"{m} x {n}", "rows": batch}
            row["dense us"] = 1e6 * median(wall for wall, _ in found["dense"]) / turns / copies
            for runtime in ("int4", "int8"):
                row[f"x {runtime}"], row[f"x {runtime}, processor"] = ratios(found, "dense", runtime)
            rows.append(row)
    return rows


MEMORY = """
import json, sys, time, warnings
import torch, transformers
from transformers import AutoModelForCausalLM
import hf_sqf
warnings.simplefilter("ignore")
folder, runtime = sys.argv[1:]

def held():
    with open("/proc/self/smaps_rollup") as lines:
        fields = dict(line.split(":") for line in lines if ":" in line and line.split(":")[1].strip().endswith("kB"))
    return 1024 * int(fields["Pss"].split()[0])

tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1))
if runtime != "none":
    hf_sqf.compress(tiny, hf_sqf.SQFConfig(bits=6.0, structure="grid", runtime=runtime, trellis=None))
tiny.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=4, min_new_tokens=4)  # what needs memory but once
del tiny
before = held()
start = time.perf_counter()
options = {} if runtime == "none" else {"quantization_config": hf_sqf.SQFConfig(runtime=runtime)}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
loaded = time.perf_counter() - start
model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=4, min_new_tokens=4)
ran = time.perf_counter() - start  # codes are decoded, and what is mapped is read, when a model first runs
weights = [p for n, p in model.named_parameters() if runtime == "none" or n.endswith("_factors")]
kept = sum(p.numel() * p.element_size() for p in weights)
print(json.dumps({"held": held() - before, "load": loaded, "ran": ran, "bytes": kept}))
"""


def memory(dense: Path, small: Path, repeats: int = 7) -> list[dict[str, Any]]:
    """Measure what fresh processes hold, and how long they load.

    What a process holds beside its weights differs by some megabytes from one to the next: hence medians of several.
    """
    coverage = json.loads((small / "config.json").read_text())["quantization_config"]["coverage"]
    sides = {"dense": (dense, "none"), **{name: (small, name) for name in ("int8", "int4", "stream")}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (folder, runtime) in sides.items():
            command = [sys.executable, "-c", MEMORY, str(folder), runtime]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    file = sum(f.stat().st_size for f in small.glob("*.safetensors"))
    weights = coverage["compressed"]
    rows = []
    beside = median(run["held"] - run["bytes"] for run in found["dense"])  # modules, code, what a forward leaves
    for name, runs in found.items():
        held = median(run["held"] for run in runs)
        row = {"runtime": name, "held MB": held / 1e6, "for weights MB": (held - beside) / 1e6}
        row["bytes a weight"] = (held - beside) / weights
        row["x the file"] = (held - beside) / file
        row["bytes a weight, by their sizes"] = runs[0]["bytes"] / weights
        row["load s"] = median(run["load"] for run in runs)
        row["x dense load"] = median(r["load"] / d["load"] for r, d in zip(runs, found["dense"], strict=True))
        row["load and 4 tokens s"] = median(run["ran"] for run in runs)
        row["x dense, load and 4 tokens"] = median(
            r["ran"] / d["ran"] for r, d in zip(runs, found["dense"], strict=True)
        )
        rows.append(row)
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Return rows as a table of text."""
    cells = [list(rows[0])] + [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([title, *lines, ""])


def measure(part: str, dense: Path, small: Path | None, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Run one part with a number of threads in a process of its own."""
    command = [sys.executable, __file__, str(dense), "--part", part, "--repeats", str(repeats)]
    command += [] if small is None else ["--small", str(small)]
    done = subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """Return the processor's name, and which of its instructions matter here."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has = set(fields.get("flags", "").split()) & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"}
    return ", ".join([fields.get("model name", platform.machine()), *sorted(has)])


def main() -> None:
    """Measure everything, print it and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-products", action="store_true", help="leave single layers out, which take longest")
    parser.add_argument("--name", help="of the results")
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["decoding", "products"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.part:
        torch.set_num_threads(options.threads[0])
        with torch.inference_mode():
            run = options.part == "products"
            rows = products(options.repeats) if run else decoding(options.folder, options.small, options.repeats)
        print(json.dumps(rows))
        return
    text = [
        f"{options.folder.name}, {date.today()}, {platform.machine()} x {os.cpu_count()} ({processor()}), "
        f"load {os.getloadavg()[0]:.1f}, torch {version('torch')}, transformers {version('transformers')}\n"
    ]
    kept: dict[str, Any] = {"model": options.folder.name}

    def keep(title: str, rows: list[dict[str, Any]]) -> None:
        kept[title] = rows
        text.append(table(title, rows))

    for threads in [] if options.no_products else options.threads:
        keep(f"Linear layers, threads: {threads}", measure("products", options.folder, None, options.repeats, threads))
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder)
            config = SQFConfig(bits=bits, structure="grid", runtime="stream", trellis=None)
            model = AutoModelForCausalLM.from_pretrained(
                options.folder, dtype=torch.float32, quantization_config=config
            )
            model.save_pretrained(small)
            del model
            for threads in options.threads:
                rows = measure("decoding", options.folder, small, options.repeats, threads)
                keep(f"Greedy decoding of {TOKENS} tokens at {bits:g} bits, threads: {threads}", rows)
            keep(f"Fresh processes after loading and running at {bits:g} bits", memory(options.folder, small))
    print("\n".join(text))
    KEPT.mkdir(exist_ok=True)
    name = options.name or ("speed_models" if options.no_products else "speed")
    (KEPT / f"{name}.txt").write_text("\n".join(text))
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
