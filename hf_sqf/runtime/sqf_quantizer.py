"""SQFQuantizer: transformers loads, saves and decodes compressed models through it."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .sqf_config import QUANT_METHOD, SQFConfig
from .sqf_forms import keep_later
from .sqf_memory import align
from .sqf_model import compressed_modules, saved_state
from .sqf_modules import SUFFIX, Held, compress_module, decompress_module, weights_of
from .sqf_size import compressed_bytes

COMPANIONS: dict[str, tuple[Callable[[PreTrainedModel], None], Callable[[PreTrainedModel], None]]] = {}
"""Who else has a part in a compressed model: name -> what to call once it is one, and once it is one no longer."""

TRAINERS: weakref.WeakSet[object] = weakref.WeakSet()
"""Who is about to train factors. While there is nobody, the Trainer refuses compressed models without adapters: it
would train norms and biases alone, and not say so."""


class SQFQuantizer(HfQuantizer):
    """Loads compressed checkpoints; hf_sqf derives from it what compresses ordinary ones.

    Attributes:
        quantization_config: this model's own copy of the config.
    """

    quantization_config: SQFConfig
    requires_calibration = False

    def __init__(self, quantization_config: SQFConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)
        self._dtype: torch.dtype | None = None
        if not self.pre_quantized and self.quantization_config.dequantize:
            raise ValueError("dequantize=True decodes a compressed checkpoint, and this one is not compressed")

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to compress: these files alone can only load what is compressed."""
        if not self.pre_quantized:
            raise ImportError("compressing a model needs the package: `pip install hf-sqf`, then `import hf_sqf`")

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Have experts run one by one, so that only those hit are decoded."""
        config._experts_implementation = "eager"
        return config

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Note the dtype of the load, which the hook called from here does not get."""
        self._dtype = dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            files = kwargs.get("checkpoint_files") or []
            self._sources = prepare(model, files, self.quantization_config, self._dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_weights(model, self._sources)
            recount(model, self.quantization_config)
        if self.pre_quantized and self.quantization_config.dequantize:
            decompress(model)
            align(model)
        else:
            settle(model, self.quantization_config.runtime)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Leave no trace of the method in a model that has been decoded."""
        super().remove_quantization_config(model)
        for _, detach in COMPANIONS.values():
            detach(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return decompress(model)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Decode all weights in place, each into the dtype it computes in, or the whole model into ``dtype``."""
        self._dequantize(model)
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        return model if dtype is None else model.to(dtype=dtype)  # type: ignore[call-arg]  # wrapped

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return :func:`saved_state`, and no metadata."""
        return saved_state(model), {}

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may train the model itself: where there is somebody to train the factors."""
        return len(TRAINERS) > 0


def register(quantizer: type[SQFQuantizer] = SQFQuantizer) -> None:
    """Make transformers know the method. Calling it again, or from another copy of this file, does no harm."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SQFConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = quantizer
    known: tuple[type, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if SQFConfig not in known:  # else dequantize=True would be ignored, with a warning
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, SQFConfig)  # type: ignore[assignment]


def settle(model: PreTrainedModel, runtime: str) -> None:
    """Have a model that has become a compressed one run as asked for, once it runs; call the :data:`COMPANIONS`."""
    align(model)
    keep_later((module for _, module in compressed_modules(model)), runtime)
    for attach, _ in COMPANIONS.values():
        attach(model)


def prepare(
    model: PreTrainedModel, files: list[str], config: SQFConfig, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Put compressed modules into a model on the meta device, wherever a checkpoint has factors.

    Args:
        model: as built from its config, without weights.
        files: the checkpoint's safetensors files.
        config: the checkpoint's.
        dtype: that the model is loaded in.

    Returns:
        The file that each packed tensor lies in.

    Raises:
        ValueError: factors are missing, left over, or are no packed bytes; names tensor and file.
    """
    sites = {}  # the packed tensor's name -> all that is needed to put it in place
    for prefix, module in model.named_modules():
        for attribute, held in weights_of(module, prefix).items():
            sites[held.name] = (module, attribute, held)
    shapes, sources, sentinels = _read_headers(model, files, set(sites))
    _check_complete(model, shapes, set(sites), config, files)

    known = {
        name: (shape, nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False))
        for name, shape in shapes.items()
        if name in sites
    }
    packed = {name: parameter for name, (_, parameter) in known.items()}
    for target, source in model.all_tied_weights_keys.items():
        if source + SUFFIX in packed and target + SUFFIX in sites:
            packed.setdefault(target + SUFFIX, packed[source + SUFFIX])
    place(model, {name: (*sites[name], parameter) for name, parameter in packed.items()}, dtype)
    ignored = {f"^{re.escape(name)}$" for name in sentinels}
    model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())
    return sources


def recount(model: PreTrainedModel, config: SQFConfig) -> None:
    """Have the coverage speak of this model: a body that is loaded without its head has fewer weights."""
    coverage = config.coverage or {}
    shapes = {m.get_parameter(a + SUFFIX): h.shape for _, m in compressed_modules(model) for a, h in m.held.items()}
    if coverage["weights"] != len(shapes):
        compressed = sum(math.prod(shape) for shape in shapes.values())
        rest = sum(p.numel() for p in model.parameters() if p not in shapes)
        bits = round(8.0 * compressed_bytes(model) / compressed, 4)
        counts = {"weights": len(shapes), "bits": bits, "parameters": rest + compressed, "compressed": compressed}
        config.coverage = {**coverage, **counts}


def check_weights(model: PreTrainedModel, sources: dict[str, str]) -> None:
    """Check that every weight that was loaded is whole, is of the module's shape and lies where it belongs.

    Args:
        model: a compressed model, its bytes still packed.
        sources: the file that each packed tensor came from.

    Raises:
        ValueError: names tensor and file.
    """
    sites: dict[nn.Parameter, list[str]] = {}  # tied weights are one parameter of several names
    found: dict[nn.Parameter, str] = {}
    for _, module in compressed_modules(model):
        for attribute, held in module.held.items():
            data = module.get_parameter(attribute + SUFFIX)
            if data.is_meta:
                continue  # offloaded: read when it is needed
            sites.setdefault(data, []).append(held.name.removesuffix(SUFFIX))
            try:
                found[data] = module.check(attribute)
            except ValueError as error:
                raise ValueError(f"{error} (in {sources.get(held.name, 'a tied weight')})") from None
    for data, names in sites.items():
        if not found[data] or _belongs(found[data], names):
            continue
        if any(_belongs(found[data], others) for others in sites.values()):  # else a name that changed with the code
            where = next((sources[n + SUFFIX] for n in names if n + SUFFIX in sources), "the checkpoint")
            raise ValueError(f"{names[0]}{SUFFIX} in {where} holds {found[data]}: tensors were swapped")


def _belongs(recorded: str, names: list[str]) -> bool:
    """Whether a weight is one of these: its name may have gained or lost leading parts, as heads come and go."""
    return any(f".{name}".endswith(f".{recorded}") or f".{recorded}".endswith(f".{name}") for name in names)


def place(
    model: PreTrainedModel,
    packed: dict[str, tuple[nn.Module, str, Held, nn.Parameter]],
    dtype: torch.dtype | None = None,
) -> None:
    """Make modules of a model hold packed factors, and tie them as the weights were tied.

    Args:
        model: the model.
        packed: the packed tensor's full name -> (module, name of the weight in it, its form, packed bytes).
        dtype: of a load that is under way, for the modules that transformers keeps in float32.
    """
    plan = model._get_dtype_plan(dtype) if dtype is not None else {}
    upcast = build_glob_alternation(list(plan))[0] if plan else None
    by_module: dict[nn.Module, dict[str, tuple[Held, nn.Parameter]]] = {}
    for module, attribute, held, parameter in packed.values():
        by_module.setdefault(module, {})[attribute] = held, parameter
    for module, weights in by_module.items():
        name, (held, _) = next(iter(weights.items()))
        compute = module.get_parameter(name).dtype
        if upcast is not None and upcast.search(held.name):
            compute = torch.float32
        compress_module(module, weights, compute)
    _rename_ties(model, set(packed), compressed=True)


def decompress(model: PreTrainedModel) -> PreTrainedModel:
    """Turn all compressed modules of a model back into ordinary ones, in place; return the model."""
    found = list(compressed_modules(model))
    names: set[str] = set()
    dense: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in found:
        for attribute, held in module.held.items():
            packed = getattr(module, attribute + SUFFIX)
            if packed.is_meta:
                raise ValueError(f"{held.name} is offloaded: load the model without offloading to decode it")
            names.add(f"{prefix}.{attribute}{SUFFIX}" if prefix else attribute + SUFFIX)
    for _, module in found:
        decompress_module(module, dense)
    _rename_ties(model, names, compressed=False)
    return model


def _rename_ties(model: PreTrainedModel, packed: set[str], compressed: bool) -> None:
    """Let transformers tie ``*_factors`` where it would tie weights that became factors, or the other way round."""

    def renamed(name: str, prefix: str = "") -> str:
        full = name if not prefix else f"{prefix}.{name}"
        if compressed:
            return name + SUFFIX if full + SUFFIX in packed else name
        return name.removesuffix(SUFFIX) if full in packed else name

    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        module.all_tied_weights_keys = {
            renamed(target, prefix): renamed(source, prefix) for target, source in module.all_tied_weights_keys.items()
        }
        if isinstance(module._tied_weights_keys, dict):
            module._tied_weights_keys = {
                renamed(target, prefix): renamed(source, prefix) for target, source in module._tied_weights_keys.items()
            }


def _read_headers(
    model: PreTrainedModel, files: list[str], sites: set[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], set[str]]:
    """Return shape and file of every packed tensor, by the model's name for it, and the names of sentinels.

    Names in a file may be older, or have another prefix, than the model's own; transformers' renaming is applied.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = dict.fromkeys(model.state_dict(), True) | dict.fromkeys(sites, True)
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, str] = {}
    sentinels: set[str] = set()
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise ValueError(f"{file}: compressed models are stored as safetensors")
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dictionary)
                part = opened.get_slice(key)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if key.endswith(SUFFIX):
                    if dtype != "U8" or len(shape) != 1:
                        raise ValueError(f"{key} in {file} must be 1-D uint8, found {dtype} {shape}: damaged or forged")
                    name = rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]
                    if name in shapes:
                        raise ValueError(f"{key} in {file}: there is more than one {name}")
                    shapes[name], sources[name] = shape, file
                elif dtype == "U8" and shape == (1,):
                    # Without its prefix it fits no parameter of a body that is loaded from a model with a head.
                    sentinels |= {key, rename_source_key(key, renamings, converters, model.base_model_prefix, state)[0]}
    return shapes, sources, sentinels


def _opened(file: str) -> Any:  # noqa: ANN401  (safetensors has no type for it)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or is not a whole safetensors file: {error}") from None


def _check_complete(
    model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], sites: set[str], config: SQFConfig, files: list[str]
) -> None:
    where = str(Path(files[0]).parent) if files else "the checkpoint"
    expected = (config.coverage or {}).get("weights")
    if not isinstance(expected, int):
        raise ValueError(f"{where}: config.json does not say how many weights are compressed")
    missing = [name for name in sorted(sites - shapes.keys()) if name.removesuffix(SUFFIX) in model.state_dict()]
    if len(shapes) < expected:
        raise ValueError(
            f"{where} lacks {expected - len(shapes)} of {expected} compressed weights; among {missing[:8]}"
        )
    if len(shapes) > expected:
        raise ValueError(f"{where} has {len(shapes)} compressed weights where its config.json names {expected}")
    same = type(model).__name__ in (model.config.architectures or [])
    if same and (strange := sorted(shapes.keys() - sites)):
        raise ValueError(f"{where} has compressed weights that {type(model).__name__} has no place for: {strange[:8]}")
