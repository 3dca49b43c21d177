"""Calibration in sequence: every weight is fitted to the inputs that it will get, and makes up for what came before.

Blocks are compressed in the order in which they run, and within a block the weights in theirs, those that share an
input together (a stage). The data runs through the original and through what is compressed so far. With the inputs x
and x' of a weight there, and ``H' = E[x' x'^T]``, the distance of outputs is

    E |W x - W^ x'|_G^2 = d(W*, W^) + const,    W* = W + W E[(x - x') x'^T] H'^-1,

so that W* is what is rounded, in the metric (H', G) (Frantar and Alistarh, arXiv 2208.11580; Li et al., GPTAQ, arXiv
2504.02692). Where outputs are added to something else, as those of a block's branches are to its hidden states, what
counts is the sum: with the sums s and s' of the two runs (W still dense),

    W* = W + E[(s - s') x'^T] H'^-1,

so that W makes up for what the hidden states lack, too. There each row of data counts by ``1 / |s|^2``, in H' as well:
what follows normalizes the sums token by token, and a few tokens' are hundreds of times as large as all others.

The whole step to W* trusts a few thousand rows of data too much: a share of it, :data:`SHARE`, does best.

Weights outside of the blocks come first, as they are. Experts see other rows in the two runs, so that only their H'
is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from ..runtime.sqf_container import unpack
from .blocks import Batch, Reached, Replay, find_stacks
from .calibration_data import thinned
from .mapped import release_module
from .metric import Metric
from .ranks import Ranks
from .recorder import Recorder, input_rows, measuring, output_rows
from .statistics import FileMoments, Statistics, shrink
from .sums import Sums, measure_all
from .targets import Target

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Of the step to W*: half did best among none, 0.3, 0.5, 0.75 and all on the first blocks of SmolLM2-135M, on text of
the calibration's kind and on other text; the whole step does harm."""
_DRIFT, _LACK = ":drift", ":lack"  # moments of what inputs and sums lack
_LEAST_POWER = 1e-3  # of a token, relative to the median
_ADDING = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})


@dataclass(frozen=True, eq=False)
class Stage:
    """Weights of a block that share their input.

    Attributes:
        block: index of the block.
        key: the input's name.
        targets: the weights.
        last: whether no stage of the block comes after it.
        joins: whether its one output is added to another tensor, as a branch to the hidden states.
    """

    block: int
    key: str
    targets: tuple[Target, ...]
    last: bool
    joins: bool

    @property
    def module(self) -> nn.Module:
        """One of the modules whose input it is."""
        return self.targets[0].sites[0][0]

    @property
    def experts(self) -> bool:
        """Whether the weights are experts, whose rows differ from run to run."""
        return self.targets[0].held.stacked


class Sequential:
    """The state of a model between two stages; a context, at whose end the model is as it was.

    Args:
        model: with dense weights.
        targets: the weights to be compressed.
        statistics: of the original.
        batches: the calibration data.
        share: of the step to W*.

    Attributes:
        outside: weights that belong to no stage. They must be compressed first.
        stages: the others, in the order in which they must be compressed. Empty where a model has no blocks that can
            be run one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[Target],
        statistics: Statistics,
        batches: Sequence[Batch],
        share: float = SHARE,
    ) -> None:
        self._model, self._statistics, self._batches = model, statistics, thinned(batches)
        self._share, self._ranks, self._moments = share, Ranks.here(), FileMoments()
        self._decoded: dict[nn.Parameter, Tensor] = {}
        self._reached = 0  # the data has been through so many blocks
        self._done: set[int] = set()  # blocks that the original's data has been through
        self._added: set[nn.Module] = set()  # whose outputs are added to other tensors
        with measuring(model):
            self._replay = Replay(model, find_stacks(model, batches[0]))
            self.stages = self._find_stages(targets)
        inside = {target.name for stage in self.stages for target in stage.targets}
        self.outside = [target for target in targets if target.name not in inside]
        self._stack = ExitStack()
        if not self.stages:
            logger.info("the model's blocks cannot be run one by one: weights are calibrated on the original's inputs")

    def __enter__(self) -> Sequential:
        """Put the model into the state to be measured in."""
        self._stack.enter_context(measuring(self._model))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Put it back."""
        self._stack.close()

    def _find_stages(self, targets: Sequence[Target]) -> list[Stage]:
        block_of = {module: i for i, block in enumerate(self._replay.blocks) for module in block.modules()}
        known = self._statistics.inputs
        found: dict[tuple[int, str], list[Target]] = {}
        for target in self._in_order(targets):
            module = target.sites[0][0]
            measured = target.held.stacked or target.name in known
            if len(target.sites) == 1 and module in block_of and measured:
                key = target.name if target.held.stacked else known[target.name]
                found.setdefault((block_of[module], key), []).append(target)
        lasts = dict(found.keys())  # block -> key of its last stage
        return [
            Stage(block, key, tuple(some), lasts[block] == key, len(some) == 1 and some[0].sites[0][0] in self._added)
            for (block, key), some in found.items()
        ]

    def _in_order(self, targets: Sequence[Target]) -> list[Target]:
        """Return the weights in the order in which they are used."""
        order: dict[nn.Module, int] = {}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            order.setdefault(module, len(order))

        modules = {target.sites[0][0] for target in targets}
        with ExitStack() as hooks, torch.no_grad(), Additions(modules, lambda module, total: self._added.add(module)):
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(note).remove)
            self._model(**self._batches[0])
        return sorted((t for t in targets if t.sites[0][0] in order), key=lambda target: order[target.sites[0][0]])

    def enter(self, stage: Stage) -> None:
        """Measure the inputs of a stage; all before it must have been left."""
        while self._reached < stage.block:
            with self._replay.at(self._reached) as run:
                self._measure(Sums(), partial(self._through, run))
            block = self._replay.blocks[self._reached]
            for p in block.parameters():
                self._decoded.pop(p, None)
            release_module(block)
            self._reached += 1
        with self._replay.at(stage.block) as run:
            if stage.experts:
                weights = {target.name: target.parameter for target in stage.targets}
                with Recorder(weights, {}, None) as recorder:
                    sums = self._measure(recorder, partial(self._compressed, run))
            else:
                tally = Sums()
                sums = self._measure(tally, partial(self._pair, run, stage, tally))
                self._done |= {stage.block} if stage.last else set()
        self._moments.add({key: total.div_(sums.counts[key]) for key, total in sums.moments.items()})

    def leave(self, stage: Sequence[Target], packed: Mapping[str, Tensor]) -> None:
        """Have the data run through the compressed weights of a stage from now on.

        Args:
            stage: its weights.
            packed: their packed bytes, by name.
        """
        for target in stage:
            matrices = [factors.dense() for factors in unpack(packed[target.name], target.name)]
            weight = target.held.weight(matrices)
            self._decoded[target.parameter] = weight.to(target.parameter.device, target.parameter.dtype)

    def problem(self, target: Target) -> tuple[list[Tensor], list[Metric]]:
        """Return what is to be approximated in place of a weight's matrices, (m, n) each, and in which metrics."""
        matrices = target.matrices()
        metrics = self._statistics.metrics(target.name, matrices)
        names = [f"{target.name}.{i}" for i in range(len(matrices))] if target.held.stacked else [target.name]
        pairs = [self._shifted(*entry) for entry in zip(names, matrices, metrics, strict=True)]
        return [weight for weight, _ in pairs], [metric for _, metric in pairs]

    def _shifted(self, name: str, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        key = self._statistics.inputs.get(name, name)
        if key not in self._moments or metric.H is None:
            return weight, metric
        share = self._statistics.shrinkage[key]
        metric = Metric(shrink(self._moments[key], share), metric.g)
        if key + _LACK in self._moments:
            lack = self._moments[key + _LACK].double()
        elif key + _DRIFT in self._moments:
            lack = weight.double() @ self._moments[key + _DRIFT].double()
        else:
            return weight, metric
        step = torch.cholesky_solve((1.0 - share) * lack.T, metric.cholesky()).T
        return (weight.double() + self._share * step).to(weight.dtype), metric

    def _measure(self, recorder: Recorder | Sums, run: Callable[[int, Batch], int]) -> Sums:
        return measure_all(recorder, self._ranks, (self._batches, ()), run, lambda count: None)

    def _through(self, run: Callable[[str, Batch], Any], number: int, batch: Batch) -> int:
        if self._reached not in self._done:
            run(f"original-{number}", batch)
        return self._compressed(run, number, batch)

    def _compressed(self, run: Callable[[str, Batch], Any], number: int, batch: Batch) -> int:
        with self._swapped():
            run(f"compressed-{number}", batch)
        return 0

    def _pair(self, run: Callable[[str, Batch], Any], stage: Stage, tally: Sums, number: int, batch: Batch) -> int:
        """Add the moments of a stage's input, and of what it lacks, or what its sum does, over a batch."""
        _, wanted = _seen_at(stage, run, f"original-{number}", batch, stage.last)
        with self._swapped():
            rows, given = _seen_at(stage, run, f"compressed-{number}", batch)
        weights = relative_weights(wanted).sqrt_() if stage.joins else None
        lack = wanted.sub_(given)
        if weights is not None:
            rows, lack = rows.mul_(weights), lack.mul_(weights)
        for key, left in ((stage.key, rows), (stage.key + (_LACK if stage.joins else _DRIFT), lack)):
            if key not in tally.moments:
                tally.moments[key] = torch.zeros(left.shape[1], rows.shape[1], device=rows.device)
            tally.moments[key].addmm_(left.T, rows)
            tally.counts[key] = tally.counts.get(key, 0) + len(rows)
        return 0

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Have the model compute with what is compressed so far."""
        own = {parameter: parameter.data for parameter in self._decoded}
        for parameter, decoded in self._decoded.items():
            parameter.data = decoded
        try:
            yield
        finally:
            for parameter, data in own.items():
                parameter.data = data


class Additions(TorchFunctionMode):
    """Watches what the outputs of modules are added to, if it is a tensor of the same shape that was there before.

    (One that was made later may be made of the output, as in some activations: x + 0.04 x^3.)

    Args:
        modules: which ones.
        found: is called with a module and the sum, each time.
    """

    def __init__(self, modules: Iterable[nn.Module], found: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self._modules, self._found = modules, found
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # output -> its module, and how many calls before
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> the same
        self._calls = 0
        self._stack = ExitStack()

    def __enter__(self) -> Additions:
        """Hook the modules."""
        for module in self._modules:
            self._stack.callback(module.register_forward_hook(self._note).remove)
        super().__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave no hook behind."""
        super().__exit__(kind, error, trace)
        self._stack.close()

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        if isinstance(output, Tensor):
            self._outputs[output] = module, self._calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        """Look at sums of two tensors."""
        pair = args if not kwargs and getattr(func, "__name__", "") in _ADDING else ()
        added = []
        if len(pair) == 2 and all(isinstance(term, Tensor) for term in pair) and pair[0].shape == pair[1].shape:
            for term, other in (pair, pair[::-1]):
                module, calls = self._outputs.get(term, (None, 0))
                if module is not None and self._made.get(other, 0) <= calls:
                    added.append(module)
        result = func(*args, **(kwargs or {}))
        self._calls += 1
        if isinstance(result, Tensor):
            self._made[result] = self._calls
        for module in added:
            self._found(module, result)
        return result


def relative_weights(states: Tensor) -> Tensor:
    """Return how much each token counts where errors are relative to its power, (N, 1) of mean 1, for states (N, m).

    Powers far below the median count as more, lest states of next to nothing outweigh all others.
    """
    power = states.square().mean(1, keepdim=True)
    weights = power.clamp_min_(max(_LEAST_POWER * float(power.median()), torch.finfo(power.dtype).tiny)).reciprocal_()
    return weights.div_(weights.mean())


def _seen_at(
    stage: Stage, run: Callable[[str, Batch], Any], key: str, batch: Batch, to_end: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the rows (N, n) that reach a stage, and what of it two runs are compared by, float32.

    That is the sum (N, m) where it joins, and else the rows.

    What comes behind it in its block is run on request.
    """
    seen: list[Tensor] = []
    sums: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = input_rows(module, args[0])
        assert rows is not None  # it would have no statistics
        seen.append(rows.float().clone())
        if not (to_end or stage.joins):
            raise Reached

    def look_at_sum(module: nn.Module, total: Tensor) -> None:
        sums.append(output_rows(module, total).float().clone())
        if not to_end:
            raise Reached

    with ExitStack() as hooks:
        hooks.callback(stage.module.register_forward_pre_hook(look).remove)
        if stage.joins:
            hooks.enter_context(Additions([stage.module], look_at_sum))
        run(key, batch)
    if stage.joins and not sums:
        raise RuntimeError(f"{stage.key}: what it gives was added to the hidden states for one batch, not for another")
    return seen[0], (sums if stage.joins else seen)[0]
