"""The ``train`` of a recipe: a compressed model's factors, held to the original's outputs or to labels."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from ..compress.calibration_data import SELF, calibration
from ..compress.companions import beside_weights, carry_files
from ..hub.card import write_card
from ..hub.checking import tokenizer_of
from ..training.callback import MODES, SQFCallback
from ..training.distillation import distillation_loss
from .folders import whole_folder
from .labelled import Labelled
from .measuring import load_compressed
from .originals import card_of
from .texts import calibration_texts


@dataclass(frozen=True)
class Training:
    """How the factors are trained.

    Attributes:
        steps: of the optimizer.
        learning_rate: its largest; it falls along a cosine.
        mode: of :class:`hf_sqf.SQFCallback`.
        batch: inputs a step.
        context: tokens of an input, at most.
        samples: inputs, at most.
        dataset: a file of texts, the id of a data set on the Hub, or ``self``, as for calibration. With ``labels``: a
            ``.jsonl`` file or an id.
        labels: the column of the data that holds classes, or what is said. Without, the original is the teacher.
        inputs: the column that holds texts, pictures or sounds, with ``labels``; None for ``text``, ``image`` or
            ``audio``.
    """

    steps: int = 100
    learning_rate: float = 2e-3
    mode: str = "light"
    batch: int = 2
    context: int = 512
    samples: int = 256
    dataset: str = SELF
    labels: str | None = None
    inputs: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"train: {name} must be a whole number of 1 or more, got {value!r}")
        if isinstance(self.learning_rate, bool) or not isinstance(self.learning_rate, (int, float)):
            raise ValueError(f"train: learning_rate must be a number such as 2.0e-3, got {self.learning_rate!r}")
        if self.mode not in MODES:
            raise ValueError(f"train: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.labels is not None and self.dataset == SELF:
            raise ValueError("train: labels are those of a dataset, which is missing")


class Progress(TrainerCallback):
    """A bar on standard error: the Trainer's own writes to standard output, too, which is for tables and JSON."""

    bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin."""
        self.bar = transformers_logging.tqdm(total=state.max_steps, desc="Training", delay=2.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count a step."""
        self.bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End."""
        self.bar.close()


def tune(folder: Path, out: Path, original: str, training: Training) -> None:
    """Train the factors of a compressed model, and save it. ``out`` is written whole or not at all.

    Args:
        folder: of the compressed model.
        out: folder to write; must not hold what has to stay.
        original: folder or id of the model it was made from, the teacher.
        training: what is asked for.

    Raises:
        ValueError: the model has no tokenizer and there are no labels, or the data does not fit.
        FileNotFoundError: there is no such file of data.
    """
    model = load_compressed(folder)
    tokenizer = tokenizer_of(original, local_files_only=False)
    native = getattr(type(model), "sqf_native", type(model))
    teacher = loss = collate = None
    if training.labels is not None:
        data = Labelled(training.dataset, training.labels, training.inputs)
        reader = data.reader(model, original, training.context)
        rows, collate = data.examples(model, reader, training.samples), reader.collate
        if training.mode != "light":  # codes that were rounded without data start near the original's weights
            teacher = native.from_pretrained(original, dtype=model.dtype)
    elif tokenizer is None:
        raise ValueError(f"train: no tokenizer comes with {original}; without texts, training takes labels")
    else:
        teacher = native.from_pretrained(original, dtype=model.dtype)
        rows = _texts(teacher, tokenizer, training)
        loss = distillation_loss(teacher)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=training.steps, learning_rate=training.learning_rate, lr_scheduler_type="cosine",
            per_device_train_batch_size=training.batch, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, data_collator=collate,
            callbacks=[SQFCallback(training.mode, original=teacher), Progress()], compute_loss_func=loss,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # standard output is for tables and JSON
        trainer.train()
    source = beside_weights(original)
    with whole_folder(out) as part:
        model.save_pretrained(part)
        write_card(part, out.resolve().name, card_of(source))
        carry_files(source, part)


def _texts(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: Training) -> list[dict[str, Any]]:
    found = calibration(
        teacher, calibration_texts(training.dataset), tokenizer, training.samples, training.context, own_text=False
    )
    batches = [*found.batches, *found.held_out]
    return [{name: ids[i] for name, ids in b.items()} for b in batches for i in range(len(b["input_ids"]))]
