"""Fine-tuning along a trellis: Viterbi's algorithm every few steps, or free codes and one pass of it at the end.

    python recipes/projections.py --calibration TEXT --dev TEXT [--model sentence-transformers/all-MiniLM-L6-v2]

The linear layers of a sentence encoder are compressed along a trellis, calibrated; then the same factors are trained
with the original as the teacher, for as many steps and on the same paragraphs, in several ways:

- scales alone;
- codes, too, projected onto paths of the machine by Viterbi's algorithm every so many steps;
- codes that may be any integers of the fine grid, and at the end the nearest paths that cost no more than at the start:
  the price of a bit is sought at which they do.

What is measured is 1 - cosine of mean-pooled embeddings to the original's, on held-out paragraphs of the same kind, and
bits in the file. Writes ``results/projections.txt``.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from calibrated_encoder import embed, paragraphs
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_sqf
from hf_sqf import SQFCallback, SQFConfig, compress, distillation_loss, size_report
from hf_sqf.compress.dependent import nearest_paths
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_factors import Factors, Term
from hf_sqf.runtime.sqf_model import compressed_modules
from hf_sqf.runtime.sqf_modules import SUFFIX, SQFModule
from hf_sqf.training.projecting import coded_bits

KEPT = Path(__file__).parent / "results" / "projections.txt"
_TRIALS = 12


def weights(model: PreTrainedModel) -> Iterator[tuple[SQFModule, str, Term]]:
    """Yield module, name and term of every weight, all of them of the structure grid."""
    for _, module in compressed_modules(model):
        for name in module.held:
            (factors,) = module.factors(name)
            (term,) = factors.terms
            yield module, name, term


def put(module: SQFModule, name: str, term: Term) -> None:
    """Replace a weight's term."""
    (before,) = module.factors(name)
    packed = pack([Factors(before.shape, before.structure, (term,))], module.held[name].name)
    setattr(module, name + SUFFIX, nn.Parameter(packed, requires_grad=False))


def nearest_within(term: Term, free: Term) -> Term:
    """Return a term whose codes lie near to those of ``free``, on paths, at no more bits than those of ``term``."""
    limit, low, high = coded_bits(term), 0.0, 4.0
    best = term
    for _ in range(_TRIALS):
        price = 0.5 * (low + high)
        codes = nearest_paths(free.codes.float(), term.codes, term.trellis, price)
        found = replace(free, codes=codes, trellis=term.trellis)
        if coded_bits(found) <= limit:
            best, high = found, price
        else:
            low = price
    return best


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[Any],
    collate: DataCollatorWithPadding,
    args: argparse.Namespace,
    **how: Any,
) -> float:
    """Train the factors; return seconds a step."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=args.steps, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
            per_device_train_batch_size=args.batch, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=collate,
            callbacks=[SQFCallback(**how, original=teacher)],
            compute_loss_func=distillation_loss(teacher),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        trainer.train()
        return (time.monotonic() - began) / args.steps


def main() -> None:
    """Compress, train in each way, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--calibration", type=Path, required=True, help="paragraphs to calibrate and train on")
    parser.add_argument("--dev", type=Path, required=True, help="paragraphs of the same kind to measure on")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModel.from_pretrained(args.model).eval()
    dev, lines = paragraphs(args.dev.read_text("utf-8"), 256), args.calibration.read_text("utf-8").splitlines()
    before = embed(teacher, tokenizer, dev)
    model = AutoModel.from_pretrained(args.model).eval()
    data = {"dataset": lines, "tokenizer": tokenizer, "samples": 384, "context": 256}
    compress(model, SQFConfig(bits=args.bits, structure="grid", include_embeddings=False, **data))
    rows = [dict(tokenizer(text, truncation=True, max_length=128)) for text in paragraphs("\n".join(lines), 4096)]
    collate = DataCollatorWithPadding(tokenizer)

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numba"))
    head = [
        f"{args.model.rstrip('/').split('/')[-1]}, linear layers, {args.bits:g} bits: {args.steps} steps of "
        f"{args.batch} paragraphs, learning rate {args.learning_rate:g}; 1 - cosine on {len(dev)} held-out paragraphs",
        f"{date.today()}, Python {platform.python_version()}, hf_sqf {hf_sqf.__version__}, {packages}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}",
        "",
        f"{'trained':<44}{'bits':>8}{'1 - cosine':>12}{'seconds a step':>16}",
    ]
    print("\n".join(head), flush=True)

    def note(way: str, model: PreTrainedModel, seconds: float) -> None:
        cosine = nn.functional.cosine_similarity(before, embed(model.eval(), tokenizer, dev)).mean()
        line = f"{way:<44}{size_report(model).bits_per_weight:>8.3f}{1.0 - float(cosine):>12.5f}{seconds:>16.2f}"
        print(line, flush=True)
        head.append(line)
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text("\n".join(head) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load: Callable[[], PreTrainedModel] = lambda: AutoModel.from_pretrained(folder)  # noqa: E731
        note("not", load(), 0.0)
        model = load()
        note("scales alone", model, train(model, teacher, rows, collate, args, mode="light"))
        for every in args.every:
            model = load()
            seconds = train(model, teacher, rows, collate, args, mode="latent", every=every)
            note(f"codes, on paths every {every} steps", model, seconds)
        model = load()
        started = {module.held[name].name: term for module, name, term in weights(model)}
        for module, name, term in list(weights(model)):
            put(module, name, replace(term, trellis=0))
        seconds = train(model, teacher, rows, collate, args, mode="latent")
        note("free codes, before the last pass", model, seconds)
        for module, name, free in list(weights(model)):
            kept = started[module.held[name].name]
            put(module, name, nearest_within(kept, free))
        note("free codes, after it", model, seconds)


if __name__ == "__main__":
    main()
