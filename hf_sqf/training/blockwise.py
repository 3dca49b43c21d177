"""Distillation block by block: each block is fitted to the original's, before the model is trained from end to end.

A block f^ is given what the compressed blocks before it give, x^, and is held to what the original's block f gives for
the original's x, over tokens t::

    min  mean_t |f^(x^)_t - f(x)_t|^2 / |f(x)_t|^2

One block runs at a time, forth and back, and no head: a step on every block takes less than one from end to end, and
errors of the blocks before are made up for where they arise. They count relative to each token's power, since what
follows a block normalizes its inputs token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..compress.blocks import Batch, Reached, Replay, find_stacks
from ..compress.recorder import measuring
from .relative import RelativeSteps

_LEAST_POWER = 1e-12
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block."""


def distill_blocks(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    steps: int,
    learning_rate: float,
    project: Callable[[nn.Module, int], None],
) -> tuple[float, float]:
    """Train what takes gradients in each block of a model in turn; return the mean error of blocks before and after.

    Ranks of ``torch.distributed`` call it alike, each with batches of its own, and average their gradients.

    Args:
        model: to be trained.
        teacher: the original, of the same blocks.
        batches: inputs, without labels. What a block is given for all of them is in memory at a time.
        steps: optimizer steps for each block, on one batch each, in turns.
        learning_rate: of Adam, falling to zero along a half cosine.
        project: called with the block and the number of the step, from 1, after each.

    Raises:
        ValueError: the models cannot be run block by block, or not alike.
    """
    with measuring(model), measuring(teacher):
        ours, theirs = (Replay(m, find_stacks(m, batches[0])) for m in (model, teacher))
    if not ours.blocks or len(ours.blocks) != len(theirs.blocks):
        raise ValueError(
            f"block_steps: {len(ours.blocks)} blocks of the model can be run one by one, and {len(theirs.blocks)} of "
            "the original: leave block_steps out, and train from end to end alone"
        )
    losses: list[list[float]] = []
    for index, block in enumerate(transformers_logging.tqdm(ours.blocks, desc="Distilling blocks")):
        with measuring(model), measuring(teacher):
            given = _arguments(ours, index, batches)
            _run(theirs, index, batches)
        expected = [theirs.output(index, number) for number in range(len(batches))]
        losses.append(_fit(block, given, expected, batches, steps, learning_rate, project))
        with measuring(model):
            _run(ours, index, batches)
    fitted = [found for found in losses if found]
    first = [sum(found[: len(batches)]) / len(found[: len(batches)]) for found in fitted]
    last = [sum(found[-len(batches) :]) / len(found[-len(batches) :]) for found in fitted]
    return sum(first) / max(len(first), 1), sum(last) / max(len(last), 1)


def _run(replay: Replay, index: int, batches: Sequence[Batch]) -> None:
    with replay.at(index) as run:
        for number, batch in enumerate(batches):
            run(number, batch)


def _arguments(replay: Replay, index: int, batches: Sequence[Batch]) -> list[Call]:
    """Return what a block is given for each batch."""
    found: list[Call] = []

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise Reached

    hook = replay.blocks[index].register_forward_pre_hook(look, with_kwargs=True)
    try:
        _run(replay, index, batches)
    finally:
        hook.remove()
    return found


def _fit(
    block: nn.Module,
    given: Sequence[Call],
    expected: Sequence[Tensor],
    batches: Sequence[Batch],
    steps: int,
    learning_rate: float,
    project: Callable[[nn.Module, int], None],
) -> list[float]:
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not parameters:
        return []
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    beside = RelativeSteps(block)
    losses = []
    for step in range(steps):
        number = step % len(given)
        args, kwargs = given[number]
        loss = relative_error(block(*args, **kwargs), expected[number], batches[number].get("attention_mask"))
        loss.backward()
        _average(parameters)
        beside.begin()
        optimizer.step()
        beside.end()
        optimizer.zero_grad()
        schedule.step()
        project(block, step + 1)
        losses.append(float(loss.detach()))
    return losses


def _average(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over ranks, so that all go the same way."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


def relative_error(states: Tensor, expected: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of the squared error of states (..., n) relative to their expected power.

    Args:
        states: of the compressed model.
        expected: of the original.
        mask: (...), of tokens that count; None for all.
    """
    target = expected.float()
    error = (states.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(_LEAST_POWER)
    if mask is None or mask.shape != error.shape:
        return error.mean()
    return (error * mask).sum() / mask.sum().clamp_min(1)
