"""``hf-sqf compress``: a model from a folder or the Hub to a folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compress.companions import beside_weights, carry_files
from ..compress.ranks import Ranks
from ..hub.card import write_card
from ..report.accounts import megabytes
from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_size import file_bytes
from .folders import refuse_overwriting, whole_folder
from .originals import auto_class_for, card_of, ordinary_config
from .texts import calibration_texts


@dataclass(frozen=True)
class Made:
    """What became of a model.

    Attributes:
        folder: that it was saved to.
        bytes: of the weight files.
        original_bytes: of all parameters in the data type that was compressed.
        bits_per_weight: of the compressed weights, everything counted.
        parameters: of the model; ``compressed``: how many of them.
        dense: weights of two or more dimensions that stayed as they are -> the reason.
    """

    folder: str
    bytes: int
    original_bytes: int
    bits_per_weight: float
    parameters: int
    compressed: int
    dense: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {megabytes(self.bytes)}, {self.original_bytes / self.bytes:.1f} times smaller than "
            f"{megabytes(self.original_bytes)}",
            f"{self.bits_per_weight:.3f} bits per compressed weight, everything counted; "
            f"{100 * self.compressed / self.parameters:.2f} % of {self.parameters:,} parameters are compressed",
        ]
        return "\n".join(lines + [f"left as it is: {name} ({reason})" for name, reason in self.dense.items()])


def sqf_config(dataset: str | None = None, **options: Any) -> SQFConfig:
    """Return an SQFConfig of options, where the calibration data is named by a file, a Hub id or ``"self"``.

    Raises:
        ValueError: an option is out of range, unknown, or contradicts another.
    """
    return SQFConfig(**options, dataset=None if dataset is None else calibration_texts(dataset))


def compress(
    model: str,
    out: Path,
    config: SQFConfig,
    *,
    auto_class: str | None = None,
    dtype: str = "auto",
    force: bool = False,
) -> Made | None:
    """Compress a model while it loads, and save it with all that belongs to it. ``out`` is written whole or not at all.

    The processes that ``torchrun`` starts share the work.

    Args:
        model: folder or id on the Hub.
        out: folder to write.
        config: what is asked for.
        auto_class: that loads the model; by default told from its config.
        dtype: that the weights are loaded and computed in; "auto" takes the one that they are saved in.
        force: replace the model in ``out``.

    Returns:
        What became of it; None on all ranks but the first, which is the one that writes.

    Raises:
        FileExistsError: ``out`` is not empty.
        ValueError: the model is quantized already, or does not allow what is asked for.
    """
    ranks = Ranks.launched()
    ranks.together(lambda: refuse_overwriting(out, force, model))
    loads = auto_class_for(ordinary_config(model), auto_class)
    source = beside_weights(model)
    base_card = card_of(source)
    with whole_folder(out) if ranks.first else nullcontext(out) as folder:
        compressed = loads.from_pretrained(model, quantization_config=config, dtype=dtype)  # type: ignore[attr-defined]
        if not ranks.first:
            return None
        compressed.save_pretrained(folder)
        write_card(folder, out.resolve().name, base_card)
        carry_files(source, folder)
        size = file_bytes(folder)
    coverage = compressed.config.quantization_config.coverage
    total = coverage["parameters"]
    original = total * compressed.dtype.itemsize
    return Made(str(out), size, original, coverage["bits"], total, coverage["compressed"], coverage["dense"])
