"""Tiny compressed models and what trains them."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_sqf
from hf_sqf import SQFCallback, SQFConfig, distillation_loss
from tests.conftest import build

Data = list[dict[str, Any]]


def compressed(name: str, bits: float = 3.0, **options: Any) -> PreTrainedModel:
    """Return a compressed random model, the same every time."""
    return copy.deepcopy(_compressed(name, bits, tuple(options.items())))


@cache
def _compressed(name: str, bits: float, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    config = SQFConfig(bits=bits, **{"structure": "grid", "trellis": None, **dict(options)})
    return hf_sqf.compress(build(name), config)


def rows(count: int = 48, length: int = 12) -> Data:
    """Return token ids and labels."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (count, length), generator=draw)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def images(count: int = 32) -> Data:
    """Return pixels and classes."""
    draw = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=draw), "labels": i % 7} for i in range(count)]


@pytest.fixture
def trainer_for(tmp_path: Path) -> Callable[..., Trainer]:
    """Make a Trainer: trainer_for(model, callback, teacher=None, data=None, **arguments)."""

    def make(
        model: PreTrainedModel,
        callback: SQFCallback | None = None,
        teacher: PreTrainedModel | None = None,
        data: Data | None = None,
        folder: str = "out",
        **arguments: Any,
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "max_steps": 4,
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 2,
        }
        args = TrainingArguments(str(tmp_path / folder), **{**defaults, **arguments})
        loss = None if teacher is None else distillation_loss(teacher)
        return Trainer(
            model,
            args,
            train_dataset=data or rows(),
            eval_dataset=rows(8),
            callbacks=[] if callback is None else [callback],
            compute_loss_func=loss,
        )

    return make
