"""Modules that hold factors instead of weights.

A module is compressed in place: its class becomes a compressed subclass of what it was, and each weight ``name``
becomes a packed uint8 parameter ``name_factors``. So hooks, buffers, biases and shared references stay, every
``isinstance`` still holds, and a subclass with a forward of its own (a scaled embedding, say) keeps it. ``weight``
answers as a dense tensor, decoded on demand.

To teach this file a new kind of module: subclass :class:`SQFModule` and the kind, put it into :data:`KINDS`, and add
to :func:`weights_of` if its weights are not called ``weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from .sqf_container import unpack
from .sqf_factors import Factors
from .sqf_product import linear, lookup

SUFFIX = "_factors"
"""Of a packed parameter's name. An underscore: renaming patterns of transformers end at a word's boundary."""


_SIZES = frozenset({"num_embeddings", "embedding_dim", "in_features", "out_features"})


@dataclass(frozen=True)
class Held:
    """What the dense weight looks like that a module holds as factors.

    Attributes:
        name: the packed tensor's full name in the model, for messages.
        shape: of the dense weight, as the module's forward expects it.
        transposed: the weight is (in, out), its matrix of factors (out, in).
        stacked: the weight is (experts, ...), with factors for each expert.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    stacked: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of each matrix of factors."""
        rows, *columns = self.shape[1:] if self.stacked else self.shape
        m, n = rows, math.prod(columns)
        return (n, m) if self.transposed else (m, n)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Return the matrices (m, n) of a dense weight, as views of it."""
        parts = list(weight) if self.stacked else [weight]
        return [part.T if self.transposed else part.flatten(1) for part in parts]

    def weight(self, matrices: list[Tensor]) -> Tensor:
        """Return the dense weight of its matrices."""
        parts = [matrix.T if self.transposed else matrix for matrix in matrices]
        return (torch.stack(parts) if self.stacked else parts[0]).reshape(self.shape)


_decoded: WeakIdKeyDictionary = WeakIdKeyDictionary()


def decoded(packed: nn.Parameter, held: Held) -> list[Factors]:
    """Return the factors in a packed parameter, decoded once for as long as it lives and stays what it is.

    Modules with a common (tied) parameter share the result.

    Raises:
        ValueError: the bytes are damaged, or hold factors of another shape; names the tensor.
    """
    state = (packed.data_ptr(), packed.device, 0 if packed.is_inference() else packed._version)
    known = _decoded.get(packed)
    if known is None or known[0] != state:
        factors = unpack(packed.detach(), held.name)
        expected = [held.matrix_shape] * (held.shape[0] if held.stacked else 1)
        found = [tuple(f.shape) for f in factors]
        if found != expected:
            raise ValueError(f"{held.name}: holds factors of shapes {found[:4]}, the model expects {expected[:4]}")
        known = state, [f.to(packed.device) for f in factors]
        _decoded[packed] = known
    return known[1]


class SQFModule(nn.Module):
    """What all compressed modules have in common; a mixin that comes before the module's own class.

    Attributes:
        held: name of a weight -> :class:`Held`.
        compute_dtype: dtype that the dense weights have.
    """

    base: type[nn.Module]
    held: dict[str, Held]
    compute_dtype: torch.dtype

    def factors(self, name: str = "weight") -> list[Factors]:
        """Return the factors of a weight: one, or one per expert."""
        return decoded(getattr(self, name + SUFFIX), self.held[name])

    def dense(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """Return a weight as a dense tensor, in ``compute_dtype`` unless another is asked for."""
        held, dtype = self.held[name], dtype or self.compute_dtype
        packed = getattr(self, name + SUFFIX)
        if packed.is_meta:
            weight = torch.empty(held.shape, dtype=dtype, device="meta")
        else:
            weight = held.weight([f.dense(dtype) for f in self.factors(name)])
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps transformers from drawing it at random
        return weight

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        # transformers resizes embeddings by setting .data of the weight, a passing copy here, and then the size.
        if name in _SIZES and name in self.__dict__ and value != self.__dict__[name]:
            raise ValueError(
                f"{name} of a compressed module cannot change from {self.__dict__[name]} to {value}: resize the "
                "embeddings before the model is compressed, or after hf_sqf.dequantize(model)"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SQFModule:
        if fn(torch.empty(1, dtype=torch.uint8)).dtype != torch.uint8:
            raise TypeError("packed factors must stay uint8; cast floating-point tensors only, as .to(dtype) does")
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(1, dtype=self.compute_dtype)).dtype
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # By the class it was made from: the compressed class may exist in this process only.
        return _blank, (self.base, tuple(self.held)), self.__getstate__()

    def extra_repr(self) -> str:
        """Return the module's own description with the bits per parameter of each weight."""
        rates = []
        for name, held in self.held.items():
            bits = 8.0 * getattr(self, name + SUFFIX).numel() / max(math.prod(held.shape), 1)
            rates.append(f"{name}={bits:.2f} bits")
        return ", ".join(filter(None, [super().extra_repr(), *rates]))


def _weight_property(name: str) -> property:
    return property(lambda module: module.dense(name), doc=f"The dense {name}, decoded on demand.")


def _stack_property(name: str) -> property:
    return property(lambda module: ExpertStack(module, name), doc=f"The experts' {name}, decoded one by one.")


class SQFLinear(SQFModule, nn.Linear):
    """A compressed ``nn.Linear``."""

    weight = _weight_property("weight")

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(input, self.factors()[0], self.bias)


class SQFConv1D(SQFModule, Conv1D):
    """A compressed Conv1D of transformers: a linear layer whose weight is (in, out)."""

    weight = _weight_property("weight")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nf={self.nf}, nx={self.nx}, {self.extra_repr()})"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.factors()[0], self.bias)


class _SQFConv(SQFModule):
    weight = _weight_property("weight")
    _conv_forward: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) to (batch, out, *size)."""
        bias = self._parameters["bias"]
        return self._conv_forward(input, self.dense(dtype=input.dtype), None if bias is None else bias.to(input.dtype))


class SQFConv1d(_SQFConv, nn.Conv1d):
    """A compressed ``nn.Conv1d``."""


class SQFConv2d(_SQFConv, nn.Conv2d):
    """A compressed ``nn.Conv2d``."""


class SQFConv3d(_SQFConv, nn.Conv3d):
    """A compressed ``nn.Conv3d``."""


class SQFEmbedding(SQFModule, nn.Embedding):
    """A compressed ``nn.Embedding``; only the rows asked for are decoded."""

    weight = _weight_property("weight")

    def forward(self, input: Tensor) -> Tensor:
        """Integers (...) to (..., embedding_dim)."""
        return lookup(input, self.factors()[0], self.compute_dtype)


class ExpertStack:
    """Stands for the weight of all experts, (experts, ...), and decodes an expert when it is indexed.

    Any other use, as an argument of a torch function for one, decodes all of them.
    """

    _is_hf_initialized = True

    def __init__(self, module: SQFModule, name: str) -> None:
        self._module, self._name = module, name
        self.shape = torch.Size(module.held[name].shape)
        self.ndim = len(self.shape)
        self.dtype = module.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the packed bytes lie."""
        return getattr(self._module, self._name + SUFFIX).device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:  # noqa: ANN401
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if not one or getattr(self._module, self._name + SUFFIX).is_meta:
            return self.all()[index]
        matrix = self._module.factors(self._name)[int(index)].dense(self.dtype)
        held = self._module.held[self._name]
        return matrix.T if held.transposed else matrix

    def all(self) -> Tensor:
        """Return the dense weight of all experts."""
        return self._module.dense(self._name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call a torch function with the dense weight."""
        plain = [a.all() if isinstance(a, ExpertStack) else a for a in args]
        named = {k: a.all() if isinstance(a, ExpertStack) else a for k, a in (kwargs or {}).items()}
        return func(*plain, **named)


class SQFExperts(SQFModule):
    """Compressed experts whose weights are fused into 3-D parameters; the class of experts follows it."""


KINDS: dict[type[nn.Module], type[SQFModule]] = {
    nn.Linear: SQFLinear,
    Conv1D: SQFConv1D,
    nn.Conv1d: SQFConv1d,
    nn.Conv2d: SQFConv2d,
    nn.Conv3d: SQFConv3d,
    nn.Embedding: SQFEmbedding,
}


def weights_of(module: nn.Module, prefix: str) -> dict[str, Held]:
    """Return the weights of a module (not of its children) that it could hold as factors.

    Args:
        module: any; those of unknown kinds have none.
        prefix: its full name in the model.
    """
    if isinstance(module, SQFModule):
        return {}
    parameters = module._parameters
    weight = parameters.get("weight")
    if weight is not None and weight.is_floating_point() and any(isinstance(module, kind) for kind in KINDS):
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or not weight.requires_grad):
            return {}  # renormalised in place when looked up; or computed (sinusoids), not learned
        held = Held(_full(prefix, "weight"), tuple(weight.shape), isinstance(module, Conv1D))
        return {"weight": held} if weight.dim() >= 2 and weight.numel() else {}
    experts = getattr(module, "num_experts", None)
    return {
        name: Held(_full(prefix, name), tuple(p.shape), bool(getattr(module, "is_transposed", False)), stacked=True)
        for name, p in parameters.items()
        if p is not None and p.dim() == 3 and p.shape[0] == experts and p.is_floating_point() and p.numel()
    }


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}{SUFFIX}" if prefix else name + SUFFIX


def compress_module(module: nn.Module, packed: dict[str, tuple[Held, nn.Parameter]], dtype: torch.dtype) -> None:
    """Make a module hold factors, in place.

    Args:
        module: of one of :data:`KINDS`, or experts.
        packed: name of a weight -> what :func:`weights_of` says of it, and its packed bytes (uint8, 1-D).
        dtype: that its dense weights are to have.
    """
    base = type(module)
    for name, (_, parameter) in packed.items():
        del module._parameters[name]
        module.register_parameter(name + SUFFIX, parameter)
    module.held = {name: held for name, (held, _) in packed.items()}  # type: ignore[assignment]
    module.compute_dtype = dtype  # type: ignore[assignment]
    module._is_hf_initialized = True  # type: ignore[assignment]
    module.__class__ = _compressed_class(base, tuple(packed))  # type: ignore[arg-type]  # classes are hashable


def decompress_module(module: SQFModule, dense: dict[nn.Parameter, nn.Parameter]) -> None:
    """Undo :func:`compress_module`: the module becomes what it was, with the dense weights as parameters.

    Args:
        module: to change in place.
        dense: packed parameter -> dense one, to which this module's are added: weights that were tied stay so.
    """
    held, base = module.held, module.base
    weights = {}
    for name in held:
        packed = getattr(module, name + SUFFIX)
        if packed not in dense:
            dense[packed] = nn.Parameter(module.dense(name))
        weights[name] = dense[packed]
    for name in held:
        del module._parameters[name + SUFFIX]
    del module.held, module.compute_dtype
    module.__class__ = base  # type: ignore[assignment]
    for name, weight in weights.items():
        module.register_parameter(name, weight)


@cache
def _compressed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[SQFModule]:
    if base in KINDS:
        kind = KINDS[base]
        kind.base = base
        return kind
    if names == ("weight",) and (kinds := [KINDS[parent] for parent in base.__mro__ if parent in KINDS]):
        # The subclass first, so that its forward's super().forward() is the compressed one.
        return type(f"SQF{base.__name__}", (base, kinds[0]), {"base": base, "weight": _weight_property("weight")})
    stacks = {name: _stack_property(name) for name in names}
    return type(f"SQF{base.__name__}", (SQFExperts, base), {"base": base, **stacks})


def _blank(base: type[nn.Module], names: tuple[str, ...]) -> SQFModule:
    cls = _compressed_class(base, names)  # type: ignore[arg-type]
    return cls.__new__(cls)
