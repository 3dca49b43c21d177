"""What the codec makes of real codes: bytes against entropy and other coders, and the speed of decoding.

    python recipes/codec_benchmark.py --model SmolLM2-135M=FOLDER --model all-MiniLM-L6-v2=FOLDER [--nncodec PYTHON]

The codes are the weights of a folder of safetensors, rounded to multiples of ``c`` times their root mean square with
c = 1, 1/2, 1/4: about 2, 3 and 4 bits. Sizes count everything that decoding needs; the ideal length is what the chosen
models give, with the scales of rows and columns, but without lanes and headers; the conditional entropy is that of the
codes in the same contexts by their own frequencies, without the scales. ``--nncodec`` names a Python
interpreter in which the package nncodec is installed; its entropy coder takes the same arrays. Writes
results/codec_benchmark.json and .txt.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import safe_open

from hf_sqf.runtime.sqf_codec import contexts_of, decode_integers, encode_integers, ideal_bits
from hf_sqf.runtime.sqf_models import LARGEST

STEPS = (1.0, 0.5, 0.25)
KEPT = Path(__file__).parent / "results"
LAYER = re.compile(r"layers?\.2\.")
BIG = re.compile(r"layers?\.2\..*(up_proj|q_proj|intermediate.dense|self.query)\.weight")
CONTEXT_EDGES = (0.3, 0.8, 1.5, 2.5)  # of a neighbour's magnitude in units of what its class expects


def weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the float32 values (m, n) of every weight of two dimensions."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if len(tensors.get_slice(name).get_shape()) == 2:
                    yield name, tensors.get_tensor(name).float().numpy()


def rounded(weight: np.ndarray, step: float) -> np.ndarray:
    """Return the int8 codes of plain rounding."""
    codes = np.rint(weight / (step * np.sqrt(np.square(weight, dtype=np.float64).mean())))
    return codes.astype(np.int8 if np.abs(codes).max() < 128 else np.int16)


def entropy(counts: np.ndarray) -> float:
    """Return the bits of symbols counted (..., symbols), each context by its own frequencies."""
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return float(-(counts * np.log2(np.where(share > 0, share, 1.0))).sum())


def huffman(counts: np.ndarray) -> int:
    """Return the bits of the best prefix code, without its table."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


def conditional(codes: np.ndarray, index: np.ndarray, contexts: int) -> float:
    """Return the empirical entropy of the codes given their contexts, in bits."""
    lowest = int(codes.min())
    width = int(codes.max()) - lowest + 1
    counts = np.bincount((index * width + (codes.astype(np.int64) - lowest)).reshape(-1), minlength=contexts * width)
    return entropy(counts.reshape(contexts, width))


def sizes(codes: np.ndarray) -> dict[str, float]:
    """Return the bits of one array under each coder."""
    contexts = contexts_of(codes)
    index = contexts.class_index().reshape(codes.shape)
    counts = np.bincount(codes.astype(np.int64).reshape(-1) - int(codes.min()))
    return {
        "weights": codes.size,
        "sqf": 8.0 * len(encode_integers(codes)),
        "its ideal length": ideal_bits(codes),
        "conditional entropy": conditional(codes, index, contexts.classes),
        "entropy": entropy(counts),
        "huffman": huffman(counts),
        "zstd -19": 8.0 * len(zstandard.ZstdCompressor(level=19).compress(codes.tobytes())),
    }


def neighbours(codes: np.ndarray) -> dict[str, float]:
    """Return by how much (a fraction) a neighbour's magnitude as a further context lowers the empirical entropy."""
    contexts = contexts_of(codes)
    classes, index = contexts.classes, contexts.class_index().reshape(codes.shape)
    expected = np.maximum(contexts.table[0] @ np.abs(np.arange(-128, 128)) / 4096, 0.05)[index]
    size = np.minimum(np.abs(codes.astype(np.int64)), LARGEST)
    above, left = np.zeros(codes.shape), np.zeros(codes.shape)
    above[1:] = size[:-1]
    left[:, 2:] = (size[:, 1:-1] + size[:, :-2]) / 2
    before = conditional(codes, index, classes)
    found = {}
    for name, value in (("above", above), ("two to the left", left)):
        further = np.digitize(value / expected, CONTEXT_EDGES)
        found[name] = 1.0 - conditional(codes, further * classes + index, classes * (len(CONTEXT_EDGES) + 1)) / before
    return found


def rate(work: Callable[[], Any], count: int, seconds: float = 2.0) -> float:
    """Return ``count`` a second of this process's time on the processor: what a busy core does."""
    work()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return count / best


def speeds(codes: np.ndarray) -> dict[str, float]:
    """Return millions of symbols a second, on one thread."""
    torch.set_num_threads(1)
    data, raw = encode_integers(codes), codes.tobytes()
    small = zstandard.ZstdCompressor(level=19).compress(raw)
    found = {
        "memcpy": rate(lambda: [codes.copy() for _ in range(64)], 64 * codes.size),  # one is below the clock's tick
        "zstd -19": rate(lambda: zstandard.ZstdDecompressor().decompress(small), codes.size),
        "encode, numba": rate(lambda: encode_integers(codes), codes.size),
    }
    for backend in ("numba", "numpy", "torch"):
        found[backend] = rate(lambda b=backend: decode_integers(data, codes.shape, backend=b), codes.size)  # type: ignore[misc]
    return {name: round(value / 1e6, 1) for name, value in found.items()}


def load(folder: Path, step: float) -> dict[str, float]:
    """Return the seconds in which all weights of a model decode, on all cores."""
    coded = [(codes.shape, encode_integers(codes)) for codes in (rounded(w, step) for _, w in weights(folder))]
    torch.set_num_threads(os.cpu_count() or 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start, busy = time.perf_counter(), time.process_time()
        decoded = sum(pool.map(lambda item: decode_integers(item[1], item[0]).size, coded))
        wall, busy = time.perf_counter() - start, time.process_time() - busy
    return {"weights": decoded, "seconds": round(wall, 2), "seconds of processor": round(busy, 2)}


def nncodec(python: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Return the bytes that NNCodec's entropy coder takes for each of some arrays."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "codes.npz"
        np.savez(file, **arrays)  # type: ignore[arg-type]
        script = Path(__file__).with_name("codec_nncodec.py")
        done = subprocess.run([python, str(script), str(file)], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def all_sizes(folder: Path, step: float, python: str | None) -> dict[str, float]:
    """Return bits a weight under each coder, over all weights of a model."""
    total: Counter[str] = Counter()
    for name, weight in weights(folder):
        codes = rounded(weight, step)
        total.update(sizes(codes))
        if python:
            total["nncodec"] += 8 * nncodec(python, {name: codes})[name]
    count = total.pop("weights")
    row = {key: round(value / count, 4) for key, value in total.items()}
    row["above conditional entropy"] = round(total["sqf"] / total["conditional entropy"] - 1, 4)
    return row


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--nncodec", metavar="PYTHON")
    options = parser.parse_args()
    models = {name: Path(folder) for name, folder in (item.split("=", 1) for item in options.model)}
    packages = ", ".join(f"{p} {version(p)}" for p in ("numpy", "torch", "numba", "zstandard"))
    result: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}",
    }
    lines = [f"{result['date']}, {result['machine']}"]

    def keep(title: str, rows: dict[str, dict[str, float]]) -> None:
        result[title] = rows
        lines.append(f"\n{title}")
        for name, row in rows.items():
            lines.append(f"  {name}: " + ", ".join(f"{key} {value:.5g}" for key, value in row.items()))
        print("\n".join(lines[-len(rows) - 1 :]), flush=True)
        KEPT.mkdir(exist_ok=True)
        (KEPT / "codec_benchmark.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (KEPT / "codec_benchmark.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    for name, folder in models.items():
        some = {title: rounded(w, 0.5) for title, w in weights(folder) if LAYER.search(title)}
        keep(
            f"{name}: millions of symbols a second of a busy core",
            {
                f"{title}, step {step}": speeds(rounded(weight, step))
                for title, weight in weights(folder)
                if BIG.search(title)
                for step in STEPS
            },
        )
        keep(f"{name}: decoding all weights, numba, all cores", {f"step {s}": load(folder, s) for s in STEPS})
        keep(
            f"{name}: what a neighbour's magnitude as a further context would save at most (fraction)",
            {title: neighbours(codes) for title, codes in some.items()},
        )
        keep(
            f"{name}: bits a weight, over all weights of two dimensions",
            {f"step {s}": all_sizes(folder, s, options.nncodec) for s in STEPS},
        )


if __name__ == "__main__":
    main()
