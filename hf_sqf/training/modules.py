"""Compressed modules while their factors are trained.

A module keeps its class's forward and gets another product: its class becomes a subclass that multiplies with a
:class:`~.factors.TrainedWeight`. In a state dict it looks as ever, one packed tensor a weight, so that every checkpoint
of the model is an ordinary compressed model; and it reads such a state dict back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.sqf_backends import factors_in
from ..runtime.sqf_factors import Factors
from ..runtime.sqf_modules import SUFFIX, SQFModule, _compressed_class
from ..runtime.sqf_product import under_autocast
from .factors import TrainedWeight

PREFIX = "sqf_trained_"
"""Of the names of parameters."""


class TrainedModule(SQFModule):
    """Mixin that comes before a compressed module's class.

    Attributes:
        trained: name of a weight -> the weight with its parameters.
        runtime_before: how the module ran, and will again.
    """

    trained: dict[str, TrainedWeight]
    runtime_before: str

    def factors(self, name: str = "weight") -> list[Factors]:
        """Return the factors of a weight as they would be saved now."""
        return self.trained[name].factors()

    def dense(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """Return a weight as a dense tensor, with gradients."""
        held, trained = self.held[name], self.trained[name]
        weight = held.weight([trained.matrix(i) for i in range(len(trained.shapes))]).to(dtype or self.compute_dtype)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def keep(self, runtime: str) -> None:
        """Refuse to change what is under way."""
        raise ValueError(f"runtime cannot become {runtime!r} while factors are trained: change it afterwards")

    def _multiply(self, x: Tensor) -> Tensor:
        y = self.trained["weight"].product(under_autocast(x))
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _matrix(self, name: str, index: int, dtype: torch.dtype) -> Tensor:
        return self.trained[name].matrix(index).to(dtype)

    def _pick(self, input: Tensor) -> Tensor:
        n = self.held["weight"].matrix_shape[1]
        rows = self.trained["weight"].pick(input.reshape(-1).long())
        return rows.to(self.compute_dtype).view(*input.shape, n)

    def _parameter_names(self) -> list[str]:
        return [name for name in self._parameters if name.startswith(PREFIX)]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # asked for the parameters themselves, not for what is saved
            return
        for name in self._parameter_names():
            destination.pop(prefix + name, None)
        for name, trained in self.trained.items():
            destination[prefix + name + SUFFIX] = trained.packed()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = {prefix + name for name in self._parameter_names()}
        missing_keys[:] = [key for key in missing_keys if key not in ours]
        for name, trained in self.trained.items():
            if prefix + name + SUFFIX in state_dict:
                trained.read(factors_in(getattr(self, name + SUFFIX).detach(), self.held[name].name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedModule:
        ours = {id(self._parameters[name]) for name in self._parameter_names()}

        def move(tensor: Tensor) -> Tensor:  # parameters of factors stay float32: casts of models mean weights
            return tensor.to(fn(tensor.new_empty(0)).device) if id(tensor) in ours else fn(tensor)

        super()._apply(move, recurse)
        for trained in self.trained.values():
            trained.to(getattr(self, next(iter(self.held)) + SUFFIX).device)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.base, tuple(self.held)), {**self.__dict__, "_running": {}, "_quick": None}


@cache
def _trained_class(kind: type[SQFModule]) -> type[TrainedModule]:
    return type(f"Trained{kind.__name__}", (TrainedModule, kind), {"compressed": kind})


def _blank(base: type[nn.Module], names: tuple[str, ...]) -> TrainedModule:
    cls = _trained_class(_compressed_class(base, names))  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


def start(module: SQFModule, trained: dict[str, TrainedWeight]) -> None:
    """Have a compressed module multiply with weights that are trained, in place.

    Args:
        module: compressed.
        trained: all its weights; tied modules are given the same ones.
    """
    before = module.runtime
    if before != "stream":
        module.keep("stream")  # the bytes of the file: resident ones would only take memory
    module.trained, module.runtime_before = trained, before
    module.__class__ = _trained_class(type(module))  # type: ignore[arg-type]  # as above
    for name, weight in trained.items():
        for part, parameter in weight.parameters():
            module.register_parameter(f"{PREFIX}{name}_{part}", parameter)


def finish(module: TrainedModule) -> None:
    """Undo :func:`start`: the module is an ordinary compressed one again, with the factors as trained."""
    for name, weight in module.trained.items():
        data = module._parameters[name + SUFFIX]
        assert data is not None
        data.data = weight.packed().to(data.device)
    for name in module._parameter_names():
        del module._parameters[name]
    runtime = module.runtime_before
    del module.trained, module.runtime_before
    module.__class__ = type(module).compressed  # type: ignore[attr-defined]
    module._forget()
    module.keep(runtime)
