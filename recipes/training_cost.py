"""What fine-tuning the factors takes beside fine-tuning the dense model: seconds a step and peak memory.

    python recipes/training_cost.py --text TEXT [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--bits 2]

The linear layers of the blocks are compressed, without data; then the dense model, the factors' scales (``light``) and
the factors with their codes (``latent``) are trained by the Trainer (AdamW, float32, cross entropy, ``--batch``
sequences of 512 tokens a step), each in a fresh process, in turns. Dense fine-tuning trains all weights, embeddings
included; training factors leaves dense embeddings as they are. Seconds are of wall-clock, medians of the steps after
the first; ratios are medians of the ratios within a turn; memory is the most that the process held above what it held
when all was imported. Run it with nothing else running. Writes ``results/training_cost.txt``.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

from memory import in_child

KEPT = Path(__file__).parent / "results" / "training_cost.txt"
SIDES = ("dense", "light", "latent")
CHILD = """
import json, sys, time, tempfile
from pathlib import Path
from memory import Memory
from statistics import median
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from calibrated_lm import cut
from hf_sqf import SQFCallback

side, folder, text, batch, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
memory, times = Memory(), []

class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        times.append(time.perf_counter() - self.began)

model = AutoModelForCausalLM.from_pretrained(folder)
sequences = cut(text.read_text("utf-8"), AutoTokenizer.from_pretrained(folder), 512, 512 * batch * steps)
with tempfile.TemporaryDirectory() as out:
    arguments = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )
    callbacks = [Clock()] if side == "dense" else [SQFCallback(side), Clock()]
    rows = [{"input_ids": ids, "labels": ids} for ids in sequences]
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
print(json.dumps({"seconds": median(times[1:]), "peak": memory.peak()}))
"""


def main() -> None:
    """Compress, train in turns, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="to train on")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=KEPT)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # not before the children are, in their processes

    from hf_sqf import SQFConfig

    packages = ", ".join(f"{name} {version(name)}" for name in ("hf_sqf", "torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        config = SQFConfig(bits=args.bits, structure="grid", include_embeddings=False)
        small = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
        rate = small.config.quantization_config.coverage["bits"]
        small.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
        del small
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(args.turns):
            for side in SIDES:
                source = args.model if side == "dense" else folder
                options = str(args.text), str(args.batch), str(args.steps)
                found[side].append(in_child(CHILD, side, source, *options))
                print(side, found[side][-1], flush=True)
    lines = [
        f"{args.model.rstrip('/').split('/')[-1]}, block linears at {rate:.2f} bits, {args.batch} x 512 tokens a step; "
        f"medians of {args.turns} turns",
        f"{date.today()}, Python {platform.python_version()}, {packages}, {platform.machine()} x {os.cpu_count()}",
        "",
        f"{'trained':<10}{'s a step':>10}{'x dense':>10}{'peak, MB':>10}{'x dense':>10}",
    ]
    for side in SIDES:
        pairs = list(zip(found[side], found["dense"], strict=True))
        row = f"{side:<10}"
        for key, unit, digits in (("seconds", 1.0, 2), ("peak", 1e6, 0)):
            row += f"{median(one[key] for one, _ in pairs) / unit:>10.{digits}f}"
            row += f"{median(one[key] / dense[key] for one, dense in pairs):>10.2f}"
        lines.append(row)
    print("\n".join(lines))
    args.keep.parent.mkdir(exist_ok=True, parents=True)
    args.keep.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
