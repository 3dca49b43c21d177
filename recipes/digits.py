"""Handwritten digits: small vision models, compressed by several structures and fine-tuned with labels.

    python recipes/digits.py [--models resnet vit] [--structures grid pgd svd vq] [--bits 4 2 1] [--seeds 3]

Models of transformers are trained from random weights on scikit-learn's digits (1,797 pictures of 8 x 8 pixels, here
16 x 16), compressed without data, and fine-tuned with labels: codes, dictionaries, scales and all that is not
compressed, for the same number of steps and with the same options whatever the structure. Codes are scalar; first
layers have 4 bits, as is usual at low rates (at 1, one structure or another leaves nothing of them). The original is
where the latents of codes start. Accuracy is that on 497 pictures that nothing was trained on: one picture is 0.2
points. Every seed trains a dense model of its own; shown are the mean over seeds, the least and the most. Writes
``results/digits.txt``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import hf_sqf
from hf_sqf import SQFCallback, SQFConfig, compress, size_report

KEPT = Path(__file__).parent / "results" / "digits.txt"
PACKAGES = ("torch", "transformers", "scikit-learn", "numba")
RATE = 2e-3
"""Learning rate of everything but codes."""
CODES = 5.0
"""How much faster codes move."""
FIRST = {"embed": {"bits": 4.0}}
"""Convolution, patches and positions that see the picture."""
_TRAINED_ON = 1300
_KIND: dict[str, Any] = {"num_channels": 1, "num_labels": 10}
_RESNET = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic", **_KIND)
_VIT = ViTConfig(
    image_size=16, patch_size=4, hidden_size=64, num_hidden_layers=4,
    num_attention_heads=4, intermediate_size=128, **_KIND,
)  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "resnet": lambda: ResNetForImageClassification(_RESNET),
    "vit": lambda: ViTForImageClassification(_VIT),
}
Pictures = list[dict[str, Any]]


def pictures() -> tuple[Pictures, Pictures]:
    """Return the pictures (1, 16, 16), of mean 0 and variance 1, with their labels: to train on, and to measure on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None]
    pixels = torch.nn.functional.interpolate(pixels, size=16, mode="bilinear")
    pixels = (pixels - pixels.mean()) / pixels.std()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"pixel_values": pixels[i], "labels": int(found.target[i])} for i in order]
    return rows[:_TRAINED_ON], rows[_TRAINED_ON:]


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Pictures) -> float:
    """Return the share of pictures whose label a model gives."""
    model.eval()
    logits: Tensor = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    return float((logits.argmax(-1) == torch.tensor([row["labels"] for row in rows])).float().mean())


def trained(name: str, rows: Pictures, steps: int, seed: int) -> PreTrainedModel:
    """Return a dense model, trained from random weights."""
    set_seed(seed)
    model = MODELS[name]()
    train(model, rows, steps, RATE)
    return model


def train(model: PreTrainedModel, rows: Pictures, steps: int, rate: float, callback: SQFCallback | None = None) -> None:
    """Train a model with labels, in place; its factors if there is a callback."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=steps // 20, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        callbacks: list[TrainerCallback] = [] if callback is None else [callback]
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def row(name: str, structure: str, bits: float, size: float, *accuracies: list[float]) -> str:
    """Return a line of the table: size in kB, accuracies by seed."""
    found = [f"{sum(some) / len(some):.3f} ({min(some):.3f} to {max(some):.3f})" for some in accuracies]
    return f"{name:<8}{structure:<11}{bits:>7.4g}{size:>9.1f}  {'  '.join(found)}"


def arguments(given: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--structures", nargs="+", default=["grid", "pgd", "svd", "vq"])
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0, 2.0, 1.0])
    parser.add_argument("--steps", type=int, default=600, help="of training the dense model")
    parser.add_argument("--tuning", type=int, default=100, help="steps of fine-tuning a compressed one")
    parser.add_argument("--seeds", type=int, default=3, help="dense models of each kind")
    parser.add_argument("--keep", type=Path, default=KEPT)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Train, compress, fine-tune, measure; write the table."""
    args = arguments(given)
    began = time.monotonic()
    trained_on, held_out = pictures()
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    made = f"{date.today()}, Python {platform.python_version()}, hf_sqf {hf_sqf.__version__}, {packages}"
    lines = [
        "scikit-learn's digits: accuracy on pictures that nothing was trained on, of models compressed without data,",
        f"before and after {args.tuning} steps of 64 pictures with labels: mean of {args.seeds} seeds (least to most)",
        f"{made}, {platform.machine()}",
        "",
        f"{'model':<8}{'structure':<11}{'bits':>7}{'kB':>9}  {'compressed':<22}{'fine-tuned'}".rstrip(),
    ]
    print("\n".join(lines), flush=True)
    for name in args.models:
        dense = [trained(name, trained_on, args.steps, seed) for seed in range(args.seeds)]
        size = 4e-3 * dense[0].num_parameters()
        found = [row(name, "dense", 32.0, size, [accuracy(model, held_out) for model in dense])]
        print(found[0], flush=True)
        for bits in args.bits:
            for structure in args.structures:
                config = SQFConfig(bits=bits, structure=structure, trellis=None, overrides=FIRST)
                before, after, reports = [], [], []
                for original in dense:
                    small = compress(copy.deepcopy(original), config)
                    before.append(accuracy(small, held_out))
                    callback = SQFCallback("latent", code_rate=CODES, original=original)
                    train(small, trained_on, args.tuning, RATE, callback)
                    after.append(accuracy(small, held_out))
                    reports.append(size_report(small))
                largest = max(reports, key=lambda report: report.total_bytes)
                found.append(row(name, structure, largest.bits_per_weight, largest.total_bytes / 1e3, before, after))
                print(found[-1], flush=True)
        lines += found
    print(f"{time.monotonic() - began:.0f} s")
    args.keep.parent.mkdir(exist_ok=True, parents=True)
    args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
