"""Modules that hold factors instead of weights.

A module is compressed in place: its class becomes a compressed subclass of what it was, and each weight ``name``
becomes a uint8 parameter ``name_factors``. So hooks, buffers, biases and shared references stay, every
``isinstance`` still holds, and a subclass with a forward of its own (a scaled embedding, say) keeps it. ``weight``
answers as a dense tensor, decoded on demand.

The parameter's bytes are packed or resident, as the module's ``runtime`` wants them (:mod:`sqf_backends`); in a state
dict they are packed always.

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
from transformers.pytorch_utils import Conv1D

from .sqf_backends import bytes_for, factors_in, keeps_bytes, matrices_in, packed_bytes
from .sqf_config import check_runtime
from .sqf_container import Record, records
from .sqf_factors import Factors
from .sqf_forms import keep_all, take_form, take_form_for_program
from .sqf_memory import release
from .sqf_product import autocasting, linear, matrix, picked, plain, product, rows, under_autocast
from .sqf_resident import is_resident, resident_backend
from .sqf_running import Running

SUFFIX = "_factors"
"""Of a packed parameter's name. An underscore: renaming patterns of transformers end at a word's boundary."""
_WEIGHT = "weight" + SUFFIX


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


class SQFModule(nn.Module):
    """What all compressed modules have in common; a mixin that comes before the module's own class.

    Attributes:
        held: name of a weight -> :class:`Held`.
        compute_dtype: dtype that the dense weights have.
        runtime: how the module runs, one of :data:`~.sqf_config.RUNTIMES`; :func:`set_runtime` changes it.
        waiting: its bytes are still those of the file, and change when it first runs (:mod:`sqf_forms`).
    """

    base: type[nn.Module]
    held: dict[str, Held]
    compute_dtype: torch.dtype
    runtime: str
    waiting: bool
    _running: dict[str, tuple[nn.Parameter, int, int | None, list[Running]]]
    _quick: tuple[nn.Parameter, int, int, Callable[[Tensor, Tensor | None], Tensor | None]] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Make what the module was made from: PEFT builds parts of an adapter by the type of the layer it adapts."""
        return cls.base(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def _bytes(self, name: str) -> nn.Parameter:
        return self._parameters[name + SUFFIX]  # type: ignore[return-value]  # sooner than through __getattr__

    def _operand(self, name: str) -> nn.Parameter:
        """Return the bytes for an operator; a program that is exported takes them as they are."""
        if torch.compiler.is_exporting():
            return self._bytes(name)
        if torch.compiler.is_dynamo_compiling():
            take_form_for_program(self)
        elif self.waiting and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
            take_form(self)
        return self._bytes(name)

    def factors(self, name: str = "weight") -> list[Factors]:
        """Return the factors of a weight, decoded anew: one, or one per expert.

        Raises:
            ValueError: the bytes are damaged, or hold factors of another shape; names the tensor.
        """
        return self._checked(name, factors_in(getattr(self, name + SUFFIX).detach(), self.held[name].name))

    def matrices(self, name: str = "weight") -> list[Running]:
        """Return the matrices of a weight in the form in which they run: one, or one per expert.

        Raises:
            ValueError: as for :meth:`factors`.
        """
        data: nn.Parameter = self._parameters[name + SUFFIX]  # type: ignore[assignment]  # sooner than by a call
        known = self._running.get(name)
        if known is not None and known[0] is data and known[1] == data.data_ptr():
            version = known[2]
            if version is None or version == data._version:
                return known[3]
        if self.waiting:
            take_form(self)
        found = matrices_in(data, self.runtime, self.compute_dtype, self.held[name].name)
        version = None if data.is_inference() else data._version
        self._running[name] = data, data.data_ptr(), version, self._checked(name, found)
        if name == "weight" and version is not None:
            self._quick = data, data.data_ptr(), version, found[0].quick
        return found

    def _forget(self) -> None:
        """Drop what :meth:`matrices` keeps: it would not be found to be of other bytes that lie where it had its."""
        self._running.clear()
        self._quick = None

    def check(self, name: str = "weight") -> str:
        """Check the packed bytes of a weight, without decoding it; return the name that it was packed with, or "".

        Raises:
            ValueError: as for :meth:`factors`.
        """
        found: list[Record] = self._checked(name, records(self._bytes(name).detach().cpu(), self.held[name].name))
        return next((record.weight for record in found), "")

    def _checked(self, name: str, found: list[Any]) -> list[Any]:
        held = self.held[name]
        expected = [held.matrix_shape] * (held.shape[0] if held.stacked else 1)
        shapes = [tuple(f.shape) for f in found]
        if shapes != expected:
            raise ValueError(f"{held.name}: holds factors of shapes {shapes[:4]}, the model expects {expected[:4]}")
        return found

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

    def keep(self, runtime: str) -> None:
        """Run in another way: change the bytes of the parameters to those that it needs. See :func:`set_runtime`."""
        for name, held in self.held.items():
            data = getattr(self, name + SUFFIX)
            if data.is_meta:  # offloaded: the bytes come and go, packed
                continue
            before = data.detach()
            if not keeps_bytes(before, runtime):
                if not is_resident(data):  # a file's shapes are not to be trusted: what runs believes the module's
                    self._checked(name, records(before.cpu(), held.name))
                with torch.inference_mode(data.is_inference()):  # a parameter's data must be as the parameter is
                    after = bytes_for(before, runtime, held.name)
                    data.data = after if after.is_inference() == data.is_inference() else after.clone()
            release(before)  # of a mapped file, which stays mapped as long as one of its tensors is there
        self.runtime, self.waiting = runtime, False
        self._forget()

    def _multiply(self, x: Tensor) -> Tensor:
        parameters = self._parameters
        bias = parameters["bias"]
        if plain(x, bias):
            if self._quick is not None:  # the same as below, by fewer calls: they take longer than some products
                data, at, version, quick = self._quick
                same = data is parameters[_WEIGHT] and data.data_ptr() == at and data._version == version
                if same and not autocasting() and (y := quick(x, bias)) is not None:
                    return y
            return product(self.matrices()[0], under_autocast(x) if autocasting() else x, bias)
        m, n = self.held["weight"].matrix_shape
        x = under_autocast(x)
        return linear(x, self._operand("weight"), bias, m, n, self.runtime, self.compute_dtype)

    def _matrix(self, name: str, index: int, dtype: torch.dtype) -> Tensor:
        m, n = self.held[name].matrix_shape
        data = self._bytes(name)
        if torch.compiler.is_compiling():
            return matrix(data, index, m, n, self.runtime, dtype, self.compute_dtype)
        return self.matrices(name)[index].decode(0, m, dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.held:
            data = self._bytes(name)
            if is_resident(data):
                destination[prefix + name + SUFFIX] = packed_bytes(data)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name, held in self.held.items():
            data, key = self._bytes(name), prefix + name + SUFFIX
            if key in state_dict and not data.is_meta and state_dict[key].dtype == torch.uint8:
                state_dict[key] = bytes_for(state_dict[key].to(data.device), self.runtime, held.name)
                if data.shape != state_dict[key].shape:  # another rate: of weights, the matrices' shapes must agree
                    data.data = torch.empty_like(state_dict[key])
            sentinel = state_dict.get(prefix + name)
            if sentinel is not None and sentinel.dtype == torch.uint8:  # saved models have one, for other readers
                del state_dict[prefix + name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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
        self._forget()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # By the class it was made from: the compressed class may exist in this process only.
        return _blank, (self.base, tuple(self.held)), {**self.__dict__, "_running": {}, "_quick": None}

    def packed_size(self, name: str = "weight") -> int:
        """Return the bytes that a weight takes in a file, whatever it takes in memory."""
        data = getattr(self, name + SUFFIX)
        return resident_backend(data)[1] if is_resident(data) else data.numel()

    def extra_repr(self) -> str:
        """Return the module's own description with the bits per parameter of each weight."""
        rates = []
        for name, held in self.held.items():
            bits = 8.0 * self.packed_size(name) / max(math.prod(held.shape), 1)
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
        return self._multiply(input)


class SQFConv1D(SQFModule, Conv1D):
    """A compressed Conv1D of transformers: a linear layer whose weight is (in, out)."""

    weight = _weight_property("weight")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nf={self.nf}, nx={self.nx}, {self.extra_repr()})"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self._multiply(x)


class SQFConv(SQFModule):
    """What compressed convolutions have in common: the weight is decoded for each call."""

    weight = _weight_property("weight")
    _conv_forward: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) to (batch, out, *size)."""
        bias = self._parameters["bias"]
        weight = self.held["weight"].weight([self._matrix("weight", 0, input.dtype)])
        return self._conv_forward(input, weight, None if bias is None else bias.to(input.dtype))


class SQFConv1d(SQFConv, nn.Conv1d):
    """A compressed ``nn.Conv1d``."""


class SQFConv2d(SQFConv, nn.Conv2d):
    """A compressed ``nn.Conv2d``."""


class SQFConv3d(SQFConv, nn.Conv3d):
    """A compressed ``nn.Conv3d``."""


class SQFEmbedding(SQFModule, nn.Embedding):
    """A compressed ``nn.Embedding``; only the rows asked for are decoded."""

    weight = _weight_property("weight")

    def forward(self, input: Tensor) -> Tensor:
        """Integers (...) to (..., embedding_dim)."""
        return self._pick(input)

    def _pick(self, input: Tensor) -> Tensor:
        if plain(input):
            return picked(self.matrices()[0], input, self.compute_dtype)
        n = self.held["weight"].matrix_shape[1]
        return rows(input, self._operand("weight"), n, self.runtime, self.compute_dtype)


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
        expert = self._module._matrix(self._name, int(index), self.dtype)
        return expert.T if self._module.held[self._name].transposed else expert

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
        computed = type(module) is not nn.Embedding and not weight.requires_grad  # sinusoids; others may just be frozen
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or computed):
            return {}  # renormalised in place when looked up, or not learned
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
    module.runtime = "auto"  # type: ignore[assignment]
    module.waiting = False  # type: ignore[assignment]
    module._running, module._quick = {}, None  # type: ignore[assignment]
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
    del module.held, module.compute_dtype, module.runtime, module.waiting, module._running, module._quick
    module.__class__ = base  # type: ignore[assignment]
    for name, weight in weights.items():
        module.register_parameter(name, weight)


def set_runtime(model: nn.Module, runtime: str) -> None:
    """Change how a compressed model runs, and with it what it keeps in memory; outputs and files stay what they are.

    Args:
        model: with compressed modules, whose bytes are changed in place. Weights on disk or another device's memory
            (offloaded) stay packed.
        runtime: one of :data:`~.sqf_config.RUNTIMES`.

    Raises:
        ValueError: there is no such runtime, or the bytes of a weight are damaged.
    """
    check_runtime(runtime)
    keep_all([(module, runtime) for module in model.modules() if isinstance(module, SQFModule)])


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
