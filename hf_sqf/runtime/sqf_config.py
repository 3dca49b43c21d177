"""SQFConfig: all that a user can ask for."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .sqf_trellis import TRELLIS_STATES

QUANT_METHOD = "sqf"
FORMAT_VERSION = 1
"""Rises when a model saved by this version could not be read by an older one."""
STRUCTURES = ("grid", "svd", "sparse_pca", "vq", "pgd")
BLOCKED = ("sparse_pca", "vq", "pgd", "auto")
"""Structures that ``block`` has a meaning for."""
NOT_STORED = ("dataset", "tokenizer", "statistics")
"""Fields that are of use while a model is compressed only."""
RUNTIMES = ("auto", "int8", "int4", "stream", "dense")
"""What ``runtime`` may be; see :mod:`hf_sqf.runtime.sqf_backends`."""
LOADING_ATTRIBUTES = ("dequantize", "runtime")
"""Fields that may be given anew when a compressed model is loaded; never written into a checkpoint."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""What a model's id on the Hub looks like."""


@dataclass(repr=False)
class SQFConfig(QuantizationConfigMixin):
    """How a model is compressed. Pass it to ``from_pretrained(..., quantization_config=)`` or ``hf_sqf.compress``.

    Attributes:
        bits: average bits per parameter over all compressed weights, everything counted; in (0, 16].
        target_size: the size of the saved weight files, in place of ``bits``: bytes, or text such as ``"48MB"``.
        structure: ``"auto"`` (least error, weight by weight), one of :data:`STRUCTURES`, or a sum of two such as
            ``"svd+grid"``.
        overrides: regular expression (searched for in a module's full name) -> ``{"bits": ..., "structure": ...}``,
            either or both. Weights with bits of their own stand outside the common average: those of one expression
            meet its bits on average among themselves. The first expression that matches counts.
        modules_to_not_convert: names or regular expressions of modules to leave as they are, matched as everywhere
            in transformers. None leaves out a classification head; a list, even an empty one, only what it names.
        include_embeddings: compress token and position embeddings and language model heads, tied or not.
        dataset: calibration data, which says where errors matter; None compresses without. A list of texts, a
            ``datasets.Dataset`` or the name of one on the Hub, an iterable of the model's inputs, or ``"self"``, text
            that the model writes itself (see ``hf_sqf.compress.calibration_data``). Never stored.
        tokenizer: for the texts, or its name; None takes the model's own. Never stored.
        statistics: what :meth:`hf_sqf.compress.statistics.Statistics.save` wrote (or the object), measured on this
            model before: ``dataset`` is then not measured again, and may be left out. Never stored.
        samples: how many inputs of the calibration data are measured, of each kind of text.
        context: how many tokens an input has at most.
        sequential: with a ``dataset``, fit each weight to the inputs that it gets from those compressed before it, so
            that it makes up for their errors (see ``hf_sqf.compress.sequential``). Takes a few more runs of the data
            through the model.
        own_text: measure on as much text that the model writes itself, too: it helps on all that ``dataset`` lacks.
        trellis: states of dependent quantization (4 to 256, a power of two), which rounds each code with regard to
            those before it and takes the place of scalar rounding wherever it saves bits; None rounds scalar. More
            states save more bits and take longer to find; decoding does not care.
        block: width of blocks for structures with a dictionary; None lets the structure choose.
        seed: of the starts that draw at random.
        dequantize: loading attribute: decode a compressed checkpoint into an ordinary model.
        runtime: loading attribute: how the compressed model runs, and what it keeps in memory: ``"int8"`` and
            ``"int4"`` (8 or 4 bits a weight), ``"stream"`` (the file's bytes, decoded for each call), ``"dense"``
            (decoded once) or ``"auto"``. See ``set_runtime``, which changes it later.
        format_version: of the checkpoint; written when a model is saved.
        max_kl: ``push_to_hub`` refuses a model that lies further from its original than this, in nats (mean
            Kullback-Leibler divergence per prediction, of models that predict classes or tokens); None accepts all.
        min_cosine: likewise, the least mean cosine to the original's outputs, of models that give vectors.
        base_model: the original's id on the Hub; None takes it from where the original is loaded.
        coverage: what became of the model: written by compression, never asked for. See ``compress``.
        fidelity: how far it lies from its original: written by ``hf_sqf.hub.check``, never asked for.

    Raises:
        ValueError: a field is out of range, unknown, or contradicts another.
    """

    bits: float = 4.0
    target_size: int | str | None = None
    structure: str = "auto"
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: list[str] | None = None
    include_embeddings: bool = True
    dataset: Any = None
    tokenizer: Any = None
    statistics: Any = None
    samples: int = 32
    context: int = 512
    own_text: bool = True
    sequential: bool = True
    trellis: int | None = 64
    block: int | None = None
    seed: int = 0
    dequantize: bool = False
    runtime: str = "auto"
    format_version: int = FORMAT_VERSION
    max_kl: float | None = 1.0
    min_cosine: float | None = 0.9
    base_model: str | None = None
    coverage: dict[str, Any] | None = None
    fidelity: dict[str, Any] | None = None

    def __init__(self, **options: Any) -> None:
        method = options.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {method!r}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enumeration is closed
        version = options.get("format_version", FORMAT_VERSION)
        if _is_int(version) and version > FORMAT_VERSION:  # before unknown fields, which a newer version may bring
            raise ValueError(
                f"format_version {version}: this model was made by a newer hf_sqf; this one reads up to "
                f"{FORMAT_VERSION}. Update with `pip install -U hf-sqf`."
            )
        known = {f.name: f for f in fields(self)}
        known.pop("quant_method", None)
        if unknown := sorted(options.keys() - known.keys()):
            raise ValueError(f"unknown field {', '.join(unknown)}; SQFConfig has {', '.join(known)}")
        for name in known:
            default = {} if name == "overrides" else getattr(type(self), name)
            setattr(self, name, options.get(name, default))
        if self.target_size is not None and options.get("bits") is not None:
            raise ValueError("give bits or target_size, not both")
        self._check()

    def _check(self) -> None:
        self.bits = _check_bits(self.bits, "bits")
        _check_structure(self.structure, "structure")
        self.overrides = _check_overrides(self.overrides)
        self.modules_to_not_convert = _check_names(self.modules_to_not_convert, "modules_to_not_convert")
        if self.target_size is not None:
            parse_size(self.target_size)
        for name in ("samples", "context"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 2:
                raise ValueError(f"{name} must be an integer of 2 or more, got {getattr(self, name)!r}")
        check_runtime(self.runtime)
        for name in ("include_embeddings", "dequantize", "own_text", "sequential"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _check_trellis(self.trellis)
        _check_int(self.seed, "seed", 0, 2**63 - 1)
        _check_int(self.format_version, "format_version", 1, FORMAT_VERSION)
        if self.block is not None:
            _check_int(self.block, "block", 1, 65536)
            asked = [self.structure] + [o["structure"] for o in self.overrides.values() if "structure" in o]
            if not any(part in BLOCKED for structure in asked for part in structure.split("+")):
                raise ValueError(
                    f"block is given, but structure {self.structure!r} has no blocks: {', '.join(BLOCKED)} do"
                )
        _check_number(self.max_kl, "max_kl", 0.0, float("inf"))
        _check_number(self.min_cosine, "min_cosine", -1.0, 1.0)
        if self.base_model is not None and not (isinstance(self.base_model, str) and HUB_ID.fullmatch(self.base_model)):
            raise ValueError(f"base_model must be None or an id on the Hub such as owner/name, got {self.base_model!r}")
        for name in ("coverage", "fidelity"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be None or a dictionary, got {getattr(self, name)!r}")

    def override_for(self, name: str) -> tuple[str | None, dict[str, Any]]:
        """Return the first of ``overrides`` that matches a module's full name, as (expression, options)."""
        for pattern, options in self.overrides.items():
            if re.search(pattern, name):
                return pattern, options
        return None, {}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what counts when the config comes along with a model that is already compressed."""
        return {name: getattr(self, name) for name in LOADING_ATTRIBUTES}

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return a field, or the default: transformers asks dictionaries and configs alike."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written into ``config.json``."""
        kept = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name not in NOT_STORED}
        for name in LOADING_ATTRIBUTES:
            del kept[name]
        if self.target_size is not None:
            del kept["bits"]
        return {**kept, "quant_method": QUANT_METHOD}

    def __deepcopy__(self, memo: dict[int, Any]) -> SQFConfig:
        # transformers deep-copies configs several times on the way to a model; nothing in here is ever altered in
        # place, so that a shallow copy will do, whatever a field may hold.
        return copy.copy(self)


def check_runtime(runtime: object) -> None:
    """Raise ValueError unless ``runtime`` is one of :data:`RUNTIMES`."""
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")


def _check_trellis(states: object) -> None:
    if states is not None and (not _is_int(states) or states not in TRELLIS_STATES):
        raise ValueError(f"trellis must be None or one of {TRELLIS_STATES}, got {states!r}")


def parse_size(size: int | str) -> int:
    """Return a size in bytes, of a positive integer or text such as ``"48MB"`` (10^6) or ``"9KiB"`` (2^10).

    Raises:
        ValueError: it is neither.
    """
    if _is_int(size) and size > 0:  # type: ignore[operator]
        return int(size)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B\s*", size) if isinstance(size, str) else None
    if match is None or not float(match[1]):
        raise ValueError(f"target_size must be bytes or text such as '48MB' or '1.5GiB', got {size!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(value: object, name: str, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")


def _check_number(value: object, name: str, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be None or a number in [{low:g}, {high:g}], got {value!r}")


def _check_names(names: object, name: str) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{name} must be None or a list of names, got {names!r}")
    for pattern in names:
        _check_pattern(pattern, name)
    return list(names)


def _check_bits(bits: object, name: str) -> float:
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0.0 < bits <= 16.0:
        raise ValueError(f"{name} must be a number in (0, 16], got {bits!r}")
    return float(bits)


def _check_structure(structure: object, name: str) -> None:
    parts = structure.split("+") if isinstance(structure, str) else []
    if structure != "auto" and not (
        len(parts) in (1, 2) and set(parts) <= set(STRUCTURES) and len(set(parts)) == len(parts)
    ):
        allowed = ", ".join(("auto", *STRUCTURES))
        raise ValueError(f"{name} must be one of {allowed}, or a sum of two such as svd+grid; got {structure!r}")


def _check_pattern(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from error


def _check_overrides(overrides: object) -> dict[str, dict[str, Any]]:
    if not isinstance(overrides, dict):
        raise ValueError(f"overrides must map regular expressions to options, got {overrides!r}")
    checked = {}
    for pattern, options in overrides.items():
        name = f"overrides[{pattern!r}]"
        if not isinstance(pattern, str):
            raise ValueError(f"{name}: the key must be a regular expression")
        _check_pattern(pattern, "overrides")
        if not isinstance(options, dict) or not options or not options.keys() <= {"bits", "structure"}:
            raise ValueError(f"{name} must hold bits, structure or both, got {options!r}")
        checked[pattern] = dict(options)
        if "bits" in options:
            checked[pattern]["bits"] = _check_bits(options["bits"], f"{name}: bits")
        if "structure" in options:
            _check_structure(options["structure"], f"{name}: structure")
    return checked
