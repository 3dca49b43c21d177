"""The same model through what people use to make models small, on one machine: bytes, quality, time, memory, speed.

    pip install -e '.[bench]'
    python recipes/compare_peers.py --text TEXT --calibration TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct]
    python recipes/compare_peers.py ... --sides "llm-compressor GPTQ, 4 bits" --add

``--add`` joins further sides to the kept tables: what takes too long for one run, or other versions of the packages, as
llm-compressor does, which refuses the newest transformers. Every run decodes with dense float32, too, and ratios are
to that of the same run. On CPUs GPTQModel takes ``GPTQMODEL_CPU_WORKERS=2`` in the environment,
and transformers needs ``optimum`` to load what it made.

Each side makes its model in a process of its own: seconds and peak memory are those of that, from loading on, the
side's own imports included. Bytes are those of a saved state, shared tensors once; the KL divergence is that of the
original's predictions, in nats per token, on ``--text``. Sides that calibrate do so on ``--calibration``, 32 sequences
of 512 tokens. Then decoding is timed, greedy, in one process: sides take turns within a repetition, speeds are medians,
and ratios are medians of the ratios within a repetition; what is not packed is as fast as dense and takes no part. A
side that does not run, or takes more than ``--minutes``, is listed with its error. Writes ``results/peers.txt`` and
``results/peers.json``, which ``size_quality.py`` plots, or files of another name (``--name``, for another machine).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from calibrated_lm import Divergence, block_linears, cut, gptq, input_moments, round_to_nearest
from memory import Memory, in_child
from speed import generate, processor, ratios, table, take_turns
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_sqf import SQFConfig

KEPT = Path(__file__).parent / "results"
PACKAGES = (
    *("hf_sqf", "torch", "transformers", "optimum-quanto", "bitsandbytes", "hqq", "torchao"),
    *("auto-round", "llmcompressor", "gptqmodel", "llama-cpp-python"),
)
SAMPLES, CONTEXT = 32, 512
AUTO_ROUND_STEPS = 50
"""Of each block; its default is 200."""
BASE = "dense float32"
Record = dict[str, Any]
"""What is kept: ``measured``, the ``runs`` with their sides and versions, ``rows``, and ``failed``: side -> error."""
CHILD = """
import sys, time
from memory import Memory
from pathlib import Path
import compare_peers

name, model, calibration, text, tokens, folder = sys.argv[1:]
print(compare_peers.made(name, model, Path(calibration), Path(text), int(tokens), Path(folder), Memory()))
"""


@dataclass(frozen=True)
class Data:
    """What a side may calibrate on.

    Attributes:
        text: all of it.
        tokenizer: of the model.
    """

    text: str
    tokenizer: Any

    def sequences(self) -> Tensor:
        """Return token ids, (SAMPLES, CONTEXT)."""
        return cut(self.text, self.tokenizer, CONTEXT, SAMPLES * CONTEXT)


def quanto(model: str, bits: str) -> PreTrainedModel:
    """Load with optimum-quanto."""
    from transformers import QuantoConfig

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=QuantoConfig(weights=bits)
    )


def bitsandbytes(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load with bitsandbytes, NF4; on processors that do so, it multiplies in bfloat16 whatever the dtype."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=config, device_map="cpu")


def hqq(model: str) -> PreTrainedModel:
    """Load, and replace linear layers with HQQ's own loader, 4 bits in groups of 64: transformers 5.23 refuses it."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(loaded, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return loaded


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


def gptq_rounded(model: str, data: Data, bits: int) -> PreTrainedModel:
    """Load, and round with GPTQ in groups of 64, to inputs as they were; nothing is packed."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    moments = input_moments(loaded, data.sequences())
    for name, linear in block_linears(loaded).items():
        linear.weight = nn.Parameter(gptq(linear.weight.detach(), bits, moments[name]))
    return loaded


def auto_round(model: str, data: Data, folder: Path) -> PreTrainedModel:
    """Compress with AutoRound, 4 bits in groups of 128; load what it saved.

    A quarter of its steps, one sequence each instead of eight: its defaults take hours on two cores.
    """
    from auto_round import AutoRound

    texts = data.tokenizer.batch_decode(data.sequences())
    made = AutoRound(
        model, data.tokenizer, scheme="W4A16", dataset=texts, nsamples=SAMPLES, seqlen=CONTEXT, device_map="cpu",
        iters=AUTO_ROUND_STEPS, batch_size=1,
    )  # fmt: skip
    parent = folder.with_name("auto_round")
    made.quantize_and_save(str(parent), format="auto_round")
    next(parent.rglob("config.json")).parent.rename(folder)  # it saves into a folder within, of a name of its own
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def llm_compressor(model: str, data: Data, folder: Path) -> PreTrainedModel:
    """Compress with llm-compressor's GPTQ, 4 bits in groups of 64; load what it saved."""
    import datasets
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    ids = [{"input_ids": some, "attention_mask": [1] * len(some)} for some in data.sequences().tolist()]
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64, "strategy": "group"}}}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oneshot(
        model=loaded,
        dataset=datasets.Dataset.from_list(ids),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=CONTEXT,
        num_calibration_samples=SAMPLES,
        output_dir=str(folder),
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def gptqmodel(model: str, data: Data, folder: Path) -> PreTrainedModel:
    """Compress with GPTQModel, 4 bits in groups of 64; load what it saved."""
    from gptqmodel import GPTQModel, QuantizeConfig

    made = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64))
    made.quantize(data.tokenizer.batch_decode(data.sequences()), batch_size=1)
    made.save(str(folder))
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def llama_cpp(model: str) -> PreTrainedModel:
    """Load with llama.cpp: here only to say why it does not run."""
    import llama_cpp

    raise NotImplementedError(f"llama-cpp-python {llama_cpp.__version__} is installed; its side is not written")


def ours(
    model: str, data: Data, bits: float, embeddings: bool, calibrated: bool, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """Compress on load with this library; as the others, leave the embeddings alone unless told otherwise."""
    if calibrated:
        options |= {"dataset": [data.text], "tokenizer": data.tokenizer, "samples": SAMPLES, "context": CONTEXT}
    config = SQFConfig(bits=bits, include_embeddings=embeddings, **options)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=config)


@dataclass(frozen=True)
class Side:
    """A way to make a model small.

    Attributes:
        make: (the original, data, a folder to keep things in) -> the model.
        packed: whether it runs from small weights, so that its speed says something.
    """

    make: Callable[[str, Data, Path], PreTrainedModel]
    packed: bool = True


def _ours(
    bits: float, embeddings: bool, calibrated: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Side:
    options = {"structure": "grid"} | options
    return Side(lambda model, data, folder: ours(model, data, bits, embeddings, calibrated, dtype, **options))


def _dense(dtype: torch.dtype) -> Side:
    return Side(lambda model, data, folder: AutoModelForCausalLM.from_pretrained(model, dtype=dtype))


SIDES: dict[str, Side] = {
    BASE: _dense(torch.float32),
    "dense bfloat16": _dense(torch.bfloat16),
    "round to nearest, 4 bits, not packed": Side(lambda model, data, folder: rounded(model), packed=False),
    "GPTQ, 4 bits, not packed": Side(lambda model, data, folder: gptq_rounded(model, data, 4), packed=False),
    "GPTQ, 3 bits, not packed": Side(lambda model, data, folder: gptq_rounded(model, data, 3), packed=False),
    "hf_sqf svd, 4 bits, linear layers": _ours(4.0, False, structure="svd"),
    "hf_sqf vq, 4 bits, linear layers": _ours(4.0, False, structure="vq", block=2),
    "hf_sqf, 4 bits, linear layers": _ours(4.0, False),
    "hf_sqf, 4 bits, all weights": _ours(4.0, True),
    "hf_sqf, 3 bits, all weights": _ours(3.0, True),
    "hf_sqf, 4 bits, all weights, bfloat16": _ours(4.0, True, dtype=torch.bfloat16),
    "hf_sqf, 2.5 bits, linear layers, calibrated": _ours(2.5, False, calibrated=True),
    "hf_sqf, 3.2 bits, all weights, calibrated": _ours(3.2, True, calibrated=True),
    "optimum-quanto int8": Side(lambda model, data, folder: quanto(model, "int8")),
    "optimum-quanto int4": Side(lambda model, data, folder: quanto(model, "int4")),
    "bitsandbytes NF4": Side(lambda model, data, folder: bitsandbytes(model, torch.float32)),
    "bitsandbytes NF4, bfloat16": Side(lambda model, data, folder: bitsandbytes(model, torch.bfloat16)),
    "HQQ, 4 bits": Side(lambda model, data, folder: hqq(model)),
    "torchao int8": Side(lambda model, data, folder: torchao(model)),
    f"AutoRound, 4 bits, {AUTO_ROUND_STEPS} steps": Side(auto_round),
    "llm-compressor GPTQ, 4 bits": Side(llm_compressor),
    "GPTQModel, 4 bits": Side(gptqmodel),
    "llama.cpp": Side(lambda model, data, folder: llama_cpp(model)),
}


def saved_bytes(model: PreTrainedModel) -> int:
    """Return the size of a saved state dict, packed weights included, tied ones once."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def last_line(errors: str) -> str:
    """Return what a traceback ends with."""
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "killed"


def made(name: str, model: str, calibration: Path, text: Path, tokens: int, folder: Path, memory: Memory) -> str:
    """Make a side's model in this process and measure it; return the row as JSON. It is saved where it can be."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = Data(calibration.read_text("utf-8"), tokenizer)
    started = time.perf_counter()
    small = SIDES[name].make(model, data, folder).eval()
    row = {"side": name, "MB": 0.0, "KL": 0.0, "seconds": time.perf_counter() - started, "peak MB": memory.peak() / 1e6}
    row["MB"] = saved_bytes(small) / 1e6
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    row["KL"] = Divergence(original, cut(text.read_text("utf-8"), tokenizer, CONTEXT, tokens)).of(small)
    if isinstance(getattr(small.config, "quantization_config", None), SQFConfig):
        small.save_pretrained(folder)
    return json.dumps(row)


def speeds(models: dict[str, PreTrainedModel], rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Add tokens a second, and ratios to dense, to the rows."""
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
                rows[name][f"x dense at {batch}"] = ratios(found, BASE, name)[0]


def measured(args: argparse.Namespace) -> str:
    """Return what runs must have in common whose rows are to stand in one table."""
    model, machine = args.model.rstrip("/").split("/")[-1], f"{platform.machine()} x {os.cpu_count()}"
    return f"{model}, {machine}, threads {torch.get_num_threads()}, KL on {args.tokens} tokens"


def this_run(sides: list[str]) -> dict[str, Any]:
    """Return when sides were measured, on what, and with which versions."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"date": str(date.today()), "processor": processor(), "versions": installed, "sides": sides}


def joined(before: Record | None, now: Record) -> Record:
    """Return a record with what an earlier one has of sides that were not measured or tried again."""
    if before is None:
        return now | {"rows": list(now["rows"].values())}
    again = now["runs"][0]["sides"]
    rows = {row["side"]: row for row in before["rows"] if row["side"] not in again} | now["rows"]
    if BASE in now["rows"]:  # stays that of the first run; ratios are to the one of the run itself
        rows[BASE] = next((row for row in before["rows"] if row["side"] == BASE), now["rows"][BASE])
    failed = {name: error for name, error in before["failed"].items() if name not in again} | now["failed"]
    runs = [{**run, "sides": [s for s in run["sides"] if s == BASE or s not in again]} for run in before["runs"]]
    runs = [run for number, run in enumerate(runs) if not number or run["sides"] != [BASE]]
    return now | {
        "runs": [*runs, *now["runs"]],
        "rows": [rows[name] for name in SIDES if name in rows],
        "failed": failed,
    }


def as_text(record: Record) -> str:
    """Return the tables as they are kept; empty where a side was not measured for that."""
    heads = list(dict.fromkeys(name for row in record["rows"] for name in row))
    lines, before = [record["measured"]], None
    for run in record["runs"]:
        versions = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
        which = "" if len(record["runs"]) == 1 else f" ({'; '.join(run['sides'])})"
        on = f", {run['processor']}" if "processor" in run else ""
        lines.append(f"{run['date']}{on}: {'the same' if versions == before else versions}{which}")
        before = versions
    lines += [table("", [{name: row.get(name, "") for name in heads} for row in record["rows"]])]
    return "\n".join(lines + [f"{name}: did not run: {error}" for name, error in record["failed"].items()]) + "\n"


def main() -> None:
    """Measure, print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="to measure the KL divergence on")
    parser.add_argument("--calibration", type=Path, required=True, help="for the sides that calibrate")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--without", nargs="+", choices=SIDES, default=[], metavar="SIDE", help="leave these out")
    parser.add_argument("--add", action="store_true", help="to what is kept, in place of the same sides there")
    parser.add_argument("--name", default="peers", help="of the results: another one for another machine's")
    parser.add_argument("--minutes", type=float, default=60.0, help="that a side may take to make its model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 8], help="to generate, for each batch")
    args = parser.parse_args()
    sides = [name for name in SIDES if name == BASE or (name in args.sides and name not in args.without)]
    before = json.loads((KEPT / f"{args.name}.json").read_text("utf-8")) if args.add else None
    if before is not None and before.get("measured") != measured(args):
        parser.error(f"--add takes what was measured alike: {before.get('measured')}, now {measured(args)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = Data(args.calibration.read_text("utf-8"), AutoTokenizer.from_pretrained(args.model))
    models: dict[str, PreTrainedModel] = {}
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sides:
            kept = Path(folder) / name.replace(" ", "_")
            given = name, args.model, str(args.calibration), str(args.text), str(args.tokens), str(kept)
            try:
                rows[name] = in_child(CHILD, *given, seconds=60.0 * args.minutes)
            except subprocess.CalledProcessError as error:
                failed[name] = last_line(error.stderr)
            except subprocess.TimeoutExpired:
                failed[name] = f"was not done after {args.minutes:g} minutes"
            if name in failed:
                print(f"{name}: did not run: {failed[name]}", flush=True)
                continue
            print(rows[name], flush=True)
            if SIDES[name].packed:
                saved = (kept / "config.json").exists()
                models[name] = (
                    AutoModelForCausalLM.from_pretrained(kept, device_map="cpu")
                    if saved
                    else SIDES[name].make(args.model, data, kept)
                ).eval()
        speeds(models, rows, args)
    record = joined(before, {"measured": measured(args), "runs": [this_run(sides)], "rows": rows, "failed": failed})
    print(as_text(record))
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{args.name}.txt").write_text(as_text(record), encoding="utf-8")
    (KEPT / f"{args.name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
