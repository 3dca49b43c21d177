"""What a whole model takes on when it is compressed: a class of the same name before its own, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sqf_modules import SQFModule

if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object


class FloatsFirst(Base):
    """Mixin that lists compressed modules after all others.

    ``next(model.parameters()).dtype`` is how many programs, sentence-transformers for one, ask what a model computes
    in. The first parameter is an embedding's as a rule, and packed bytes are no answer.
    """

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield as ever, compressed modules last."""
        last = []
        for name, module in super().named_modules(*args, **kwargs):
            if isinstance(module, SQFModule):
                last.append((name, module))
            else:
                yield name, module
        yield from last


MIXINS: list[type] = [FloatsFirst]
"""What goes before a compressed model's own class, the first before the second."""


def adopt(model: PreTrainedModel) -> None:
    """Put the :data:`MIXINS` before a compressed model's class."""
    if not hasattr(type(model), "sqf_native"):
        model.__class__ = _class(type(model), *MIXINS)  # type: ignore[arg-type]  # classes are hashable


def release(model: PreTrainedModel) -> None:
    """Undo :func:`adopt`."""
    model.__class__ = getattr(type(model), "sqf_native", type(model))


@cache
def _class(native: type[PreTrainedModel], *mixins: type) -> type[PreTrainedModel]:
    names = {
        "__module__": native.__module__,
        "__doc__": native.__doc__,
        "__reduce_ex__": _reduce,
        "sqf_native": native,
    }
    return type(native.__name__, (*mixins, native), names)


def _reduce(model: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
    # By the class it was made from: this one is made on the fly and cannot be found by its name.
    return _blank, (type(model).sqf_native,), model.__dict__  # type: ignore[attr-defined]


def _blank(native: type[PreTrainedModel]) -> PreTrainedModel:
    cls = _class(native, *MIXINS)  # type: ignore[arg-type]  # as above
    return cls.__new__(cls)


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, SQFModule]]:
    """Yield the full name and module of everything that holds factors."""
    for name, module in model.named_modules():
        if isinstance(module, SQFModule):
            yield name, module


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what is saved: the state dict, and of a compressed model one tensor that no ordinary load can digest.

    transformers without this quantizer would load the model with random weights and no more than a warning. A
    ``weight`` of impossible shape turns that into an error.
    """
    state = dict(model.state_dict())
    for name, module in compressed_modules(model):
        attribute = next(iter(module.held))
        state[f"{name}.{attribute}" if name else attribute] = torch.zeros(1, dtype=torch.uint8)
        break
    return state
