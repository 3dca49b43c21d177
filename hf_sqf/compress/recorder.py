"""What a model's layers see while it runs: second moments of their inputs and of the loss gradient at their outputs.

For a weight W with inputs x and outputs y = W x, the loss being the negative log-likelihood of labels *drawn from the
model's own predictions*, the Fisher information of W is ``E[x x^T (x) delta delta^T]`` with ``delta = dloss/dy``. Its
Kronecker factors (Martens and Grosse, arXiv 1503.05671) are ``H = E[x x^T]`` and ``G = E[delta delta^T]``, of which the
diagonal g^2 is kept.

A table of embeddings has one-hot inputs, so that its factors change places: ``E[delta delta^T]`` takes the part of H,
and g^2 says how much of the gradient's energy reaches each row.

The product takes rows of data for unrelated, and inputs for independent of gradients. What an error E of W really does
to the loss is ``sum_t delta_t^T E x_t`` over all rows t of an input: where sentences are means over their tokens, for
one, it adds up. On data that is held out this is measured as it is, for errors such as rounding makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .mapped import Turns

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROWS = 64
"""Rows of outputs that are worked on at a time."""
HELD_ROWS = 32
"""Input rows kept of every batch that is held out."""


def input_rows(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return a layer's input as the rows (N, n) that its weight (m, n) multiplies; None for grouped convolutions."""
    if isinstance(module, CONVOLUTIONS):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        if not isinstance(module, nn.Conv2d):
            return _patches(module, x)
        return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT.flatten(0, 1)
    return x.flatten(0, -2)


def _patches(module: nn.Conv1d | nn.Conv3d, x: Tensor) -> Tensor | None:
    """Rows of a convolution over one or three dimensions: F.unfold knows two only."""
    if any(d != 1 for d in module.dilation):
        return None
    pads = [int(str(size)) for size in reversed(module.padding) for _ in range(2)]
    x = F.pad(x, pads)
    for axis, (kernel, stride) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
        x = x.unfold(2 + axis, kernel, stride)
    axes = len(module.kernel_size)
    places = [0, *range(2, 2 + axes)]
    return x.permute(*places, 1, *range(2 + axes, 2 + 2 * axes)).flatten(axes + 1).flatten(0, axes)


def output_rows(module: nn.Module | None, y: Tensor) -> Tensor:
    """Return a layer's output, or the gradient there, as rows (N, m); without a module, of a plain product."""
    return (y.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else y).flatten(0, -2)


class Recorder(TorchFunctionMode):
    """Sums second moments over the batches that run within it.

    Attributes:
        moments: input's name -> sum of ``x x^T``, float32 (n, n). An input that several weights share is summed once,
            under the name of the first of them.
        counts: input's name -> number of rows x summed.
        energies: weight's name -> sum of ``delta^2``, float32 (m,).
        held_inputs: input's name -> rows x kept of the batches held out, [(k, n)].
        held_energies: weight's name -> sum of ``delta^2`` over the batches held out.
        held_changes: weight's name -> sum over the batches held out of what an error in each of its rows does to the
            loss, squared, (m,): the mean of ``(sum_t delta_ti e^T x_t)^2`` over ``errors`` e. For a table of
            embeddings it is ``|sum_t delta_t|^2`` over the places t that look up a row.
        shared: weight's name -> name of its input.
        held_out: whether batches are held out now.
        wanted: names of the inputs to sum; None for all.
        errors: input's name -> errors of a row of the weight, float32 (n, k).

    Args:
        weights: a weight's name -> its module; or the 3-D parameter of a module of experts, whose slices are then
            recorded as ``name.0``, ``name.1``, ...
        shared: weight's name -> input's name, as :func:`shared_inputs` found them.
        head: the name of the output embeddings, whose outputs are the logits.
    """

    def __init__(
        self, weights: Mapping[str, nn.Module | nn.Parameter], shared: Mapping[str, str], head: str | None
    ) -> None:
        super().__init__()
        self._modules = {name: w for name, w in weights.items() if isinstance(w, nn.Module)}
        self._experts = {id(w): name for name, w in weights.items() if isinstance(w, nn.Parameter)}
        self._slices: dict[int, tuple[Tensor, str]] = {}
        self.shared, self._head = shared, head
        self._stack = ExitStack()
        self._backward = False
        self.moments: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.energies: dict[str, Tensor] = {}
        self.held_inputs: dict[str, list[Tensor]] = {}
        self.held_energies: dict[str, Tensor] = {}
        self.held_changes: dict[str, Tensor] = {}
        self.held_out = False
        self.wanted: set[str] | None = None
        self.errors: Mapping[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}  # input's name -> X e for each of its errors, of the batch that runs

    def __enter__(self) -> Recorder:
        """Hook the modules."""
        for name, module in self._modules.items():
            hook = self._embedding_hook if isinstance(module, nn.Embedding) else self._layer_hook
            self._stack.callback(module.register_forward_hook(partial(hook, name)).remove)
        super().__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave no hook behind."""
        super().__exit__(kind, error, trace)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        """Watch experts: they multiply by slices of one parameter, without modules of their own to hook."""
        result = func(*args, **(kwargs or {}))
        if self._experts and func is Tensor.__getitem__ and id(args[0]) in self._experts:
            self._slices = {id(result): (result, f"{self._experts[id(args[0])]}.{int(args[1])}")}
        elif func is F.linear and id(args[1]) in self._slices:
            name = self._slices[id(args[1])][1]
            self._record(name, args[0].detach().flatten(0, -2), result)
        return result

    def backward(self, output: Tensor, gradient: Tensor) -> None:
        """Send ``gradient`` back from ``output``; layers that run again for it are not counted twice."""
        self._backward = True
        output.backward(gradient)
        self._backward = False

    def _layer_hook(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        needed = self.shared.get(name, name) == name
        self._record(name, input_rows(module, args[0].detach()) if needed else None, output, module)

    def _record(self, name: str, rows: Tensor | None, output: Tensor, module: nn.Module | None = None) -> None:
        if self._backward:
            return
        if rows is not None:
            self._add_moment(name, rows)
        if output.requires_grad:
            output.register_hook(partial(self._add_energy, name, module))
            if (given := self._errors_at(name, rows)) is not None:
                output.register_hook(partial(self._add_change, name, module, given))

    def _errors_at(self, name: str, rows: Tensor | None) -> Tensor | None:
        """Return ``X e`` for each of the errors e of a weight, (N, k); None where they are not wanted."""
        key = self.shared.get(name, name)
        if not self.held_out or key not in self.errors:
            return None
        if rows is not None:
            self._given[key] = rows.float() @ self.errors[key].to(rows.device)
        return self._given[key]

    def _squares(self, name: str, delta: Tensor) -> Tensor:
        """Return ``delta^2``, or its mean over the labels y that could have been drawn."""
        if name != self._head:
            return delta.square()
        # Here delta = p - 1_y. Its mean square over labels y drawn from p is p (1 - p), which is |delta| (1 - |delta|)
        # whichever was drawn.
        size = delta.abs()
        return size.sub_(size.square())

    def _add_energy(self, name: str, module: nn.Module | None, gradient: Tensor) -> None:
        rows = output_rows(module, gradient)
        total = torch.zeros(rows.shape[1], device=rows.device)
        for delta in rows.split(ROWS):  # there may be many logits
            total += self._squares(name, delta.float()).sum(0)
        self._add(self.held_energies if self.held_out else self.energies, name, total)

    def _add_change(self, name: str, module: nn.Module | None, given: Tensor, gradient: Tensor) -> None:
        rows = output_rows(module, gradient)
        change = torch.zeros(rows.shape[1], given.shape[1], device=rows.device)
        for delta, errors in zip(rows.split(ROWS), given.split(ROWS), strict=True):
            if name == self._head:  # labels are drawn row by row: what two of them do has nothing in common
                change.addmm_(self._squares(name, delta.float()).T, errors.square())
            else:
                change.addmm_(delta.float().T, errors)
        self._add(self.held_changes, name, (change if name == self._head else change.square_()).mean(1))

    def _embedding_hook(self, name: str, module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._backward or not output.requires_grad:
            return
        ids = args[0].detach().flatten()

        def add(gradient: Tensor) -> None:
            delta = gradient.flatten(0, -2).float()
            none = torch.zeros(module.num_embeddings, device=delta.device)
            rows = none.index_add(0, ids, delta.square().sum(1))
            self._add(self.held_energies if self.held_out else self.energies, name, rows)
            if self.held_out:
                used, places = ids.unique(return_inverse=True)
                change = delta.new_zeros(len(used), delta.shape[1]).index_add_(0, places, delta)
                self._add(self.held_changes, name, none.index_add(0, used, change.square().sum(1)))
            self._add_moment(name, delta)

        output.register_hook(add)

    def _add_moment(self, key: str, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise ValueError(f"{key}: activations or gradients are not finite; load the model in bfloat16 or float32")
        if self.wanted is not None and key not in self.wanted:
            return
        rows = rows.float()
        if self.held_out:
            every = max(1, -(-len(rows) // HELD_ROWS))
            self.held_inputs.setdefault(key, []).append(rows[::every].clone())
            return
        if key not in self.moments:
            self.moments[key] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.moments[key].addmm_(rows.T, rows)
        self.counts[key] = self.counts.get(key, 0) + len(rows)

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value


def shared_inputs(
    model: nn.Module, weights: Mapping[str, nn.Module | nn.Parameter], batch: Mapping[str, Tensor]
) -> dict[str, str]:
    """Run one batch and return for each layer the name of the first one that had the very same input (q, k and v)."""
    first: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by id, which is given again to another when one has died
    calls: dict[str, list[str]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module, output
        known = first.get(id(args[0]))
        if known is None or known[0]() is not args[0]:
            known = first[id(args[0])] = weakref.ref(args[0]), name
        calls.setdefault(name, []).append(known[1])

    with ExitStack() as stack, torch.no_grad():
        for name, module in weights.items():
            if isinstance(module, (nn.Linear, Conv1D)):
                stack.callback(module.register_forward_hook(partial(note, name)).remove)
        model(**batch)
    return {name: keys[0] if len(keys) == 1 and len(calls[keys[0]]) == 1 else name for name, keys in calls.items()}


def _begin_graph(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def recomputed(turns: Turns, block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
    """Run a block's forward such that the way back runs it again; each time it takes its turn."""

    def run(*args: Any) -> Any:  # noqa: ANN401
        turns.take(block)
        return forward(*args)

    return checkpoint(run, *args, use_reentrant=False)


@contextmanager
def measuring(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into the state to be measured in, and back: evaluation, frozen weights, recomputed activations.

    With its weights frozen, gradients begin where tables are looked up. Of weights that are mapped from a file, those
    of one block are in memory at a time, forth and back.
    """
    was_training = model.training
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    frozen = [p for p in model.parameters() if p.requires_grad]
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    model.eval()
    for config in caching:
        config.use_cache = False
    for p in frozen:
        p.requires_grad_(False)
    if experts is not None and any(experts.values()):
        model.set_experts_implementation("eager")
    # A decoder that attends to an encoder does not run twice to the same end (transformers 5.23, T5).
    modules = () if model.config.is_encoder_decoder else model.modules()
    layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
    before = [(m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None)) for m in layers]
    tables = [m.register_forward_hook(_begin_graph) for m in model.modules() if isinstance(m, nn.Embedding)]
    turns = Turns()
    for layer in layers:  # only the layer itself is told that it trains: what lies in it (dropout) is not
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = partial(recomputed, turns, layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        for table in tables:
            table.remove()
        for layer, (flag, function) in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = flag, function  # type: ignore[assignment]
        model.train(was_training)
        for config in caching:
            config.use_cache = True
        for p in frozen:
            p.requires_grad_(True)
        if experts is not None and any(experts.values()):
            model.set_experts_implementation(experts)
