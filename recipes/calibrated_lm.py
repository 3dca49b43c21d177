"""Calibrated compression of a language model beside round-to-nearest and GPTQ: bits in the file against KL divergence.

    python recipes/calibrated_lm.py --calibration TEXT --dev TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct]

The KL divergence is that of the original's predictions from the compressed model's, in nats per token, on
non-overlapping sequences of two texts: ``--dev``, of the calibration text's kind, and Python's ``pydoc_data.topics``,
of another. All linear layers of the blocks are compressed; a last row adds the embeddings. The table is kept in
``results/calibrated_lm.txt``.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import torch
from equal_quality import saved_bits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_sqf
from hf_sqf import SQFConfig, compress
from hf_sqf.compress.collect import measure
from hf_sqf.compress.targets import find_targets

KEPT = Path(__file__).parent / "results" / "calibrated_lm.txt"
GROUP = 64
"""Columns that share a scale in the baselines."""


def round_group(weights: Tensor, bits: int) -> tuple[Tensor, Tensor, int]:
    """Return scale (m, 1), zero point (m, 1) and the largest code of one group of columns (m, GROUP), asymmetric."""
    low, high, most = (
        weights.amin(1, keepdim=True).clamp_max(0),
        weights.amax(1, keepdim=True).clamp_min(0),
        2**bits - 1,
    )
    scale = ((high - low) / most).clamp_min(1e-8).half().float()
    return scale, (-low / scale).round().clamp(0, most), most


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return W (m, n) rounded to ``bits`` bits in groups of columns."""
    out = torch.empty_like(weight)
    for at in range(0, weight.shape[1], GROUP):
        group = weight[:, at : at + GROUP]
        scale, zero, most = round_group(group, bits)
        out[:, at : at + GROUP] = ((group / scale + zero).round().clamp(0, most) - zero) * scale
    return out


def gptq(weight: Tensor, bits: int, H: Tensor) -> Tensor:
    """Return W (m, n) rounded by GPTQ (Frantar et al., arXiv 2210.17323), damped by 1% of the mean of H's diagonal."""
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    w, out = weight.clone(), torch.empty_like(weight)
    for at in range(0, weight.shape[1], GROUP):
        end = min(at + GROUP, weight.shape[1])
        scale, zero, most = round_group(w[:, at:end], bits)
        errors = torch.zeros_like(w[:, at:end])
        for j in range(at, end):
            column = w[:, j : j + 1]
            out[:, j : j + 1] = ((column / scale + zero).round().clamp(0, most) - zero) * scale
            errors[:, j - at] = (w[:, j] - out[:, j]) / upper[j, j]
            w[:, j:end] -= errors[:, j - at, None] * upper[j, j:end]
        w[:, end:] -= errors @ upper[at:end, end:]
    return out


def baseline_bits(bits: int) -> float:
    """Return the bits per weight of the baselines: codes, a scale in 16 bits and a zero point for each group."""
    return bits + (16 + bits) / GROUP


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def input_moments(model: PreTrainedModel, sequences: Tensor) -> dict[str, Tensor]:
    """Return ``E[x x^T]`` of every block linear's inputs."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x / sequences.numel()

        return hook

    handles = [module.register_forward_hook(add(name)) for name, module in block_linears(model).items()]
    for sequence in sequences:
        model(sequence[None])
    for handle in handles:
        handle.remove()
    return sums


class Divergence:
    """The KL divergence from an original's predictions on a text, whose log-probabilities are kept."""

    def __init__(self, original: PreTrainedModel, sequences: Tensor) -> None:
        self.sequences = sequences
        self.expected = [self._log_probabilities(original, s).half() for s in sequences]

    @staticmethod
    @torch.no_grad()
    def _log_probabilities(model: PreTrainedModel, sequence: Tensor) -> Tensor:
        return model(sequence[None]).logits[0].log_softmax(-1)

    def of(self, model: PreTrainedModel) -> float:
        """Return nats per token."""
        total = 0.0
        for sequence, kept in zip(self.sequences, self.expected, strict=True):
            p = kept.float().log_softmax(-1)  # what half precision lost of their sum
            total += float((p.exp() * (p - self._log_probabilities(model, sequence))).sum())
        return total / self.sequences.numel()


def cut(text: str, tokenizer: object, context: int, tokens: int) -> Tensor:
    """Return a text's token ids, (count, context), the first ``tokens`` of them."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]  # type: ignore[operator]
    count = min(len(ids), tokens) // context
    return ids[: count * context].reshape(count, context)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--dev", type=Path, required=True, help="text of the same kind to measure on")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.05, 2.5, 2.65, 3.0])
    parser.add_argument("--target-size", default="55MB", help="of the whole model, embeddings included")
    parser.add_argument("--structure", default="auto", help="grid alone takes less time")
    parser.add_argument(
        "--scalar",
        type=float,
        nargs="*",
        default=[2.1, 2.4, 2.8, 3.2],
        help="bits at which to compress without a trellis, too: what it saves is a row of the table",
    )
    parser.add_argument("--scalar-structure", default="pgd", help="without a trellis; pgd is the grid with a dead zone")
    parser.add_argument("--only-trellis", action="store_true", help="leave out the baselines and the embeddings")
    parser.add_argument("--one-pass", action="store_true", help="sequential=False, which takes less time")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="to measure on, of each text")
    parser.add_argument("--statistics", type=Path, help="file to keep the statistics in, or to take them from")
    parser.add_argument("--keep", type=Path, default=KEPT)
    return parser.parse_args()


def main() -> None:
    """Measure, print and keep the table."""
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(args.model).eval()

    model = load()
    other = "\n".join(topics[name] for name in sorted(topics))
    texts = [cut(text, tokenizer, args.context, args.tokens) for text in (args.dev.read_text("utf-8"), other)]
    measures = [Divergence(model, sequences) for sequences in texts]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numba"))
    packages = f"hf_sqf {hf_sqf.__version__}, {packages}"
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}: KL divergence from the original, nats per token.",
        f"Context {args.context}, {texts[0].numel()} tokens of the held-out text of the calibration's kind, "
        f"{texts[1].numel()} of pydoc_data.topics.",
        f"Calibrated on {args.samples} sequences. {date.today()}, Python {platform.python_version()}, {packages}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}",
        "",
        f"{'method':<34}{'bits':>7}{'file MB':>9}{'same kind':>11}{'other':>9}{'seconds':>9}",
    ]
    print("\n".join(lines), flush=True)

    def note(
        method: str, bits: float, size: float | None, model: PreTrainedModel, seconds: float
    ) -> tuple[float, float]:
        divergences = [measure.of(model) for measure in measures]
        megabytes = f"{size / 1e6:>9.1f}" if size else f"{'':>9}"
        lines.append(f"{method:<34}{bits:>7.3f}{megabytes}{divergences[0]:>11.4f}{divergences[1]:>9.4f}{seconds:>9.0f}")
        print(lines[-1], flush=True)
        args.keep.parent.mkdir(exist_ok=True)
        args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return divergences[0], divergences[1]

    calibration = args.calibration.read_text("utf-8")
    moments = input_moments(model, cut(calibration, tokenizer, args.context, args.samples * args.context))
    for bits in () if args.only_trellis else (4, 3):
        for method in ("round to nearest, groups of 64", "GPTQ, groups of 64"):
            started, model = time.monotonic(), load()
            for name, linear in block_linears(model).items():
                w = linear.weight.detach()
                new = gptq(w, bits, moments[name]) if "GPTQ" in method else round_to_nearest(w, bits)
                linear.weight = nn.Parameter(new)
            note(method, baseline_bits(bits), None, model, time.monotonic() - started)
    del moments

    started, model = time.monotonic(), load()
    data: dict[str, object] = {
        "dataset": [calibration],
        "tokenizer": tokenizer,
        "samples": args.samples,
        "context": args.context,
    }
    data["sequential"] = not args.one_pass
    config = SQFConfig(**data)
    if args.statistics is not None and args.statistics.exists():
        config = SQFConfig(statistics=args.statistics)
    statistics = measure(model, find_targets(model, config)[0], config)
    assert statistics is not None
    if args.statistics is not None and not args.statistics.exists():
        statistics.save(args.statistics)
    lines.append(f"statistics: {time.monotonic() - started:.0f} s")
    linears: dict[str, object] = {"include_embeddings": False}
    asked = [{"bits": bits, **linears} for bits in args.bits]
    asked += [{"bits": bits, "trellis": None, "structure": args.scalar_structure, **linears} for bits in args.scalar]
    asked += [] if args.only_trellis else [{"target_size": args.target_size}]
    curves: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for options in asked:
        started, model = time.monotonic(), load()
        compress(model, SQFConfig(**{**data, "statistics": statistics, "structure": args.structure, **options}))
        seconds = time.monotonic() - started
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        method = f"hf_sqf, {options.get('structure', args.structure)}"
        method += ", one pass" * args.one_pass
        method += ", scalar" * ("trellis" in options) + ", with embeddings" * ("bits" not in options)
        rate = model.config.quantization_config.coverage["bits"]
        divergences = note(method, rate, size, model, seconds)
        if "bits" in options:
            curves["trellis" not in options].append((rate, *divergences))
    if curves[False]:
        lines += saved_bits(curves[False], curves[True])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    lines.append(f"peak resident memory of this run, kept log-probabilities included: {peak:.0f} MB")
    args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
