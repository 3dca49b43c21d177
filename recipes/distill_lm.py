"""Fine-tuning of a compressed language model's factors by distillation: KL divergence before, on the way, and after.

    python recipes/distill_lm.py MODEL --calibration TEXT --dev TEXT [--mode light] [--steps 70] [--bits 2.05]

The linear layers of the blocks are compressed, calibrated on the first text; then the factors are trained on it, with
the original as the teacher. The KL divergence is that of the original's predictions from the compressed model's, in
nats per token, on non-overlapping sequences of the second text. Figures and curve are kept in
``results/distill_lm_<mode>.json`` and ``.png``.

``--mode dense`` decodes the weights and trains them freely, in float32, all but embeddings, at the same learning rate
for all numbers (1e-4, say): no compressed model comes of it, but what training factors gives can be compared with it.
What SQFCallback would be told (``--train``, ``--code-rate``, ...) does not count then.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from calibrated_lm import Divergence, cut
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import hf_sqf
from hf_sqf import SQFCallback, SQFConfig, compress, distillation_loss, size_report
from hf_sqf.compress.calibration_data import library_text
from hf_sqf.runtime.sqf_size import SizeReport
from hf_sqf.training.distillation import DistillationLoss

RESULTS = Path(__file__).parent / "results"


class Measure(Protocol):
    """How far a model lies from its original."""

    def of(self, model: PreTrainedModel) -> float:
        """Return it; less is better."""


class Curve(TrainerCallback):
    """Measures the distance every few steps, and ends training when its time is up: seconds of all processors.

    Attributes:
        points: step, seconds and distance (``unit``) of each time.
        spent: seconds of training so far.
    """

    def __init__(self, measure: Measure, unit: str, every: int, minutes: float) -> None:
        self.measure, self.unit, self.every, self.seconds = measure, unit, every, 60.0 * minutes
        self.points: list[dict[str, float]] = []
        self.spent = 0.0
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what came before this callback's turn: blocks that were fitted."""
        self.spent += time.process_time() - self._since if self._since else 0.0

    def begin(self) -> None:
        """Start the clock before training starts."""
        self._since = time.process_time()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock: measuring does not count."""
        self._since = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, where it is time to."""
        self.spent += time.process_time() - self._since
        late = self.spent >= self.seconds
        if state.global_step % self.every == 0 or late:
            model = kwargs["model"].eval()
            with torch.no_grad():
                nats = self.measure.of(model)
            self.points.append({"step": state.global_step, "seconds": round(self.spent, 1), self.unit: nats})
            print(self.points[-1], flush=True)
        control.should_training_stop = control.should_training_stop or late


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add what fine-tuning by distillation is told, whatever the model."""
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate and train on")
    parser.add_argument("--dev", type=Path, required=True, help="text of the same kind to measure on")
    parser.add_argument("--bits", type=float)
    parser.add_argument("--structure", default="grid")
    parser.add_argument("--trellis", type=int, default=64, help="states of dependent quantization; 0 for none")
    parser.add_argument("--samples", type=int, help="texts to calibrate on")
    parser.add_argument("--mode", default="light", choices=("light", "latent", "hard", "dense"))
    parser.add_argument("--code-rate", type=float, default=0.5)
    parser.add_argument("--block-steps", type=int, default=0, help="steps on each block before training end to end")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=0, help="steps in which the learning rate rises")
    parser.add_argument("--hidden-states", type=float, default=0.0, help="weight of the hidden states in the loss")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision, with the teacher in bfloat16")
    parser.add_argument("--library", action="store_true", help="train on docstrings of Python's library, too")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="of processor time that training may take at most")
    parser.add_argument("--batch", type=int, help="texts a step")
    parser.add_argument("--every", type=int, help="steps between two measurements")
    parser.add_argument("--compressed", type=Path, help="folder to keep the compressed model in, or to take it from")
    parser.add_argument("--keep", type=Path, help="of the results, without suffix")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", help="folder, or id on the Hub")
    add_training(parser)
    parser.set_defaults(bits=2.05, samples=32, steps=70, minutes=90.0, batch=2, every=10)
    parser.add_argument("--share", type=float, help="most of the codes that a step may change; without, all")
    parser.add_argument("--train", default="all", help="of SQFCallback: what is trained; '.' adds the dense embeddings")
    parser.add_argument("--temperature", type=float, default=1.0, help="that logits are divided by")
    parser.add_argument("--context", type=int, default=512, help="tokens of a text")
    parser.add_argument("--tokens", type=int, default=8192, help="of the dev text to measure on before and after")
    parser.add_argument("--watched", type=int, default=2048, help="of them on the way")
    return parser.parse_args()


def compressed_model(args: argparse.Namespace, tokenizer: Any) -> PreTrainedModel:  # noqa: ANN401
    """Return the calibrated, compressed model; a folder that has it already is read."""
    if args.compressed is None or not (args.compressed / "config.json").exists():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model)
        text = args.calibration.read_text("utf-8")
        config = SQFConfig(
            bits=args.bits,
            structure=args.structure,
            trellis=args.trellis or None,
            include_embeddings=False,
            dataset=[text],
            tokenizer=tokenizer,
            samples=args.samples,
            context=args.context,
        )
        model = compress(model.eval(), config)
        if args.compressed is None:
            return model
        model.save_pretrained(args.compressed)
    return AutoModelForCausalLM.from_pretrained(args.compressed)


def to_train(
    args: argparse.Namespace, model: PreTrainedModel, teacher: PreTrainedModel, temperature: float = 1.0, **options: Any
) -> tuple[PreTrainedModel, list[TrainerCallback], DistillationLoss]:
    """Return the model to train, what trains its factors, and the loss.

    Args:
        args: of the command line.
        model: compressed; decoded in place, and returned, where ``args.mode`` is ``"dense"``.
        teacher: the original; made bfloat16 in place where ``args.bf16`` says so.
        temperature: of the loss.
        options: of SQFCallback, further ones.
    """
    if args.bf16:
        teacher = teacher.bfloat16()
    callbacks: list[TrainerCallback] = []
    if args.mode == "dense":
        model = model.dequantize()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    else:
        options = {"code_rate": args.code_rate, "original": teacher, "block_steps": args.block_steps, **options}
        callbacks.append(SQFCallback(args.mode, **options))
    loss = distillation_loss(teacher, temperature, hidden_states=args.hidden_states, student=model)
    return model, callbacks, loss


def training_arguments(args: argparse.Namespace, folder: str, logging_steps: int) -> TrainingArguments:
    """Return what the Trainer is told: on processors, with a cosine schedule, nothing saved or reported."""
    return TrainingArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        bf16=args.bf16,
        logging_steps=logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def draw(points: list[dict[str, float]], unit: str, label: str, title: str, path: Path) -> None:
    """Draw the distance against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([p["step"] for p in points], [p[unit] for p in points], marker="o")
    axes.set(xlabel="optimizer steps", ylabel=label, title=title, ylim=(0, 1.1 * max(p[unit] for p in points)))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(
    args: argparse.Namespace,
    name: str,
    record: dict[str, Any],
    sizes: tuple[SizeReport, SizeReport],
    unit: str,
    label: str,
) -> None:
    """Keep figures and curve, with what was asked for and what it was made with, and print the result.

    Args:
        args: of the command line.
        name: of the files, unless ``args.keep`` says otherwise.
        record: the figures, with ``unit``: the distance before and after, and its ``curve``.
        sizes: of the model before and after.
        unit: key of the distance.
        label: what it is.
    """
    record = {
        "model": args.model.rstrip("/").split("/")[-1],
        "mode": args.mode,
        "bits": [size.bits_per_weight if size.compressed_rows else None for size in sizes],
        "bytes": [size.total_bytes for size in sizes],
        **record,
        "options": {name: str(value) for name, value in vars(args).items() if not isinstance(value, Path)},
        "made": {"date": str(date.today()), "python": platform.python_version(), "hf_sqf": hf_sqf.__version__}
        | {package: version(package) for package in ("torch", "transformers", "numba")}
        | {"threads": torch.get_num_threads(), "machine": platform.machine()},
    }
    record["options"]["model"] = record["model"]
    keep = args.keep or RESULTS / f"{name}_{args.mode}"
    keep.parent.mkdir(exist_ok=True)
    keep.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    before, after = record[unit]
    title = f"{record['model']}, {record['bits'][0]:.2f} bits, {args.mode}: {before:.4f} to {after:.4f}"
    draw(record["curve"], unit, label, title, keep.with_suffix(".png"))
    old, new = record["bytes"]
    print(f"{label}: {before:.5f} to {after:.5f}, {old:,} to {new:,} bytes, {record['steps']} steps")


def main() -> None:
    """Compress, measure, train, measure."""
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForCausalLM.from_pretrained(args.model).eval()
    dev = cut(args.dev.read_text("utf-8"), tokenizer, args.context, args.tokens)
    whole, some = Divergence(teacher, dev), Divergence(teacher, dev[: max(1, args.watched // args.context)])
    model = compressed_model(args, tokenizer)
    before, start, size = whole.of(model), some.of(model), size_report(model)
    print(f"{size.bits_per_weight:.3f} bits, {size.total_bytes:,} bytes, KL {before:.4f}", flush=True)

    texts = [args.calibration.read_text("utf-8"), *(["\n".join(library_text())] if args.library else [])]
    sequences: Tensor = torch.cat([cut(text, tokenizer, args.context, 1 << 30) for text in texts])
    curve = Curve(some, "kl", args.every, args.minutes)
    model, callbacks, loss = to_train(args, model, teacher, args.temperature, train=args.train, share=args.share)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            training_arguments(args, folder, logging_steps=1),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in sequences],
            callbacks=[*callbacks, curve],
            compute_loss_func=loss,
        )
        curve.begin()
        trainer.train()
        trainer.save_model(folder)
        small = AutoModelForCausalLM.from_pretrained(folder)
    after, tuned = whole.of(small), size_report(small)
    steps = trainer.state.global_step
    record = {
        "kl": [before, after],
        "steps": steps,
        "seconds_per_step": curve.spent / max(steps, 1),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "tokens": {
            "step": args.batch * args.context,
            "text": sequences.numel(),
            "dev": dev.numel(),
            "curve": some.sequences.numel(),
        },
        "curve": [{"step": 0, "seconds": 0.0, "kl": start}, *curve.points],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    write(args, "distill_lm", record, (size, tuned), "kl", "KL divergence, nats per token")


if __name__ == "__main__":
    main()
