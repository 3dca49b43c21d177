"""Fine-tuning of a compressed sentence encoder's factors by distillation: 1 - cosine before, on the way, and after.

    python recipes/distill_encoder.py --calibration TEXT --dev TEXT [--mode light] [--steps 200] [--bits 2]

All weights are compressed, embeddings included, calibrated on the first text's paragraphs; then the factors are trained
on the same paragraphs, with the original as the teacher, and measured on the second text's: the mean of 1 - cosine of
mean-pooled embeddings to the original's. Texts hold a paragraph a line. ``--mode dense`` is explained in
``distill_lm.py``. Figures and curve are kept in ``results/distill_encoder_<mode>.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import tempfile

from calibrated_encoder import embed, paragraphs
from distill_lm import Curve, add_training, to_train, training_arguments, write
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_sqf import SQFConfig, compress, size_report
from hf_sqf.compress.calibration_data import library_text

LENGTH = 128
"""Tokens of a paragraph that are trained on."""


class Distance:
    """1 - cosine of a model's embeddings to an original's, the mean over texts."""

    def __init__(self, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.expected = embed(original, tokenizer, texts)

    def of(self, model: PreTrainedModel) -> float:
        """Return it."""
        found = embed(model, self.tokenizer, self.texts)
        return 1.0 - float(nn.functional.cosine_similarity(self.expected, found).mean())


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    add_training(parser)
    parser.set_defaults(bits=2.0, structure="auto", samples=384, steps=200, minutes=30.0, batch=32, every=20)
    return parser.parse_args()


def compressed_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the calibrated, compressed model; a folder that has it already is read."""
    if args.compressed is None or not (args.compressed / "config.json").exists():
        config = SQFConfig(
            bits=args.bits,
            structure=args.structure,
            trellis=args.trellis or None,
            dataset=args.calibration.read_text("utf-8").splitlines(),
            tokenizer=tokenizer,
            samples=args.samples,
            context=256,
        )
        model = compress(AutoModel.from_pretrained(args.model).eval(), config)
        if args.compressed is None:
            return model
        model.save_pretrained(args.compressed)
    found: PreTrainedModel = AutoModel.from_pretrained(args.compressed)
    return found


def main() -> None:
    """Compress, measure, train, measure."""
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModel.from_pretrained(args.model).eval()
    distance = Distance(teacher, tokenizer, paragraphs(args.dev.read_text("utf-8"), 256))
    model = compressed_model(args, tokenizer).eval()
    before, size = distance.of(model), size_report(model)
    print(f"{size.bits_per_weight:.3f} bits, {size.total_bytes:,} bytes, 1 - cosine {before:.5f}", flush=True)

    lines = paragraphs(args.calibration.read_text("utf-8"), 1 << 20) + (list(library_text()) if args.library else [])
    curve = Curve(distance, "distance", args.every, args.minutes)
    set_seed(0)
    model, callbacks, loss = to_train(args, model, teacher)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            training_arguments(args, folder, logging_steps=args.every),
            train_dataset=[dict(tokenizer(text, truncation=True, max_length=LENGTH)) for text in lines],
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[*callbacks, curve],
            compute_loss_func=loss,
        )
        curve.begin()
        trainer.train()
        trainer.save_model(folder)
        small = AutoModel.from_pretrained(folder).eval()
    after, tuned = distance.of(small), size_report(small)
    record = {
        "distance": [before, after],
        "steps": trainer.state.global_step,
        "processor_seconds": curve.spent,
        "paragraphs": {"step": args.batch, "all": len(lines), "dev": len(distance.texts)},
        "curve": [{"step": 0, "seconds": 0.0, "distance": before}, *curve.points],
    }
    write(args, "distill_encoder", record, (size, tuned), "distance", "1 - cosine to the original's embeddings")


if __name__ == "__main__":
    main()
