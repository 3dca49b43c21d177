"""``compress``: a whole model, weight by weight, to the bits asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.base import _assign_is_quantized
from transformers.utils import logging as transformers_logging

from ..runtime.sqf_config import HUB_ID, QUANT_METHOD, SQFConfig, parse_size
from ..runtime.sqf_container import pack
from ..runtime.sqf_modules import SUFFIX
from ..runtime.sqf_quantizer import SQFQuantizer, place, settle
from ..runtime.sqf_size import compressed_bytes, entry_bytes
from .budget import OCTAVES, Budget, RateCurve, rounds, smallest
from .calibration_data import Calibration
from .collect import data_for, measure
from .factorize import solve
from .mapped import release, trim
from .metric import Metric
from .ranks import Ranks, empty_bytes
from .sequential import Sequential
from .statistics import Statistics, fingerprint
from .target_size import bits_for_size
from .targets import SMALL, Target, find_targets
from .workspace import Workspace

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
MetricOf = Callable[[str, list[Tensor]], list[Metric]]
"""(a weight's full name, its matrices (m, n)) -> the metric of each."""
_CHUNK = 1 << 20
_TRIM = 1 << 21  # entries of weights between two times that freed memory is handed back


class RelativeMetrics:
    """The metrics without data: squared error relative to the energy of the whole weight."""

    def __init__(self) -> None:
        self._known: dict[str, Metric] = {}

    def __call__(self, name: str, matrices: list[Tensor]) -> list[Metric]:
        """Return the metric of each matrix (m, n) of the weight ``name``."""
        if name not in self._known:
            self._known[name] = Metric.relative(*matrices)
        return [self._known[name]] * len(matrices)


def compress(
    model: PreTrainedModel,
    config: SQFConfig | None = None,
    metrics: MetricOf | None = None,
    workspace: Workspace | None = None,
) -> PreTrainedModel:
    """Compress a model in memory, in place.

    Where ``torch.distributed`` is initialised, all ranks call it alike, share the work and end with the same model.

    Args:
        model: any model of transformers with floating-point weights.
        config: what is asked for; without one, ``SQFConfig()``.
        metrics: the distance in which each weight is approximated; without, relative squared error.
        workspace: keeps results on disk; see :func:`hf_sqf.compress_checkpoint`.

    Returns:
        The model. ``model.config.quantization_config`` is a copy of the config whose ``coverage`` says what was done:
        ``weights`` (how many), ``bits`` (per parameter of theirs), ``parameters``, ``compressed`` (how many of them),
        and ``dense``, the weights of two or more dimensions that stayed as they are, each with the reason.

    Raises:
        ValueError: the model is quantized already, a weight is not finite, an option fits nothing in this model, or
            the bits cannot be reached. The model is then unchanged.
        RuntimeError: another rank stopped (says why), died, or did not come.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a model of transformers, got {type(model).__name__}")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized already; model.dequantize() makes it an ordinary one")
    quantizer = SQFQuantizer(config or SQFConfig(), pre_quantized=True)
    compress_weights(model, quantizer.quantization_config, metrics, workspace)
    marks = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": QUANT_METHOD}
    for name, value in marks.items():  # as transformers does on load
        setattr(model, name, value)
    model.config.quantization_config = quantizer.quantization_config
    _assign_is_quantized(model)
    settle(model, quantizer.quantization_config.runtime)
    trim()
    return model


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn a compressed model into an ordinary one with the decoded weights, in place; return it.

    Args:
        model: compressed, on load or by :func:`compress`.
        dtype: of the weights; by default the model's own.

    Raises:
        ValueError: the model is not compressed, or its weights are offloaded.
    """
    # By its name: the quantizer's class may be that of the files that came with the model.
    if getattr(model, "quantization_method", None) != QUANT_METHOD:
        raise ValueError("the model is not compressed")
    return model.dequantize(dtype=dtype)


def compress_weights(
    model: PreTrainedModel,
    config: SQFConfig,
    metrics: MetricOf | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Compress the weights of a model in place and write ``config.coverage``.

    Args:
        model: with dense weights.
        config: what is asked for.
        metrics: see :func:`compress`.
        workspace: see :func:`compress`.

    Raises:
        ValueError, RuntimeError: see :func:`compress`. No module is changed before all weights are solved.
    """
    ranks = Ranks.here()
    ranks.agree("the config", repr(config.to_dict()))
    ranks.agree("the model", fingerprint(model) if ranks.size > 1 else "")
    targets, dense = find_targets(model, config)
    data = data_for(model, config) if metrics is None else None
    statistics = _statistics(model, targets, config, data, workspace) if metrics is None else None
    metrics = statistics.metrics if statistics is not None else metrics or RelativeMetrics()
    bits = config.bits
    if config.target_size is not None:
        bits = bits_for_size(model, targets, parse_size(config.target_size))
    job = _Job(config, bits, metrics, _Header(model, targets, bits), workspace, ranks)
    targets = job.prepare(targets, dense)
    if config.sequential and data is not None and statistics is not None:
        with Sequential(model, targets, statistics, data.batches) as sequence:
            packed = job.run_in_sequence(targets, sequence)
    else:
        packed = job.run(targets)
    total = sum(p.numel() for p in model.parameters())
    sites = {}
    for target in targets:
        parameter = nn.Parameter(packed[target.name].to(target.parameter.device), requires_grad=False)
        for module, attribute, held in target.sites:
            sites[held.name] = module, attribute, held, parameter
    place(model, sites)
    trim()
    if any(target.held.stacked for target in targets):
        model.set_experts_implementation("eager")
    config.coverage = _coverage(targets, 8.0 * compressed_bytes(model), dense, total)
    if statistics is not None:
        config.coverage["calibration"] = statistics.summary()
    config.base_model = config.base_model or _hub_id(model.name_or_path or "")
    config.fidelity = None
    _log(config.coverage)


def _statistics(
    model: PreTrainedModel,
    targets: list[Target],
    config: SQFConfig,
    data: Calibration | None,
    workspace: Workspace | None,
) -> Statistics | None:
    known = workspace.statistics() if workspace is not None else None
    if known is not None:
        return known
    found = measure(model, targets, config, data)
    if found is not None and workspace is not None:
        Ranks.here().from_first(lambda: workspace.keep_statistics(found))
    return found


class _Header:
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


class _Job:
    """One run over the weights of a model: what is known of each, and its result so far."""

    def __init__(
        self,
        config: SQFConfig,
        bits: float,
        metrics: MetricOf,
        header: _Header,
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
                sizes = self._solve_round([(groups[group][index], step) for index, step in asked])
                bar.update(len(self.packed) - bar.n)
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
        """Return what ``work`` returned for each weight. As many run at a time as are no larger than the largest."""
        sizes = [target.parameter.numel() for target in targets]
        return self.ranks.share_out(targets, sizes, work, lambda target: target.name, self.largest)

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


def _coverage(targets: list[Target], size: float, dense: dict[str, str], total: int) -> dict[str, Any]:
    compressed = sum(target.parameter.numel() for target in targets)
    return {
        "weights": len(targets),
        "bits": round(size / compressed, 4),
        "parameters": total,
        "compressed": compressed,
        "dense": dict(sorted(dense.items())),
    }


def _hub_id(name: str) -> str | None:
    """Return what a model was loaded from, unless that is a folder of this machine."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _log(coverage: dict[str, Any]) -> None:
    share = 100.0 * coverage["compressed"] / coverage["parameters"]
    logger.info("compressed %.2f%% of the parameters to %.3f bits each", share, coverage["bits"])
    for name, reason in coverage["dense"].items():
        logger.info("left as it is: %s (%s)", name, reason)
