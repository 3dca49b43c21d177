"""Runs calibration data through a model and measures the statistics of its weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..runtime.sqf_config import SQFConfig
from ..runtime.sqf_modules import SUFFIX, Held
from .blocks import Batch, Replay, find_stacks
from .calibration_data import Calibration, calibration, thinned
from .mapped import release_module
from .ranks import Ranks
from .recorder import ROWS, Recorder, measuring, shared_inputs
from .statistics import (
    FileMoments,
    Statistics,
    choose_diagonal_shrinkage,
    choose_scale,
    choose_shrinkage,
    fingerprint,
    random_errors,
    shrink_diagonal,
    typical_importance,
)
from .sums import Sums, measure_all
from .targets import Target

logger = logging.getLogger(__name__)

UNTESTED = 0.1
"""Shrinkage of what no held-out data reached."""
GRADIENTS_EVERY = 2
"""Gradients are taken of one batch of so many: g^2 has fewer numbers to be found than H, and costs twice as much. They
are taken of all batches that are held out: the scales of whole weights hang on those few."""
_GRADIENT_COST = 4  # of running a batch forth, back and (recomputed) forth again, in runs forth


def data_for(model: PreTrainedModel, config: SQFConfig) -> Calibration | None:
    """Return the calibration data that a config names, the same on all ranks; None where it names none.

    Raises:
        ValueError: the data cannot be used.
    """
    if config.dataset is None:
        return None
    options = config.tokenizer, config.samples, config.context, config.own_text, config.seed
    found = Ranks.here().from_first(lambda: calibration(model, config.dataset, *options))
    release_module(model)  # which may have written text
    return found


def measure(
    model: PreTrainedModel,
    targets: Iterable[Target],
    config: SQFConfig,
    data: Calibration | None = None,
    again: bool = False,
) -> Statistics | None:
    """Return the statistics that a config asks for: read, or measured on its data; None where it names neither.

    Args:
        model: with dense weights.
        targets: the weights to be compressed.
        config: what is asked for.
        data: what :func:`data_for` returned, if it was called already.
        again: see :func:`collect`.

    Raises:
        ValueError: the data cannot be used, or the statistics are those of another model.
    """
    if config.statistics is not None:
        given = config.statistics
        found = given if isinstance(given, Statistics) else Statistics.load(given)
        found.check(model)
        return found
    data = data or data_for(model, config)
    return None if data is None else collect(model, targets, data.batches, data.held_out, config.seed, again=again)


def collect(
    model: PreTrainedModel,
    targets: Iterable[Target],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    seed: int = 0,
    memory: int | None = None,
    again: bool = False,
) -> Statistics:
    """Measure the statistics of a model's weights. Ranks of ``torch.distributed`` share the data; all call it alike.

    Args:
        model: with dense weights.
        targets: the weights to be compressed.
        batches: inputs of the model, without padding (what is padded would be measured too).
        held_out: inputs on which shrinkage and scales are chosen.
        seed: of the labels drawn.
        memory: bytes that the moments H of one block may take; where they need more, the data runs through it several
            times. None lets them take as much as the model's parameters do.
        again: the moments of blocks will be measured again, in sequence: less data will do here.

    Raises:
        ValueError: there is no data, or activations or gradients are not finite.
        RuntimeError: another rank stopped (says why), died, or did not come.
        OSError: the disk that temporary files are on is full.
    """
    if not batches or not held_out:
        raise ValueError("calibration needs data: two sequences or inputs at least")
    collection, ranks = _Collection(model, list(targets)), Ranks.here()
    with measuring(model):
        shared = shared_inputs(model, collection.weights, batches[0])
        recorder = Recorder(collection.weights, shared, collection.head)
        replay = Replay(model, find_stacks(model, batches[0]))
        limit = memory or sum(p.numel() * p.element_size() for p in model.parameters())
        plan = collection.plan(shared, replay, limit)
        some = batches[::GRADIENTS_EVERY], held_out
        cost = _GRADIENT_COST * max(len(replay.blocks), 1)
        few = again and bool(replay.blocks)
        every = (thinned(batches), thinned(held_out)) if few else (batches, held_out)
        steps = cost * sum(map(len, some)) + len(plan) * sum(map(len, every))
        with recorder, transformers_logging.tqdm(total=steps, desc="Calibrating", disable=not ranks.first) as bar:
            for index, recorder.wanted in plan:
                with replay.at(index) as run:
                    forth = partial(_forth, run)
                    collection.keep_moments(measure_all(recorder, ranks, every, forth, bar.update))
                for block in replay.blocks[index : index + 1]:
                    release_module(block)
            recorder.wanted = collection.tables  # the moments of embeddings are those of gradients
            recorder.errors = {
                key: random_errors(H, collection.shrinkage[key]) for key, H in collection.moments.items()
            }
            gradients = partial(_gradients, model, recorder, seed)
            sums = measure_all(recorder, ranks, some, gradients, lambda count: bar.update(cost * count))
            collection.keep_moments(sums)
        release_module(model)
        collection.finish_gradients(sums, shared)
    return collection.statistics()


def _forth(run: Callable[[str | int, Batch], Any], number: int, batch: Batch) -> int:
    """Run a batch for what the recorder sees of it; no predictions are measured."""
    run(number, batch)
    return 0


def _gradients(model: nn.Module, recorder: Recorder, seed: int, number: int, batch: Batch) -> int:
    """Run one batch forth and back, with labels drawn from the output; return the rows of predictions."""
    # Labels that a batch draws do not depend on what ran before it.
    draw = hashlib.sha256(f"{seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(draw[:4], "big"))
    # Inputs that are not looked up in a table are where the graph begins.
    batch = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.enable_grad():  # whatever the caller has set
        target, gradient = _likelihood(model(**batch), generator)
        recorder.backward(target, gradient)
    return gradient.numel() // gradient.shape[-1]


def _likelihood(output: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return an output (..., C) and the gradient of a random loss there, whose second moment is the Fisher information.

    For logits the loss is -log p_y with y drawn from p, so that the gradient is ``p - 1_y``. For a model without a
    head it is a random projection of its mean-pooled, normalised embedding, whose second moment measures the squared
    error of the embedding.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        embedding = F.normalize(_pooled(output), dim=-1)
        return embedding, torch.randn(embedding.shape, generator=generator).to(embedding)
    if logits.dim() == 4:  # segmentation: (batch, classes, height, width)
        logits = logits.movedim(1, -1)
    gradient = torch.empty_like(logits)
    rows = zip(logits.detach().flatten(0, -2).split(ROWS), gradient.flatten(0, -2).split(ROWS), strict=True)
    for z, delta in rows:
        p = z.float().softmax(-1)
        below = p.cumsum(-1)
        draw = torch.rand(len(p), 1, generator=generator).to(p.device) * below[:, -1:]
        y = torch.searchsorted(below, draw).clamp_max_(p.shape[1] - 1)
        delta.copy_(p.scatter_add_(1, y, torch.full_like(draw, -1.0)))
    return logits, gradient


def _pooled(output: Any) -> Tensor:  # noqa: ANN401
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(f"calibration needs logits or last_hidden_state; {type(output).__name__} has neither")
    return hidden.flatten(2).mean(-1) if hidden.dim() == 4 else hidden.mean(1)


class _Collection:
    """What is known of a model's weights, and how sums become statistics."""

    def __init__(self, model: PreTrainedModel, targets: list[Target]) -> None:
        self.model, self.targets = model, targets
        self.weights: dict[str, nn.Module | nn.Parameter] = {}
        self.held: dict[str, Held] = {}
        self.head: str | None = None
        output = model.get_output_embeddings()
        for target in targets:
            for module, _, held in target.sites:
                name = held.name.removesuffix(SUFFIX)
                self.held[name] = held
                self.weights[name] = target.parameter if held.stacked else module
                self.head = name if module is output else self.head
        self.rows = 0
        self.tables = {name for name, weight in self.weights.items() if isinstance(weight, nn.Embedding)}
        self.moments = FileMoments()
        self.energies: dict[str, Tensor] = {}
        self.inputs: dict[str, str] = {}
        self.shrinkage: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def plan(self, shared: Mapping[str, str], replay: Replay, limit: int) -> list[tuple[int, set[str]]]:
        """Return what to measure in which order: (index of a block, names of inputs whose moments are summed there).

        The last index stands for all that is in no block. Where moments of one index need more than ``limit`` bytes,
        it comes several times.
        """
        block_of = {module: i for i, block in enumerate(replay.blocks) for module in block.modules()}
        module_of = {held.name.removesuffix(SUFFIX): m for t in self.targets for m, _, held in t.sites}
        sizes = dict.fromkeys(range(len(replay.blocks) + 1), 0)
        wanted: dict[int, list[set[str]]] = {index: [set()] for index in sizes}
        for name, held in self.held.items():
            if shared.get(name, name) != name or name in self.tables:
                continue
            index = block_of.get(module_of[name], len(replay.blocks))
            for part in [f"{name}.{i}" for i in range(held.shape[0])] if held.stacked else [name]:
                size = 4 * held.matrix_shape[1] ** 2
                if sizes[index] + size > limit and wanted[index][-1]:
                    wanted[index].append(set())
                    sizes[index] = 0
                wanted[index][-1].add(part)
                sizes[index] += size
        plan = [(index, names) for index, parts in wanted.items() for names in parts]
        logger.info("statistics are measured in %d parts, of up to %.0f MB each", len(plan), max(sizes.values()) / 1e6)
        return plan

    def keep_moments(self, sums: Sums) -> None:
        """Turn sums into means, choose their shrinkage, and move them to a file."""
        for key, total in sums.moments.items():
            H = total.div_(sums.counts[key])
            held = sums.held_inputs.pop(key, None)
            self.shrinkage[key] = choose_shrinkage(H, torch.cat(held)) if held else UNTESTED
            if sums.counts[key] < len(H):
                logger.warning("%s: %d rows of data for %d dimensions, shrunk by %.4g towards the identity",
                               key, sums.counts[key], len(H), self.shrinkage[key])  # fmt: skip
        self.moments.add(sums.moments)

    def finish_gradients(self, sums: Sums, shared: Mapping[str, str]) -> None:
        """Turn the sums of the gradients' squares into ``g^2`` for one row of predictions, and join tied weights."""
        self.rows = sums.rows
        for target in self.targets:
            names = [held.name.removesuffix(SUFFIX) for _, _, held in target.sites]
            if target.held.stacked:
                names = [f"{target.name}.{i}" for i in range(target.held.shape[0])]
            for name in names:
                self._gradient(sums, name, shared.get(name, name))
            found = [name for name in names if name in self.energies]
            if len(target.sites) > 1 and found:
                self._join(target.name, found)
                for name in names:
                    self.notes.pop(name, None)

    def _gradient(self, sums: Sums, name: str, key: str) -> None:
        energy = sums.energies.get(name)
        if energy is None or not energy.any():
            self.notes[name] = "the data did not reach it"
            return
        held = sums.held_energies.get(name)
        self.shrinkage[f"{name}:g"] = choose_diagonal_shrinkage(energy, held) if held is not None else UNTESTED
        # A table's is E over the positions of 1_id (x) delta delta^T: the energy of a row is its share of all.
        unit = energy.sum() / sums.counts[key] if name in self.tables else 1.0
        self.energies[name], self.inputs[name] = energy / unit / self.rows, key
        changes = sums.held_changes.get(name)
        if changes is not None:
            shrunk = shrink_diagonal(self.energies[name], self.shrinkage[f"{name}:g"])
            self.scales[name] = choose_scale(shrunk, changes / unit / sums.held_rows)

    def _join(self, name: str, parts: list[str]) -> None:
        """Join the metrics of tied weights: the nearest single product to ``sum_p diag(g_p^2) (x) H_p``.

        Its factors are the partial traces, ``H = sum_p tr(g_p^2) H_p`` and ``g^2 = sum_p tr(H_p) g_p^2 / tr(H)``.
        """
        moments = [self.moments[self.inputs[part]] for part in parts]
        energies = [
            shrink_diagonal(self.energies.pop(part), self.shrinkage.pop(f"{part}:g")) * self.scales.pop(part, 1.0)
            for part in parts
        ]
        traces = [H.trace() for H in moments]
        H = torch.stack([energy.sum() * moment for energy, moment in zip(energies, moments, strict=True)]).sum(0)
        energy = torch.stack([trace * energy for trace, energy in zip(traces, energies, strict=True)]).sum(0)
        shares = [self.shrinkage[self.inputs[part]] for part in parts]
        self.moments.add({name: H})
        self.energies[name] = energy / H.trace()
        self.inputs[name], self.shrinkage[name], self.shrinkage[f"{name}:g"] = name, max(shares), 0.0

    def statistics(self) -> Statistics:
        """Return what was measured."""
        for name in [name for name in self.energies if self.inputs[name] not in self.moments]:
            del self.energies[name]
            self.notes[name] = "its inputs are not rows that a matrix multiplies"
        self.moments.keep({self.inputs[name] for name in self.energies})  # not the parts of what was joined
        for name, note in self.notes.items():
            logger.warning("%s: %s; it is given the importance of a typical weight", name, note)
        mark = fingerprint(self.model)
        found = Statistics(
            self.moments, self.energies, self.inputs, self.shrinkage, 1.0, self.rows, mark, self.notes, self.scales
        )
        return replace(found, typical=typical_importance(found, self.targets))
