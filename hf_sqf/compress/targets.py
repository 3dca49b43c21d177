"""Which weights of a model are compressed, and which are not and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_modules import SUFFIX, Held, weights_of

HEAD = "output head"
EXCLUDED = "excluded by modules_to_not_convert"
EMBEDDING = "excluded by include_embeddings=False"
KIND = "kind of module or parameter that is never compressed"
SMALL = "too small to gain"


@dataclass(frozen=True, eq=False)
class Target:
    """One weight, with every place in the model that uses it (tied weights have several).

    Attributes:
        name: the weight's full name; of tied ones that of the source.
        parameter: the dense weight.
        held: its form.
        sites: (module, name of the weight in it, its form there), all sharing the parameter.
        options: what ``overrides`` say of it.
        group: the expression in ``overrides`` whose bits it counts towards; None for the common average.
    """

    name: str
    parameter: nn.Parameter
    held: Held
    sites: tuple[tuple[nn.Module, str, Held], ...]
    options: dict[str, object] = field(default_factory=dict)
    group: str | None = None

    def matrices(self) -> list[Tensor]:
        """Return the matrices (m, n) to be factorized, as views of the dense weight."""
        return self.held.matrices(self.parameter.detach())


def find_targets(model: PreTrainedModel, config: SQFConfig) -> tuple[list[Target], dict[str, str]]:
    """Return the weights to be compressed, and the others of two or more dimensions with the reason why not.

    Raises:
        ValueError: an expression in ``overrides`` fits no weight that is compressed.
    """
    tied = set(model.all_tied_weights_keys)
    sites: dict[nn.Parameter, list[tuple[nn.Module, str, Held]]] = {}
    for prefix, module in model.named_modules():
        for attribute, held in weights_of(module, prefix).items():
            sites.setdefault(module.get_parameter(attribute), []).append((module, attribute, held))

    embeddings, heads = _special_modules(model)
    targets, dense = [], {}
    for parameter, places in sites.items():
        places.sort(key=lambda place: place[2].name.removesuffix(SUFFIX) in tied)  # the source of a tie first
        name = places[0][2].name.removesuffix(SUFFIX)
        if reason := _excluded(places, config, embeddings, heads):
            dense[name] = reason
            continue
        pattern, options = config.override_for(name.rpartition(".")[0])
        group = pattern if "bits" in options else None
        targets.append(Target(name, parameter, places[0][2], tuple(places), options, group))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter not in sites:
            dense[name] = KIND
    for pattern in config.overrides:
        if not any(config.override_for(t.name.rpartition(".")[0])[0] == pattern for t in targets):
            raise ValueError(
                f"overrides: {pattern!r} fits no weight that is compressed (or earlier expressions took them)"
            )
    return targets, dense


def _special_modules(model: PreTrainedModel) -> tuple[set[nn.Module], set[nn.Module]]:
    """Return the embeddings (with a language model's head) and the head of a classifier or the like.

    As everywhere in transformers, the module of the model's last parameter is taken for a head; but whether that
    parameter is a weight or a bias, and only outside of the base model, whose last module is a layer like any other.
    """
    output = model.get_output_embeddings()
    embeddings = {m for m in model.modules() if isinstance(m, nn.Embedding)} | (
        {output} if output is not None else set()
    )
    last = model.get_submodule(list(model.named_parameters())[-1][0].rpartition(".")[0])
    base = model.base_model
    inside = base is model or any(module is last for module in base.modules())
    return embeddings, set() if inside or last in embeddings else {last}


def _excluded(
    places: Iterable[tuple[nn.Module, str, Held]], config: SQFConfig, embeddings: set[nn.Module], heads: set[nn.Module]
) -> str | None:
    for module, _, held in places:
        if not config.include_embeddings and module in embeddings:
            return EMBEDDING
        if config.modules_to_not_convert is None:
            if module in heads:
                return HEAD
        elif not should_convert_module(held.name.rpartition(".")[0], config.modules_to_not_convert):
            return EXCLUDED
    return None
