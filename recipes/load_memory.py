"""Peak memory of compression on load, in a fresh process.

Compresses a model on load and compares the most memory that the process ever held (the system's figure, above what
Python and its imports take) with the promise: the size of the original's files and 1.3 times that of the compressed
ones. Exits 1 if the promise is broken. Writes what it prints to ``results/load_memory.txt``. Linux only.

    python recipes/load_memory.py FOLDER [--bits 4] [--structure auto]
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from memory import in_child

KEPT = Path(__file__).parent / "results" / "load_memory.txt"
FACTOR = 1.3

CHILD = """
import json, sys
from memory import Memory
from transformers import AutoModelForCausalLM
from hf_sqf import SQFConfig

folder, bits, structure, out = sys.argv[1:]
memory = Memory()
config = SQFConfig(bits=float(bits), structure=structure)
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
peak, after = memory.peak(), memory.held()
model.save_pretrained(out)
rate = model.config.quantization_config.coverage["bits"]
print(json.dumps({"base": memory.base, "peak": peak, "after": after, "bits": rate}))
"""


def weights_size(folder: Path) -> int:
    """Return the bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: Path, bits: float, structure: str) -> dict[str, float]:
    """Return bytes: base, peak and after, the latter two above base; original, compressed; and true bits."""
    with tempfile.TemporaryDirectory() as out:
        found = in_child(CHILD, str(folder), str(bits), structure, out)
        return {**found, "original": weights_size(folder), "compressed": weights_size(Path(out))}


def main() -> int:
    """Measure, print and keep the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a causal language model in safetensors, SmolLM2-135M for instance")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--structure", default="auto")
    args = parser.parse_args()
    found = measure(args.folder, args.bits, args.structure)
    allowed = found["original"] + FACTOR * found["compressed"]
    kept = found["peak"] < allowed
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    rows = [
        ("original files", found["original"]),
        (f"compressed file ({found['bits']:.3f} bits per weight)", found["compressed"]),
        ("interpreter and imports", found["base"]),
        ("peak above that while compressing on load", found["peak"]),
        ("held above that when it is done", found["after"]),
        (f"allowed peak: original + {FACTOR} x compressed", allowed),
    ]
    lines = [
        f"{args.folder.name}, bits={args.bits:g}, structure={args.structure}",
        f"{date.today()}, Python {platform.python_version()}, {packages}, {platform.machine()}",
        "",
        *(f"{name:<48}{size / 1e6:>10.1f} MB" for name, size in rows),
        "",
        "kept" if kept else "BROKEN",
    ]
    print("\n".join(lines))
    KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
