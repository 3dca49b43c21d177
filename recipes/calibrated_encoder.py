"""Calibrated compression of a sentence encoder: size of the file against the cosine of its sentence embeddings.

    python recipes/calibrated_encoder.py --calibration TEXT --dev TEXT [--model sentence-transformers/all-MiniLM-L6-v2]

Texts hold a paragraph a line. Cosines are those of the mean-pooled embeddings of the original and of the compressed
model, on ``--dev`` and on Python's ``pydoc_data.topics``. Embeddings are compressed too, unless ``--linears`` leaves
them out. The table is kept in ``results/calibrated_encoder.txt``.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import torch
from equal_quality import saved_bits
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_sqf
from hf_sqf import SQFConfig, compress
from hf_sqf.compress.collect import measure
from hf_sqf.compress.statistics import Statistics
from hf_sqf.compress.targets import find_targets

KEPT = Path(__file__).parent / "results" / "calibrated_encoder.txt"


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Return mean-pooled embeddings, (texts, dim)."""
    found = []
    for at in range(0, len(texts), 16):
        some = list(texts[at : at + 16])
        inputs = tokenizer(some, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = inputs["attention_mask"][:, :, None]
        found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def paragraphs(text: str, count: int) -> list[str]:
    """Return ``count`` paragraphs of a text, evenly spread."""
    lines = [line.strip() for line in text.splitlines() if len(line) > 80]
    return lines[:: max(1, len(lines) // count)][:count]


def scales(statistics: Statistics) -> str:
    """Return the least, the median and the largest scale of a weight, and whose they are."""
    found = sorted((scale, name.removesuffix(".weight")) for name, scale in statistics.scales.items())
    return ", ".join(f"{scale:.2f} ({name})" for scale, name in (found[0], found[len(found) // 2], found[-1]))


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--calibration", type=Path, required=True, help="paragraphs to calibrate on")
    parser.add_argument("--dev", type=Path, required=True, help="paragraphs of the same kind to measure on")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 2.5, 3.0, 4.0])
    parser.add_argument(
        "--scalar",
        type=float,
        nargs="*",
        default=[2.0, 2.2, 2.6, 3.1, 3.6, 4.2],
        help="bits at which to compress without a trellis, too",
    )
    parser.add_argument("--structure", default="auto", help="grid alone takes less time")
    parser.add_argument(
        "--scalar-structure", default="auto", help="without a trellis; pgd is the grid with a dead zone"
    )
    parser.add_argument("--linears", action="store_true", help="leave the embeddings as they are")
    parser.add_argument("--one-pass", action="store_true", help="sequential=False, which takes less time")
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--statistics", type=Path, help="file to keep the statistics in, or to take them from")
    parser.add_argument("--keep", type=Path, default=KEPT)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model).eval()
    other = "\n".join(" ".join(p.split()) for text in topics.values() for p in text.split("\n\n"))
    texts = [paragraphs(args.dev.read_text("utf-8"), 256), paragraphs(other, 256)]
    before = [embed(model, tokenizer, some) for some in texts]

    started = time.monotonic()
    data: dict[str, object] = {
        "dataset": args.calibration.read_text("utf-8").splitlines(),
        "tokenizer": tokenizer,
        "samples": args.samples,
        "context": 256,
        "sequential": not args.one_pass,
    }
    config = SQFConfig(**data)
    if args.statistics is not None and args.statistics.exists():
        config = SQFConfig(statistics=args.statistics)
    statistics = measure(model, find_targets(model, config)[0], config)
    assert statistics is not None
    if args.statistics is not None and not args.statistics.exists():
        statistics.save(args.statistics)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numba"))
    packages = f"hf_sqf {hf_sqf.__version__}, {packages}"
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}: cosine to the original's mean-pooled embeddings; "
        f"{'linear layers of the blocks' if args.linears else 'all weights'}, "
        f"{'one pass' if args.one_pass else 'in sequence'}, structure {args.structure}, "
        f"scalar {args.scalar_structure}.",
        f"{len(texts[0])} held-out paragraphs of the calibration's kind, {len(texts[1])} of pydoc_data.topics.",
        f"Calibrated on {args.samples} paragraphs in {time.monotonic() - started:.0f} s. {date.today()}, "
        f"Python {platform.python_version()}, {packages}, {platform.machine()}",
        f"What errors do to held-out paragraphs, beside what the metric says of them: {scales(statistics)}.",
        "",
        f"{'bits=':>13}{'bits in file':>14}{'MB':>8}{'same kind':>11}{'lowest':>8}{'other':>8}{'lowest':>8}"
        f"{'time, s':>9}",
    ]
    print("\n".join(lines), flush=True)
    curves: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for bits, trellis in [(bits, True) for bits in args.bits] + [(bits, False) for bits in args.scalar]:
        started = time.monotonic()
        rounding = {"structure": args.structure} if trellis else {"structure": args.scalar_structure, "trellis": None}
        options = {"bits": bits, "statistics": statistics, "include_embeddings": not args.linears, **rounding}
        model = compress(AutoModel.from_pretrained(args.model).eval(), SQFConfig(**{**data, **options}))
        seconds = time.monotonic() - started
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        rate = model.config.quantization_config.coverage["bits"]
        label = f"{bits:g}" if trellis else f"scalar {bits:g}"
        row, errors = f"{label:>13}{rate:>14.3f}{size / 1e6:>8.2f}", []
        for kept, some, width in zip(before, texts, (11, 8), strict=True):
            cosine = nn.functional.cosine_similarity(kept, embed(model, tokenizer, some))
            errors.append(1.0 - float(cosine.mean()))
            row += f"{cosine.mean():>{width}.4f}{cosine.min():>8.4f}"
        curves[trellis].append((rate, errors[0], errors[1]))
        lines.append(f"{row}{seconds:>9.0f}")
        print(lines[-1], flush=True)
        args.keep.parent.mkdir(exist_ok=True)
        args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if curves[False]:
        lines += saved_bits(curves[False], curves[True])
    args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
