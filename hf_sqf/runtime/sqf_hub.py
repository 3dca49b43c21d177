"""What lets a compressed model load where hf_sqf is not installed.

``config.json`` of a saved model says ``"auto_map": {"AutoConfig": "sqf_hub.LlamaConfig"}`` (or whatever config the
model has), and this file lies beside it with the others that it needs. With ``trust_remote_code=True`` transformers
imports it and asks for ``LlamaConfig``. Being asked makes the method ``"sqf"`` known; the answer is a subclass of
transformers' own LlamaConfig of the same name, so that everything else goes its ordinary way.

The subclass also is what makes the files travel on: transformers copies the file that a config's class is defined in,
and all that it imports by ``from .name import``, into every folder that a model is saved to, whoever saves it.
Where hf_sqf is installed it is used instead of the files that came with the model.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from .sqf_model import adopt, release
from .sqf_quantizer import COMPANIONS, register

ATTRIBUTE = "AutoConfig"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Return the travelling subclass of the config of transformers that is called ``name``.

    Raises:
        AttributeError: transformers has no such config.
    """
    if name.startswith("_") or not name.endswith("Config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    native = getattr(transformers, name, None)
    if not isinstance(native, type) or not issubclass(native, PretrainedConfig):
        raise AttributeError(f"{name} is no model config of transformers {transformers.__version__}")
    announce()
    return _travelling(native)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are


def announce() -> None:
    """Make the method known to transformers: by the installed package, or else by the files beside this one."""
    try:
        importlib.import_module("hf_sqf")  # registers itself
    except ImportError:
        register()


@cache
def _travelling(native: type[PretrainedConfig]) -> type[PretrainedConfig]:
    return type(native.__name__, (native,), {"__module__": __name__, "_auto_class": ATTRIBUTE, "sqf_native": native})


def attach(model: PreTrainedModel) -> None:
    """Make all that is saved of a compressed model bring the code that loads it, and tag it.

    Configs that are not transformers' own stay: their ``auto_map`` names other code, and the model loads where
    hf_sqf is installed.
    """
    adopt(model)
    model.add_model_tags("sqf")
    config = model.config
    native = getattr(type(config), "sqf_native", type(config))  # where another copy of this file has been before
    if getattr(transformers, native.__name__, None) is native:
        config.__class__ = _travelling(native)


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`, for a model that is no longer compressed."""
    release(model)
    model.model_tags = [tag for tag in model.model_tags or [] if tag != "sqf"] or None
    config = model.config
    native = getattr(type(config), "sqf_native", None)
    if native is not None:
        config.__class__ = native
    auto_map = getattr(config, "auto_map", None) or {}
    if "sqf_hub." in str(auto_map.get(ATTRIBUTE)):
        rest = {key: value for key, value in auto_map.items() if key != ATTRIBUTE}
        if rest:
            config.auto_map = rest
        else:
            del config.auto_map


COMPANIONS[__name__] = attach, detach
