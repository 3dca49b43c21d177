"""Where the bytes of a compressed model go: the same figures for a model and for the files it is saved to.

Everything in the files of safetensors is counted, the names and offsets in their headers as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from .sqf_codec import ideal_bits
from .sqf_container import TermHeader, records
from .sqf_factors import Factors, Term
from .sqf_model import saved_state
from .sqf_modules import SUFFIX

_DTYPES = {  # as safetensors names them, in the order in which it lays tensors out
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
Visit = Callable[[Factors], None]


@dataclass(frozen=True)
class SizeReport:
    """The accounts of a compressed model.

    Attributes:
        total_bytes: of all its files of safetensors, with the index if there is one.
        rows: one for each tensor and one for what remains of the files' headers; each with

            - ``name``; ``structure``: that of the factors, ``dense`` or ``file headers``
            - ``shape``: of the weight; ``matrices``: how many of that shape (experts), else 1
            - ``parameters``; ``sparsity``: fraction of zeros among the codes
            - ``bytes``, and in bits of these ``code_bits``, ``dictionary_bits`` (atoms), ``step_bits`` (of columns and
              rows) and ``header_bits``, the tensor's entry in the header of its file included
            - ``entropy_bits``: what the models of codes, dictionary and steps give as their ideal length
            - ``bits_per_weight``
    """

    total_bytes: int
    rows: list[dict[str, Any]]

    @property
    def compressed_rows(self) -> list[dict[str, Any]]:
        """The rows of the compressed weights."""
        return [row for row in self.rows if row["structure"] not in ("dense", "file headers")]

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the compressed weights."""
        return sum(row["bytes"] for row in self.compressed_rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the compressed weights for each of their parameters; NaN if there are none."""
        count = sum(row["parameters"] for row in self.compressed_rows)
        return 8 * self.compressed_bytes / count if count else math.nan

    def to_json(self) -> str:
        """Return all figures as JSON."""
        bits = None if math.isnan(self.bits_per_weight) else self.bits_per_weight
        return json.dumps({"total_bytes": self.total_bytes, "bits_per_weight": bits, "rows": self.rows}, indent=1)

    def __str__(self) -> str:
        heads = ("weight", "structure", "shape", "zeros", "codes", "dictionary", "steps", "headers", "bits", "entropy")
        table = [heads]
        for row in self.compressed_rows:
            count = max(row["parameters"], 1)
            parts = [row[f"{key}_bits"] / count for key in ("code", "dictionary", "step", "header")]
            shape = "x".join(map(str, row["shape"])) + (f" ({row['matrices']})" if row["matrices"] > 1 else "")
            numbers = [f"{x:.4f}" for x in (*parts, row["bits_per_weight"], row["entropy_bits"] / count)]
            table.append((row["name"], row["structure"], shape, f"{row['sparsity']:.1%}", *numbers))
        widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
            for row in table
        ]
        dense = sum(row["bytes"] for row in self.rows if row["structure"] == "dense")
        rest = self.total_bytes - self.compressed_bytes - dense
        lines.append(
            f"{self.total_bytes:,} bytes: {self.compressed_bytes:,} of compressed weights "
            f"({self.bits_per_weight:.4f} bits per weight), {dense:,} dense, {rest:,} of file headers"
        )
        return "\n".join(line.rstrip() for line in lines)


def size_report(model_or_folder: nn.Module | str | Path, visit: Visit | None = None) -> SizeReport:
    """Account for every byte of a compressed model.

    Args:
        model_or_folder: a folder of safetensors, in one file or sharded, or a model: then the figures are those of the
            one file that saving it makes.
        visit: called with the factors of every weight, which are decoded for the accounts.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
        ValueError: a compressed weight is damaged; names the tensor and the file.
    """
    if isinstance(model_or_folder, nn.Module):
        return _report_model(model_or_folder, visit)
    return _report_folder(Path(model_or_folder), visit)


def _report_folder(folder: Path, visit: Visit | None) -> SizeReport:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors")
    rows = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            entries = header_of(file)
            # A bar after two seconds: large weights take their time to decode.
            for name in transformers_logging.tqdm(entries, desc=f"Reading {file.name}", delay=2.0):
                entry = entries[name]
                if name.endswith(SUFFIX) and entry["dtype"] == "U8":
                    rows.append(_row(name, tensors.get_tensor(name), entry, str(file), visit))
                else:
                    rows.append(_dense_row(name, entry))
    return _close(file_bytes(folder), rows)


def file_bytes(folder: Path) -> int:
    """Return what the files of safetensors in a folder take, with the index if there is one."""
    return sum(file.stat().st_size for kind in ("", ".index.json") for file in folder.glob("*.safetensors" + kind))


def header_of(file: Path) -> dict[str, dict[str, Any]]:
    """Return name -> dtype, shape and offsets of every tensor in a file of safetensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return entries


def _report_model(model: nn.Module, visit: Visit | None) -> SizeReport:
    rows, entries, offset = [], ['"__metadata__":{"format":"pt"}'], 0
    for name, tensor, entry in _layout(model):
        entries.append(_entry_text(name, entry))
        packed = _is_packed(name, tensor)
        rows.append(_row(name, tensor, entry, "the model", visit) if packed else _dense_row(name, entry))
        offset = entry["data_offsets"][1]
    header = len(("{" + ",".join(entries) + "}").encode())
    total = 8 + (header + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT + offset
    return _close(total, rows)


def compressed_bytes(model: nn.Module) -> int:
    """Return what the compressed weights of a model take in its file, their entries in the header included."""
    return sum(
        tensor.numel() + entry_bytes(name, entry) for name, tensor, entry in _layout(model) if _is_packed(name, tensor)
    )


def _is_packed(name: str, tensor: Tensor) -> bool:
    return name.endswith(SUFFIX) and tensor.dtype == torch.uint8


def _layout(model: nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Yield name, tensor and header entry of all that saving a model writes, in the order of safetensors."""
    state = _saved_state(model)
    order = {dtype: i for i, dtype in enumerate(_DTYPES)}
    offset = 0
    for name in sorted(state, key=lambda n: (order[state[n].dtype], n)):
        tensor = state[name]
        end = offset + tensor.numel() * tensor.element_size()
        yield name, tensor, {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end


def _saved_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that ``save_pretrained`` writes: shared ones once, under their names in the checkpoint."""
    if not isinstance(model, PreTrainedModel):
        return dict(model.state_dict())
    ignored, tied = set(model._keys_to_ignore_on_save or ()), set(model.all_tied_weights_keys)
    state, seen = {}, set()
    for name, tensor in sorted(saved_state(model).items(), key=lambda item: (item[0] in tied, item[0])):
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() and not tensor.is_meta else name
        if name not in ignored and place not in seen:
            state[name] = tensor
            seen.add(place)
    saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    return saved


def _entry_text(name: str, entry: dict[str, Any]) -> str:
    fields = {key: entry[key] for key in ("dtype", "shape", "data_offsets")}
    return json.dumps(name, ensure_ascii=False) + ":" + json.dumps(fields, separators=(",", ":"))


def _close(total: int, rows: list[dict[str, Any]]) -> SizeReport:
    """Add the row of what is left of the files: lengths, metadata, padding, an index."""
    left = total - sum(row["bytes"] for row in rows)
    rows = [*rows, {**_blank("", "file headers", [0], 0), "bytes": left, "header_bits": 8 * left}]
    return SizeReport(total, rows)


def _blank(name: str, structure: str, shape: list[int], parameters: int) -> dict[str, Any]:
    return {
        "name": name,
        "structure": structure,
        "shape": shape,
        "matrices": 1,
        "parameters": parameters,
        "sparsity": 0.0,
        "bytes": 0,
        "code_bits": 0,
        "dictionary_bits": 0,
        "step_bits": 0,
        "header_bits": 0,
        "entropy_bits": 0.0,
        "bits_per_weight": 0.0,
    }


def entry_bytes(name: str, entry: dict[str, Any]) -> int:
    """Return what a tensor's entry in the header of its file takes there."""
    return len(_entry_text(name, entry).encode()) + 1  # and a comma


def _dense_row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    row = _blank(name, "dense", list(entry["shape"]), math.prod(entry["shape"]))
    start, end = entry["data_offsets"]
    row["bytes"] = end - start + entry_bytes(name, entry)
    row["header_bits"] = 8 * entry_bytes(name, entry)
    row["bits_per_weight"] = 8 * row["bytes"] / row["parameters"] if row["parameters"] else 0.0
    return row


def _row(name: str, data: Tensor, entry: dict[str, Any], file: str, visit: Visit | None) -> dict[str, Any]:
    try:
        found = records(data, name)
        row = _blank(name.removesuffix(SUFFIX), found[0].structure, list(found[0].shape), 0)
        row["matrices"] = len(found)
        zeros = total = 0
        for record in found:
            row["parameters"] += math.prod(record.shape)
            factors = record.factors()
            if visit is not None:
                visit(factors)
            total += sum(t.codes.shape[0] * t.atom_count for t in factors.terms)
            zeros += sum(t.codes.shape[0] * t.atom_count - t.nonzeros for t in factors.terms)
            for head, term in zip(record.terms, factors.terms, strict=True):
                row["code_bits"] += 8 * len(head.codes)
                row["dictionary_bits"] += 8 * len(head.atoms)
                row["step_bits"] += 8 * (len(head.steps) + len(head.rows))
                row["entropy_bits"] += _entropy(head, term)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    row["bytes"] = data.numel() + entry_bytes(name, entry)
    row["header_bits"] = 8 * row["bytes"] - row["code_bits"] - row["dictionary_bits"] - row["step_bits"]
    row["sparsity"] = zeros / total if total else 0.0
    row["bits_per_weight"] = 8 * row["bytes"] / row["parameters"] if row["parameters"] else 0.0
    return row


def _entropy(head: TermHeader, term: Term) -> float:
    """Return the ideal length of all arrays of a term in bits."""
    rows, steps, codes = term.rows.numpy(), term.steps.numpy(), term.codes.numpy()
    total = ideal_bits(rows[None]) + ideal_bits(steps[None])
    if term.one_hot:
        counts = np.bincount(codes)
        total += float(-(counts[counts > 0] * np.log2(counts[counts > 0] / max(len(codes), 1))).sum())
    else:
        total += ideal_bits(codes, *head.priors(rows, steps), trellis=term.trellis)
    return total if term.atoms is None else total + ideal_bits(term.atoms.numpy())
