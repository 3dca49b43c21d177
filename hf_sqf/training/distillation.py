"""Distillation: a loss by which a compressed model is held to its original.

The Trainer's ``compute_loss_func`` is given the outputs and the labels, but not the inputs, which the teacher needs:
:func:`watch` has a model's inputs noted when they pass. SQFCallback does so for the model it trains.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_LOGITS = 1 << 20  # logits that are in float32 at a time: what the caches hold, and need not be mapped anew
_NOT_FOR_TEACHERS = {"labels", "num_items_in_batch", "past_key_values", "use_cache"}


@dataclass
class _Seen:
    """The inputs of the latest call of a watched model."""

    model: weakref.ref[nn.Module]
    inputs: dict[str, Any] = field(repr=False)
    accumulated: int


_latest = threading.local()
_watched: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_wanting_states: weakref.WeakSet[DistillationLoss] = weakref.WeakSet()
_losses: weakref.WeakSet[DistillationLoss] = weakref.WeakSet()
_NO_LABELS = "Trainer: `compute_loss_func` is defined but `labels=None`"


def _not_about_labels(record: logging.LogRecord) -> bool:
    """Whether the Trainer may say it: not, at every step, that there are no labels, where the loss needs none."""
    return not (len(_losses) and record.getMessage().startswith(_NO_LABELS))


def watch(model: nn.Module, accumulated: int = 1) -> None:
    """Have the inputs of a model noted, for :func:`distillation_loss`; again, to change ``accumulated``.

    Args:
        model: whose outputs the loss is given.
        accumulated: batches whose gradients are summed up for one step.
    """
    if model not in _watched:
        model.register_forward_pre_hook(_note, with_kwargs=True)
    _watched[model] = accumulated


def _note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = list(inspect.signature(model.forward).parameters)
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    if model.training and len(_losses):
        _without_dropout(model)
    _latest.seen = _Seen(weakref.ref(model), inputs, _watched.get(model, 1) if model.training else 1)
    if len(_wanting_states):
        kwargs = {**kwargs, "output_hidden_states": True}
    return args, kwargs


def _without_dropout(model: nn.Module) -> None:
    """Have a model that trains drop nothing, until its next ``train()``.

    The teacher's outputs are those of all its units: held to them with some units missing, scales would make up for
    what is missing, and be wrong when all are there. What a layer checks before it recomputes its activations, and how
    batches are normalized, stays.
    """
    kept = (PreTrainedModel, GradientCheckpointingLayer, nn.modules.batchnorm._NormBase)
    for module in model.modules():
        if not isinstance(module, kept):
            module.training = False


class ForwardKL(torch.autograd.Function):
    """``sum_i w_i KL(softmax(t_i / T) || softmax(s_i / T)) T^2`` over rows of logits, some rows at a time.

    The gradient takes the place of the teacher's logits in memory, so that a large vocabulary needs no third table.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:  # noqa: ANN401
        """Logits (k, v) of both, weights (k,), to a float32 scalar; overwrites ``teacher``."""
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        rows = max(1, _LOGITS // max(student.shape[1], 1))
        for at in range(0, len(student), rows):
            some = slice(at, at + rows)
            s = torch.log_softmax(student[some].float() / temperature, -1)
            t = torch.log_softmax(teacher[some].float() / temperature, -1)
            p = t.exp()
            weight = weights[some].float()
            total += ((p * (t - s)).sum(-1) * weight).sum().double()
            if wanted:
                teacher[some] = s.exp_().sub_(p).mul_(temperature * weight[:, None]).to(teacher.dtype)
        if wanted:
            ctx.save_for_backward(teacher)
        return (total * temperature**2).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Pass ``T (softmax(s / T) - softmax(t / T))``."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


class DistillationLoss:
    """What :func:`distillation_loss` returns."""

    def __init__(self, teacher: nn.Module, temperature: float, embeddings: str, hidden_states: float) -> None:
        self.teacher, self.temperature = teacher, temperature
        self.embeddings, self.hidden_states = embeddings, hidden_states
        forward = inspect.signature(teacher.forward).parameters
        self._accepts = None if any(p.kind is p.VAR_KEYWORD for p in forward.values()) else set(forward)
        self._causal = getattr(teacher, "loss_type", None) == "ForCausalLM"
        _losses.add(self)
        logging.getLogger("transformers.trainer").addFilter(_not_about_labels)  # once, however often it is added
        if hidden_states:
            _wanting_states.add(self)

    def __call__(self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Any = None) -> Tensor:  # noqa: ANN401
        """Return the loss of a watched model's latest outputs.

        Args:
            outputs: of the model.
            labels: only their -100 count: such predictions are left out.
            num_items_in_batch: predictions in all batches of a step, by which sums are divided.

        Raises:
            RuntimeError: the inputs are not known.
            ValueError: outputs and teacher do not go together.
        """
        seen: _Seen | None = getattr(_latest, "seen", None)
        if seen is None:
            raise RuntimeError(
                "distillation_loss has not seen the model's inputs: train with callbacks=[SQFCallback()], or say "
                "distillation_loss(teacher, student=model)"
            )
        del _latest.seen  # inputs serve once
        expected = self._teach(seen.inputs)
        mask = _mask(seen.inputs, labels, self._causal)
        shared = seen.accumulated if num_items_in_batch is None else 1
        logits = _entry(outputs, "logits")
        if logits is not None:
            loss = self._divergence(logits, _entry(expected, "logits"), mask, num_items_in_batch)
        else:
            loss = self._distance(outputs, expected, seen.inputs.get("attention_mask"))
        if self.hidden_states:
            apart = _states_apart(outputs, expected, seen.inputs.get("attention_mask"))
            items = 1.0 if num_items_in_batch is None else _share(mask, logits, num_items_in_batch)
            loss = loss + self.hidden_states * apart * items
        return loss / shared

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        kept = {
            name: value
            for name, value in inputs.items()
            if name not in _NOT_FOR_TEACHERS and (self._accepts is None or name in self._accepts)
        }
        device = next((v.device for v in kept.values() if isinstance(v, Tensor)), None)
        mine = next(self.teacher.parameters())
        if device is not None and mine.device != device:
            self.teacher.to(device)
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                kept[name] = value.to(mine.dtype)
        self.teacher.eval()
        if self.hidden_states:
            kept["output_hidden_states"] = True
        return self.teacher(**kept)

    def _divergence(self, student: Tensor, teacher: Tensor | None, mask: Tensor | None, items: Any) -> Tensor:  # noqa: ANN401
        if teacher is None or teacher.shape != student.shape:
            found = "none" if teacher is None else tuple(teacher.shape)
            raise ValueError(f"the teacher's logits are {found}, the model's {tuple(student.shape)}: they must agree")
        if student.shape[-1] == 1:  # a regression
            return torch.nn.functional.mse_loss(student.float(), teacher.float())
        size = student.shape[-1]
        weights = torch.ones(student.shape[:-1], device=student.device)
        if mask is not None and mask.shape == student.shape[:-1]:
            weights = mask.to(weights)
        count = weights.sum().clamp_min(1.0) if items is None else items
        total: Tensor = ForwardKL.apply(
            student.reshape(-1, size), teacher.reshape(-1, size), weights.reshape(-1), self.temperature
        )
        return total / count

    def _distance(self, outputs: Any, expected: Any, mask: Tensor | None) -> Tensor:  # noqa: ANN401
        student, teacher = (_entry(o, "last_hidden_state") for o in (outputs, expected))
        if student is None or teacher is None:
            raise ValueError("distillation needs outputs with logits or last_hidden_state, of model and teacher alike")
        one, other = _pooled(student, mask), _pooled(teacher, mask)
        if self.embeddings == "cosine":
            return 1.0 - torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()
        return torch.nn.functional.mse_loss(one, other)


def distillation_loss(
    teacher: nn.Module,
    temperature: float = 1.0,
    *,
    embeddings: str = "cosine",
    hidden_states: float = 0.0,
    student: nn.Module | None = None,
) -> DistillationLoss:
    """Return a loss for the Trainer's ``compute_loss_func`` that holds a compressed model to its original.

    For models with logits it is the forward KL divergence from the teacher's, in nats per prediction, over all tokens
    that are neither padding nor labelled -100; for encoders the distance of mean-pooled embeddings. As long as the loss
    is there, the model that is trained drops nothing (dropout).

    Args:
        teacher: the original, in any dtype; it runs without gradients.
        temperature: T; logits are divided by it, and the loss multiplied by T^2 (Hinton, Vinyals and Dean,
            arXiv 1503.02531).
        embeddings: of encoders, ``"cosine"`` (one minus it) or ``"mse"``.
        hidden_states: weight of a further term: the squared error of the hidden states of all layers, relative to
            their power.
        student: the model that is trained, if it is trained without SQFCallback.

    Raises:
        ValueError: an option is out of range.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    if embeddings not in ("cosine", "mse"):
        raise ValueError(f"embeddings must be cosine or mse, got {embeddings!r}")
    if isinstance(hidden_states, bool) or not isinstance(hidden_states, (int, float)) or not hidden_states >= 0:
        raise ValueError(f"hidden_states must be a weight of 0 or more, got {hidden_states!r}")
    if student is not None:
        watch(student)
    return DistillationLoss(teacher, float(temperature), embeddings, float(hidden_states))


def _entry(outputs: Any, name: str) -> Tensor | None:  # noqa: ANN401
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)


def _mask(inputs: dict[str, Any], labels: Tensor | None, causal: bool) -> Tensor | None:
    """Return which predictions count, (batch, tokens); None where there is nothing to tell by."""
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        counted = labels != -100
        if causal:  # position i predicts label i + 1
            counted = torch.nn.functional.pad(counted[:, 1:], (0, 1))
        return counted
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _share(mask: Tensor | None, logits: Tensor | None, items: Any) -> Any:  # noqa: ANN401
    """Return this batch's part of the predictions of a step."""
    if mask is not None and logits is not None and mask.shape == logits.shape[:-1]:
        return mask.sum() / items
    return 1.0


def _pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    if states.dim() != 3:
        return states.float().flatten(1)
    weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.to(torch.float32)
    return (states.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1.0)


def _states_apart(outputs: Any, expected: Any, mask: Tensor | None) -> Tensor:  # noqa: ANN401
    ours, theirs = (o.get("hidden_states") if isinstance(o, dict) else None for o in (outputs, expected))
    if not ours or not theirs or len(ours) != len(theirs):
        raise ValueError("hidden_states is given, but model and teacher do not return as many of them")
    apart = []
    for one, other in zip(ours, theirs, strict=True):
        weights = 1.0 if mask is None or one.dim() != 3 else mask.to(torch.float32)[..., None]
        error = ((one.float() - other.float()).square() * weights).sum()
        apart.append(error / (other.float().square() * weights).sum().clamp_min(1e-12))
    return torch.stack(apart).mean()
