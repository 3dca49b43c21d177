"""What each part of calibration gives, one change at a time: KL divergence of a language model at equal bits.

    python recipes/calibration_trials.py --calibration TEXT --dev TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct]

Every variant rounds all block linears with one noise step c, at two values of it; bits are the codec's ideal lengths,
and the divergence is interpolated (its logarithm, over bits) to ``--bits``. Texts are those of ``calibrated_lm.py``, of
which a few thousand tokens suffice to compare. In sequence, half of the data is run, as it is by default. The table is
kept in ``results/calibration_trials.txt``.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import torch
from calibrated_lm import Divergence, block_linears, cut
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_sqf import SQFConfig
from hf_sqf.compress.blocks import Batch
from hf_sqf.compress.calibration_data import Calibration
from hf_sqf.compress.collect import data_for, measure
from hf_sqf.compress.dependent import solve_dependent
from hf_sqf.compress.factorize import solve
from hf_sqf.compress.grid import grid_scales
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.rate import term_bits
from hf_sqf.compress.rounding import ColumnRounder, nearest, round_in_metric
from hf_sqf.compress.sequential import Sequential
from hf_sqf.compress.statistics import Statistics
from hf_sqf.compress.targets import find_targets
from hf_sqf.runtime.sqf_container import pack

KEPT = Path(__file__).parent / "results" / "calibration_trials.txt"
Rounding = Callable[[Tensor, Metric, float], tuple[Tensor, float]]
"""(W, metric, c) -> (what W becomes, bits)."""


def scalar(weight: Tensor, metric: Metric, step: float, rounder: ColumnRounder = nearest) -> tuple[Tensor, float]:
    """Interference cancellation, each code to the nearest or as ``rounder`` has it."""
    scales = grid_scales(metric, step)
    codes = round_in_metric(weight, scales.step_values(), scales.row_values(), metric.cholesky(), rounder)
    term = scales.term(codes)
    return term.dense(), term_bits(term)


def dead_zone(weight: Tensor, metric: Metric, step: float) -> tuple[Tensor, float]:
    """Zero for targets up to 0.6 steps, not 0.5."""
    return scalar(weight, metric, step, lambda t, column: torch.where(t.abs() > 0.6, t.round(), 0.0))


def without_feedback(weight: Tensor, metric: Metric, step: float) -> tuple[Tensor, float]:
    """The same steps, but every entry rounded for itself."""
    scales = grid_scales(metric, step)
    term = scales.term(round_in_metric(weight, scales.step_values(), scales.row_values(), None))
    return term.dense(), term_bits(term)


def by_power(weight: Tensor, metric: Metric, step: float) -> tuple[Tensor, float]:
    """Columns in the order of their inputs' power, so that the strongest are rounded first."""
    assert metric.H is not None
    order = torch.argsort(metric.H.diagonal(), stable=True)
    dense, bits = scalar(weight[:, order], Metric(metric.H[order][:, order], metric.g), step)
    return dense[:, torch.argsort(order)], bits


def least_squares(weight: Tensor, metric: Metric, step: float) -> tuple[Tensor, float]:
    """Rows and steps found anew for the codes in closed form, not snapped to the logarithmic scale: a bound.

    Rows: ``r_i = w_i H v_i^T / v_i H v_i^T`` with ``v = z diag(s)``. Steps: with ``P = diag(g r) Z``,
    ``((P^T P) o H) s = diag(P^T diag(g) W H)``.
    """
    assert metric.H is not None
    scales = grid_scales(metric, step)
    codes = round_in_metric(weight, scales.step_values(), scales.row_values(), metric.cholesky())
    term, g = scales.term(codes), metric.row_weights().float()
    v = codes * scales.step_values()
    power = ((v @ metric.H) * v).sum(1)
    rows = torch.where(power > 0, ((v @ metric.H) * weight).sum(1) / power.clamp_min(1e-30), scales.row_values())
    p = (codes * (g * rows)[:, None]).double()
    normal = (p.T @ p) * metric.H.double()
    normal.diagonal().add_(1e-9 * normal.diagonal().mean())
    right = (p * ((weight * g[:, None]) @ metric.H).double()).sum(0)
    return codes * rows[:, None] * torch.linalg.solve(normal, right).float(), term_bits(term)


def trellis(states: int) -> Rounding:
    """Dependent quantization with so many states."""

    def along(weight: Tensor, metric: Metric, step: float) -> tuple[Tensor, float]:
        found = solve_dependent(weight, metric, step, states)
        return found.factors.dense(), found.bits

    return along


def shrunk(statistics: Statistics, a: float, b: float) -> Statistics:
    """Return statistics with constants for the shrinkage of H and of g^2."""
    return replace(statistics, shrinkage={k: b if k.endswith(":g") else a for k in statistics.shrinkage})


def one_row(statistics: Statistics) -> Statistics:
    """Return statistics whose rows all weigh alike within a weight."""
    return shrunk(statistics, 0.01, 1.0)


@dataclass(frozen=True)
class Trial:
    """A variant.

    Attributes:
        name: what is printed.
        statistics: their name.
        rounding: of a weight, in one pass.
        share: in sequence instead, and so much of the step that makes up for what came before.
    """

    name: str
    statistics: str
    rounding: Rounding = scalar
    share: float | None = None


TRIALS = (
    Trial("calibration text alone", "given"),
    Trial("own text alone", "own"),
    Trial("both (the default)", "both"),
    Trial("both, shrunk by 0.03 and 0.3", "constant"),
    Trial("both, not shrunk", "none"),
    Trial("both, rows of a weight alike", "rows"),
    Trial("both, no interference cancellation", "both", without_feedback),
    Trial("both, dead zone 0.6", "both", dead_zone),
    Trial("both, columns by power", "both", by_power),
    Trial("both, least squares after rounding", "both", least_squares),
    Trial("both, trellis of 8 states", "both", trellis(8)),
    Trial("both, trellis of 64 states", "both", trellis(64)),
    Trial("both, in sequence, inputs alone", "both", share=0.0),
    Trial("both, in sequence, half a step", "both", share=0.5),
    Trial("both, in sequence, 3/4 of a step", "both", share=0.75),
    Trial("both, in sequence, a quarter step", "both", share=0.25),
)


def apply(model: PreTrainedModel, weights: Mapping[str, Tensor], found: Statistics, trial: Trial, step: float) -> float:
    """Round a model's block linears, whose weights are given, in one pass; return bits per weight."""
    bits, linears = 0.0, block_linears(model)
    for name, weight in weights.items():
        (metric,) = found.metrics(f"{name}.weight", [weight])
        dense, cost = trial.rounding(weight, metric, step / found.typical**0.5)
        linears[name].weight.data.copy_(dense)
        bits += cost
    return bits / sum(weight.numel() for weight in weights.values())


def apply_in_sequence(
    model: PreTrainedModel, found: Statistics, batches: Sequence[Batch], share: float, step: float
) -> float:
    """Round a model's block linears, each on what those before it give; return bits per weight."""
    bits, dense = 0.0, {}
    targets = find_targets(model, SQFConfig(include_embeddings=False))[0]
    with Sequential(model, targets, found, batches, share) as sequence:
        for stage in sequence.stages:
            sequence.enter(stage)
            packed = {}
            for target in stage.targets:
                (weight,), (metric,) = sequence.problem(target)
                solution = solve(weight, metric, step / found.typical**0.5, "grid")
                packed[target.name] = pack([solution.factors], target.name)
                dense[target] = solution.factors.dense()
                bits += solution.bits
            sequence.leave(stage.targets, packed)
    for target, value in dense.items():
        target.parameter.data.copy_(value)
    return bits / sum(target.parameter.numel() for target in targets)


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--tokens", type=int, default=4096, help="to measure on, of each text")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--statistics", type=Path, help="folder to keep the statistics in, or to take them from")
    parser.add_argument("--trials", nargs="*", help="words in the names of the variants to run; all without")
    parser.add_argument("--keep", type=Path, default=KEPT)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
    weights = {name: linear.weight.clone() for name, linear in block_linears(model).items()}
    texts = [args.dev.read_text("utf-8"), "\n".join(topics[name] for name in sorted(topics))]
    measures = [Divergence(model, cut(text, tokenizer, 512, args.tokens)) for text in texts]

    known: dict[str, Statistics] = {}
    calibration: Calibration | None = None
    data = {"dataset": [args.calibration.read_text("utf-8")], "tokenizer": tokenizer, "samples": args.samples}
    sources = {"given": data | {"own_text": False}, "own": data | {"dataset": "self"}, "both": data}
    for name, options in sources.items():
        path = args.statistics / f"{name}.safetensors" if args.statistics else None
        calibration = data_for(model, SQFConfig(**options)) if name == "both" else None  # sequences run it again
        config = SQFConfig(statistics=path) if path is not None and path.exists() else SQFConfig(**options)
        measured = measure(model, find_targets(model, config)[0], config, calibration)
        assert measured is not None
        if path is not None and not path.exists():
            measured.save(path)
        known[name] = measured
    assert calibration is not None
    known |= {"constant": shrunk(known["both"], 0.03, 0.3), "none": shrunk(known["both"], 1e-4, 0.0)}
    known["rows"] = one_row(known["both"])

    header = f"{'':<38}{'bits':>7}{'same kind':>11}{'other':>9}{'bits':>8}{'same kind':>11}{'other':>9}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf_sqf", "torch", "transformers", "numba"))
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}, scalar rounding but for the rows of a trellis; {args.tokens} tokens "
        f"of each text. {date.today()}, {packages}, {platform.machine()}",
        f"KL divergence, nats per token, at two steps, and interpolated to {args.bits} bits.",
        "",
        header,
    ]
    lines[-1] += f"{f'at {args.bits}:':>10}{'other':>9}"
    print("\n".join(lines), flush=True)
    for trial in TRIALS:
        if args.trials and not any(word in trial.name for word in args.trials):
            continue
        row, points = f"{trial.name:<38}", []
        for step in (2.2e-4, 1.5e-4):
            if trial.share is None:
                bits = apply(model, weights, known[trial.statistics], trial, step)
            else:
                for name, linear in block_linears(model).items():
                    linear.weight.data.copy_(weights[name])
                bits = apply_in_sequence(model, known[trial.statistics], calibration.batches, trial.share, step)
            points.append((bits, [measure.of(model) for measure in measures]))
            row += f"{bits:>{7 if step > 2e-4 else 8}.3f}{points[-1][1][0]:>11.4f}{points[-1][1][1]:>9.4f}"
        for k, width in enumerate((10, 9)):
            (x0, y0), (x1, y1) = ((bits, math.log(values[k])) for bits, values in points)
            row += f"{math.exp(y0 + (args.bits - x0) * (y1 - y0) / (x1 - x0)):>{width}.4f}"
        lines.append(row)
        print(row, flush=True)
        args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
