"""Adapters of PEFT on top of compressed weights.

They train, save and reload as on any model: a compressed linear layer is an ``nn.Linear``. But merging one does
``base_layer.weight.data += delta``, and the weight of a compressed layer is a copy, decoded for whoever asks: the
adapter would be lost, and nothing said. So merging into compressed weights is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

from torch import nn

from hf_sqf_autoload import when_imported

from ..runtime.sqf_modules import SQFModule

WATCHED = "peft.tuners.lora.model"
"""Imported with PEFT, after all that is changed here."""
REFUSED = (
    "{}: an adapter cannot be merged into a compressed weight: keep it beside the model (save_pretrained saves it), or "
    "make the model an ordinary one with hf_sqf.dequantize before the adapter is loaded, merge, and compress the result"
)


def guard() -> None:
    """Have PEFT refuse to merge into compressed weights; waits for PEFT where it is not imported yet."""
    when_imported(WATCHED, _guard)


def _guard(module: ModuleType) -> None:
    """Guard whole models (of any kind of adapter) and the layers that LoRA makes."""
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    if hasattr(tuner, "sqf_guarded"):
        return
    tuner.sqf_guarded = True
    allowed: Callable[[Any], None] = tuner._check_merge_allowed
    dispatch: Callable[..., Any] = module.dispatch_default

    @wraps(allowed)
    def check_merge_allowed(self: Any) -> None:  # noqa: ANN401
        for name, layer in self.model.named_modules():
            if _adapts_compressed(layer):
                raise ValueError(REFUSED.format(name))
        allowed(self)

    @wraps(dispatch)
    def dispatch_default(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        layer = dispatch(*args, **kwargs)
        if layer is not None and _adapts_compressed(layer):
            layer.__class__ = _refusing(type(layer))  # type: ignore[arg-type]  # classes are hashable
        return layer

    tuner._check_merge_allowed = check_merge_allowed
    module.dispatch_default = dispatch_default  # type: ignore[attr-defined]


def _adapts_compressed(layer: nn.Module) -> bool:
    get = getattr(layer, "get_base_layer", None)
    return get is not None and not isinstance(layer, SQFModule) and isinstance(get(), SQFModule)


@cache
def _refusing(kind: type) -> type:
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise ValueError(REFUSED.format(type(self.get_base_layer()).__name__))

    return type(kind.__name__, (kind,), {"merge": merge, "__module__": kind.__module__})
