"""One run over the weights of a model: what each costs, at which noise step it is solved, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_container import pack
from ..runtime.sqf_memory import release, trim
from ..runtime.sqf_modules import SUFFIX
from ..runtime.sqf_size import entry_bytes
from .budget import OCTAVES, Budget, RateCurve, rounds, smallest
from .factorize import solve
from .metric import Metric
from .ranks import Ranks, empty_bytes
from .sequential import Sequential
from .targets import SMALL, Target
from .workspace import Workspace

Result = TypeVar("Result")
MetricOf = Callable[[str, list[Tensor]], list[Metric]]
"""(a weight's full name, its matrices (m, n)) -> the metric of each."""
_CHUNK = 1 << 20
_TRIM = 1 << 21  # entries of weights between two times that freed memory is handed back
_ROOM = 1 << 24
"""Entries that weights solved side by side may have together, in any model: a solver takes some ten bytes an entry."""


class Header:
    """The header of the file that the model will be saved to: names and offsets in it count, too."""

    def __init__(self, model: PreTrainedModel, targets: list[Target], bits: float) -> None:
        compressed = {target.parameter for target in targets}
        rest = sum(p.numel() * p.element_size() for p in model.parameters() if p not in compressed)
        self._end = rest + int(bits * sum(p.numel() for p in compressed) / 8)  # about, for the number of its digits
        numbered = {target.name + SUFFIX: torch.tensor([i]) for i, target in enumerate(targets)}
        saved = revert_weight_conversion(model, numbered)  # transformers may save under older names
        self._names = {targets[int(number)].name: name for name, number in saved.items()}

    def entry(self, target: Target, size: int) -> int:
        """Return the bytes of the entry of a weight that is packed into ``size`` bytes."""
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [self._end, self._end]}
        return entry_bytes(self._names[target.name], entry)


class Job:
    """One run over the weights of a model: what is known of each, and its result so far."""

    def __init__(
        self,
        config: SQFConfig,
        bits: float,
        metrics: MetricOf,
        header: Header,
        workspace: Workspace | None,
        ranks: Ranks,
    ) -> None:
        self.config, self.bits, self.metrics, self.header = config, bits, metrics, header
        self.workspace, self.ranks = workspace, ranks
        self.problem = self._as_it_is
        self.packed: dict[str, Tensor] = {}
        self.curves: dict[str, RateCurve] = {}
        self.largest = 0
        self._read = 0

    def prepare(self, targets: list[Target], dense: dict[str, str]) -> list[Target]:
        """Read every weight once: check it, sample it, and sort out what is too small to gain.

        Raises:
            ValueError: a weight is not finite or not in memory, or the bits of a group cannot be reached.
        """
        self.largest, kept = max((target.parameter.numel() for target in targets), default=0), []
        for target, curve in zip(targets, self._share_out(targets, self._curve), strict=True):
            element = 8 * target.parameter.element_size()
            if curve.overhead + self._bits(target) * target.parameter.numel() >= element * target.parameter.numel():
                dense[target.name] = SMALL
            else:
                self.curves[target.name] = curve
                kept.append(target)
        if not kept:
            raise ValueError("the model has no weight that can be compressed")
        for group, members in _groups(kept).items():
            curves = [self.curves[t.name] for t in members]
            count, bits = sum(curve.count for curve in curves), self._bits(members[0])
            if (least := smallest(curves)) > bits * count:
                where = "bits" if group is None else f"overrides[{group!r}]: bits"
                raise ValueError(
                    f"{where}={bits} cannot be reached; the smallest for these weights is {least / count:.3f}"
                )
        return kept

    def _as_it_is(self, target: Target) -> tuple[list[Tensor], list[Metric]]:
        """Return what is to be approximated: a weight's matrices, (m, n) each, and their metrics."""
        matrices = target.matrices()
        return matrices, self.metrics(target.name, matrices)

    def _curve(self, target: Target) -> RateCurve:
        """Read a weight and return what it costs."""
        _check_finite(target)
        matrices, metrics = self._as_it_is(target)
        side = self._side_information(target, matrices, metrics)
        overhead = 8.0 * (side + self.header.entry(target, 10**4))
        curve = RateCurve(matrices, metrics, overhead, self.config.trellis is not None)
        self._done_with(target)
        return curve

    def run(self, targets: list[Target]) -> dict[str, Tensor]:
        """Solve all weights to the bits of their groups; return the packed bytes of each."""
        with self._budgets(targets) as solve:
            self._solve_in_rounds(targets, solve)
        return self.packed

    def run_in_sequence(self, targets: list[Target], sequence: Sequential) -> dict[str, Tensor]:
        """Solve all weights as :meth:`run` does, each stage of the model on what those before it give."""
        self.problem = sequence.problem
        with self._budgets(targets) as solve:
            self._solve_in_rounds(sequence.outside, solve)
            sequence.leave(sequence.outside, self.packed)
            for stage in sequence.stages:
                sequence.enter(stage)
                solve(stage.targets)
                sequence.leave(stage.targets, self.packed)
        return self.packed

    def _solve_in_rounds(self, targets: Sequence[Target], solve: Callable[[Sequence[Target]], None]) -> None:
        for members in _groups(targets).values():
            for indices in rounds([self.curves[t.name].count for t in members]):
                solve([members[index] for index in indices])

    @contextmanager
    def _budgets(self, targets: list[Target]) -> Iterator[Callable[[Sequence[Target]], None]]:
        """Yield a function that solves some weights within the bits of their groups; in the end all must be solved."""
        hidden = not self.ranks.first
        with transformers_logging.tqdm(total=len(targets), desc="Compressing weights", disable=hidden) as bar:
            groups = _groups(targets)
            budgets: dict[str | None, Budget] = {}
            places: dict[str, int] = {}
            for group, members in groups.items():
                curves = [self.curves[t.name] for t in members]
                budgets[group] = Budget(curves, self._bits(members[0]) * sum(c.count for c in curves))
                places |= {t.name: index for index, t in enumerate(members)}

            def solve_round(group: str | None, asked: list[tuple[int, float]]) -> list[int]:
                before = len(self.packed)
                sizes = self._solve_round([(groups[group][index], step) for index, step in asked])
                bar.update(len(self.packed) - before)  # what is solved again counts once
                return sizes

            def solve(some: Sequence[Target]) -> None:
                for group, members in _groups(some).items():
                    budgets[group].solve([places[t.name] for t in members], partial(solve_round, group))

            yield solve
            for group, budget in budgets.items():
                budget.settle(partial(solve_round, group))

    def _solve_round(self, asked: list[tuple[Target, float]]) -> list[int]:
        """Solve weights at their noise steps, each on one rank; keep the bytes on all, return the bits of each."""
        targets, steps = [target for target, _ in asked], {target.name: step for target, step in asked}
        sizes = self._share_out(targets, lambda target: self._solve(target, steps[target.name]))
        owners = self.ranks.owners([target.parameter.numel() for target in targets])
        for (target, step), owner, size in zip(asked, owners, sizes, strict=True):
            if self.workspace is None:
                mine = self.packed[target.name] if owner == self.ranks.rank else empty_bytes(size)
                self.packed[target.name] = self.ranks.broadcast(mine, owner)
            elif owner != self.ranks.rank:
                self.packed[target.name] = self.workspace.of_other(target.name, step)
        return [8 * (size + self.header.entry(t, size)) for (t, _), size in zip(asked, sizes, strict=True)]

    def _share_out(self, targets: list[Target], work: Callable[[Target], Result]) -> list[Result]:
        """Return what ``work`` returned for each weight. Small ones run side by side, up to the size of the largest."""
        sizes = [target.parameter.numel() for target in targets]
        return self.ranks.share_out(targets, sizes, work, lambda target: target.name, max(self.largest, _ROOM))

    def _bits(self, target: Target) -> float:
        return float(target.options.get("bits", self.bits))  # type: ignore[arg-type]

    def _solve(self, target: Target, step: float) -> int:
        """Solve a weight at a noise step, unless a run before did; keep its packed bytes, return their number."""
        packed = self.workspace.get(target.name, step) if self.workspace is not None else None
        if packed is None:
            packed = self._packed(target, step)
            if self.workspace is not None:
                packed = self.workspace.put(target.name, step, packed)
        self.packed[target.name] = packed
        return packed.numel()

    def _packed(self, target: Target, step: float) -> Tensor:
        structure = str(target.options.get("structure", self.config.structure))
        factors = []
        for matrix, metric in zip(*self.problem(target), strict=True):
            options = self.config.block, self.config.seed, target.name, self.config.trellis or 0
            found = solve(matrix, metric, step, structure, *options)
            factors.append(found.factors)
        self._done_with(target)
        return pack(factors, target.name)

    def _done_with(self, target: Target) -> None:
        """Give back the memory of a dense weight that has been read, and of what was computed on the way."""
        release(target.parameter)
        self._read += target.parameter.numel()
        if self._read >= _TRIM:
            trim()
            self._read = 0

    def _side_information(self, target: Target, matrices: list[Tensor], metrics: list[Metric]) -> int:
        """Return the bytes that a weight costs when all its codes are zero, from a few of its rows."""
        coarse = 2.0 ** (OCTAVES[1] + 16)
        factors = [
            solve(w[:8], m.of_rows(slice(8)), coarse, "grid", name=target.name).factors
            for w, m in zip(matrices, metrics, strict=True)
        ]
        return pack(factors, target.name).numel()


def _groups(targets: Sequence[Target]) -> dict[str | None, list[Target]]:
    groups: dict[str | None, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    return groups


def _check_finite(target: Target) -> None:
    weight = target.parameter.detach()
    if weight.is_meta:
        raise ValueError(
            f"{target.name} is offloaded: compress on load without offloading, save, then load again with it"
        )
    for chunk in weight.reshape(-1).split(_CHUNK):
        low, high = torch.aminmax(chunk)  # both carry NaN
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"{target.name} has NaN or infinite entries")
