"""The same model through what people use to make models small, on one machine: bytes, quality and speed.

    pip install -e '.[bench]'
    python recipes/compare_peers.py --text TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--tokens 2048]

Each side loads the model in its own way. Bytes are those of a saved state, shared tensors once; the KL divergence is
that of the original's predictions, in nats per token, on the text; decoding is greedy. Sides take turns within a
repetition, speeds are medians, and ratios are medians of the ratios within a repetition. A side that does not run is
listed with its error. hf_sqf compresses without data here, as the others do. Writes ``results/peers.txt`` and, for
whoever wants to plot it, ``results/peers.json``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from calibrated_lm import Divergence, block_linears, cut, round_to_nearest
from speed import generate, ratios, table, take_turns
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_sqf import SQFConfig

KEPT = Path(__file__).parent / "results"
PACKAGES = ("hf_sqf", "torch", "transformers", "optimum-quanto", "bitsandbytes", "hqq", "torchao")


def quanto(model: str, bits: str) -> PreTrainedModel:
    """Load with optimum-quanto."""
    from transformers import QuantoConfig

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=QuantoConfig(weights=bits)
    )


def bitsandbytes(model: str) -> PreTrainedModel:
    """Load with bitsandbytes, NF4."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )


def hqq(model: str) -> PreTrainedModel:
    """Load with HQQ, 4 bits in groups of 64."""
    from transformers import HqqConfig

    config = HqqConfig(nbits=4, group_size=64)
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )


def torchao(model: str) -> PreTrainedModel:
    """Load with torchao's int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantize_(loaded, Int8WeightOnlyConfig())
    return loaded


def rounded(model: str) -> PreTrainedModel:
    """Load, and round to 4 bits in groups of 64; nothing is packed."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for linear in block_linears(loaded).values():
        linear.weight = nn.Parameter(round_to_nearest(linear.weight.detach(), 4))
    return loaded


def ours(model: str, bits: float, embeddings: bool) -> PreTrainedModel:
    """Load with this library; as the others, leave the embeddings alone unless told otherwise."""
    config = SQFConfig(bits=bits, structure="grid", include_embeddings=embeddings)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=config)


SIDES: dict[str, Callable[[str], PreTrainedModel]] = {
    "dense float32": lambda model: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    "dense bfloat16": lambda model: AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
    "round to nearest, 4 bits, not packed": rounded,
    "hf_sqf, 3 bits, all weights": partial(ours, bits=3.0, embeddings=True),
    "hf_sqf, 4 bits, all weights": partial(ours, bits=4.0, embeddings=True),
    "hf_sqf, 4 bits, linear layers": partial(ours, bits=4.0, embeddings=False),
    "optimum-quanto int8": partial(quanto, bits="int8"),
    "optimum-quanto int4": partial(quanto, bits="int4"),
    "bitsandbytes NF4": bitsandbytes,
    "HQQ, 4 bits": hqq,
    "torchao int8": torchao,
}


def saved_bytes(model: PreTrainedModel) -> int:
    """Return the size of a saved state dict, packed weights included, tied ones once."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def main() -> None:
    """Measure, print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="to measure the KL divergence on")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 8], help="to generate, for each batch")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sequences = cut(args.text.read_text("utf-8"), tokenizer, 512, args.tokens)
    models: dict[str, PreTrainedModel] = {}
    rows: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    divergence: Divergence | None = None
    for name, load in SIDES.items():
        started = time.perf_counter()
        try:
            model = load(args.model).eval()
            seconds = time.perf_counter() - started
            divergence = divergence or Divergence(model, sequences)
            rows[name] = {"side": name, "MB": saved_bytes(model) / 1e6, "KL": divergence.of(model)}
            rows[name]["load s"] = seconds
            models[name] = model
        except Exception as error:  # whatever another library raises is a row of the table
            failed.append(f"{name}: did not run: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        print(rows.get(name, failed[-1:]), flush=True)
    with torch.no_grad():  # some of the others refuse inference mode
        for batch, count in zip(args.batches, args.new_tokens, strict=True):
            ids = torch.arange(100, 116)[None].repeat(batch, 1)
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
            options |= {"max_new_tokens": count, "min_new_tokens": count}
            calls: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                calls[name] = partial(generate, model, ids, options)
            found = take_turns(calls, args.repeats)
            for name in models:
                rows[name][f"tokens/s at {batch}"] = batch * count / median(wall for wall, _ in found[name])
                rows[name][f"x dense at {batch}"] = ratios(found, "dense float32", name)[0]
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"{package} not installed")
    title = f"{args.model.rstrip('/').split('/')[-1]}, {date.today()}, {platform.machine()} x {os.cpu_count()}, "
    title += f"threads {torch.get_num_threads()}, KL on {sequences.numel()} tokens; {', '.join(installed)}\n"
    text = "\n".join([title, table("", list(rows.values())), *failed]) + "\n"
    print(text)
    KEPT.mkdir(exist_ok=True)
    (KEPT / "peers.txt").write_text(text, encoding="utf-8")
    (KEPT / "peers.json").write_text(json.dumps({"rows": list(rows.values()), "failed": failed}, indent=1))


if __name__ == "__main__":
    main()
