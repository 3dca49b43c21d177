"""``compress``: a whole model, weight by weight, to the bits asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import _assign_is_quantized

from ..runtime.sqf_config import HUB_ID, QUANT_METHOD, SQFConfig, parse_size
from ..runtime.sqf_memory import trim
from ..runtime.sqf_quantizer import SQFQuantizer, place, settle
from ..runtime.sqf_size import compressed_bytes
from .calibration_data import Calibration
from .collect import data_for, measure
from .job import Header, Job, MetricOf
from .metric import Metric
from .ranks import Ranks
from .sequential import Sequential
from .statistics import Statistics, fingerprint
from .target_size import bits_for_size
from .targets import Target, find_targets
from .workspace import Workspace

logger = logging.getLogger(__name__)


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
    # In one pass only measuring needs the data, and gets it itself, unless statistics are known.
    data = data_for(model, config) if metrics is None and config.sequential else None
    statistics = _statistics(model, targets, config, data, workspace) if metrics is None else None
    metrics = statistics.metrics if statistics is not None else metrics or RelativeMetrics()
    bits = config.bits
    if config.target_size is not None:
        bits = bits_for_size(model, targets, parse_size(config.target_size))
    job = Job(config, bits, metrics, Header(model, targets, bits), workspace, ranks)
    targets = job.prepare(targets, dense)
    if data is not None and statistics is not None:
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
    found = measure(model, targets, config, data, again=config.sequential)
    if found is not None and workspace is not None:
        Ranks.here().from_first(lambda: workspace.keep_statistics(found))
    return found


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
