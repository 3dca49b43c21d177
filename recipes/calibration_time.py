"""How long calibrated compression takes, all told, and how much memory, for models of several sizes.

    python recipes/calibration_time.py --calibration TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--bits 2.5]

Sizes are the model's first blocks, so many, and all of them; each is loaded, calibrated, compressed and saved in a
process of its own, whose time counts from its first import on. Memory is the most that the process ever held, above
what it held when all was imported. Run it with nothing else running. Writes ``results/calibration_time.txt``.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from memory import in_child

KEPT = Path(__file__).parent / "results" / "calibration_time.txt"
CHILD = """
import time
started = time.monotonic()
import json, sys
from pathlib import Path
from memory import Memory
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_sqf import SQFConfig

model, text, bits, structure, out = sys.argv[1:]
memory, imported = Memory(), time.monotonic() - started
data = {"dataset": [Path(text).read_text("utf-8")], "tokenizer": AutoTokenizer.from_pretrained(model)}
config = SQFConfig(bits=float(bits), structure=structure, samples=32, context=512, **data)
small = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
small.save_pretrained(out)
rate = small.config.quantization_config.coverage["bits"]
print(json.dumps({"seconds": time.monotonic() - started, "imports": imported, "bits": rate,
                  "base": memory.base, "peak": memory.peak()}))
"""


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="*", default=[5, 15], help="smaller models, of the first blocks")
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--structure", default="grid")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # not before the children are, in their processes

    packages = ", ".join(f"{name} {version(name)}" for name in ("hf_sqf", "torch", "transformers", "numba"))
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}, structure {args.structure}, 32 sequences of 512 tokens and as many "
        "of the model's own",
        f"{date.today()}, {packages}, {platform.machine()} x {os.cpu_count()}, "
        f"load at the start {os.getloadavg()[0]:.1f}",
        "",
        f"{'blocks':>8}{'parameters, M':>15}{'bits':>8}{'seconds':>9}{'us a parameter':>16}{'peak, MB':>10}"
        f"{'dense, MB':>11}{'peak / dense':>14}",
    ]
    print("\n".join(lines), flush=True)
    for blocks in [*sorted(args.blocks), None]:
        with tempfile.TemporaryDirectory() as folder:
            source = f"{folder}/model"
            model = AutoModelForCausalLM.from_pretrained(args.model)
            if blocks is not None:
                model.model.layers = model.model.layers[:blocks]
                model.config.num_hidden_layers = blocks
            count, parameters = model.config.num_hidden_layers, model.num_parameters()
            model.save_pretrained(source)
            AutoTokenizer.from_pretrained(args.model).save_pretrained(source)
            del model
            time.sleep(5)
            found = in_child(CHILD, source, str(args.calibration), str(args.bits), args.structure, f"{folder}/out")
            dense = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
        lines.append(
            f"{count:>8}{parameters / 1e6:>15.1f}{found['bits']:>8.3f}{found['seconds']:>9.0f}"
            f"{1e6 * found['seconds'] / parameters:>16.2f}{found['peak'] / 1e6:>10.0f}{dense / 1e6:>11.0f}"
            f"{found['peak'] / dense:>14.2f}"
        )
        print(lines[-1], flush=True)
    lines.append(f"of each: imports {found['imports']:.0f} s, {found['base'] / 1e6:.0f} MB before loading, not in peak")
    print(lines[-1])
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
