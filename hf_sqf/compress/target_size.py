"""From the size of the saved weight files to bits per parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import nn

from ..runtime.sqf_modules import SUFFIX
from .targets import Target

_DTYPES = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}
_SENTINEL = 160  # bytes of the tensor that keeps an ordinary load from succeeding, with its entry in the header


def bits_for_size(model: nn.Module, targets: Sequence[Target], size: int) -> float:
    """Return the bits per parameter that the compressed weights may take in files of ``size`` bytes in all.

    Args:
        model: with dense weights.
        targets: the weights to be compressed.
        size: bytes of the safetensors file: what stays dense, headers and all.

    Raises:
        ValueError: the rest of the model alone is larger.
    """
    count = sum(target.parameter.numel() for target in targets)
    rest = bytes_of_rest(model, targets)
    if rest >= size:
        raise ValueError(f"target_size={size} cannot be reached: what is not compressed takes {rest} bytes alone")
    return min(8.0 * (size - rest) / count, 16.0)


def bytes_of_rest(model: nn.Module, targets: Sequence[Target]) -> int:
    """Return what the file holds beside the compressed weights and their entries in its header."""
    compressed = {held.name.removesuffix(SUFFIX) for target in targets for _, _, held in target.sites}
    seen, dense = set(), {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape)) if not tensor.is_meta else name
        if name not in compressed and place not in seen:  # tied tensors are saved once
            seen.add(place)
            dense[name] = tensor
    # Offsets of the final length: what is counted here is never less than what is written.
    end = 10 ** len(str(sum(t.numel() * t.element_size() for t in model.state_dict().values())))
    header = {name: [_DTYPES[t.element_size()], list(t.shape)] for name, t in dense.items()}
    entries = {n: {"dtype": d, "shape": s, "data_offsets": [end, end]} for n, (d, s) in header.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
    return 8 + len(text.encode()) + 8 + _SENTINEL + sum(t.numel() * t.element_size() for t in dense.values())
