"""SQFCallback: the Trainer trains the factors of a compressed model."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from transformers.utils import logging as transformers_logging

from ..compress.rate import HEADER
from ..runtime.sqf_backends import name_in
from ..runtime.sqf_codec import ideal_bits
from ..runtime.sqf_factors import Factors
from ..runtime.sqf_model import compressed_modules
from ..runtime.sqf_modules import SUFFIX, Held, SQFModule
from ..runtime.sqf_quantizer import TRAINERS
from ..runtime.sqf_size import compressed_bytes
from .blockwise import distill_blocks
from .distillation import watch
from .factors import TrainedWeight
from .modules import PREFIX, TrainedModule, finish, start
from .relative import RelativeSteps
from .resuming import Keeper
from .terms import Options, TrainedTerm

logger = transformers_logging.get_logger("transformers.hf_sqf")  # under transformers, so that its verbosity counts

MODES = ("light", "latent", "hard")
_BLOCK_BATCHES = 16
"""Most batches that blocks are fitted on: what a block is given for all of them is in memory."""


class SQFCallback(TrainerCallback):
    """Pass one to a Trainer with a compressed model, and ``train()`` trains the factors.

    The model is made trainable when the Trainer is built, and is an ordinary compressed model again when training
    ends; so is every checkpoint, at any time. A second ``train()`` goes on from there.

    Scales train well at a learning rate of 2e-3 with Adam: they are trained as logarithms. What is trained beside the
    factors (norms, biases, new heads) moves relative to its size, too: see :mod:`.relative`.

    Training logs ``bits`` (per weight, of all that is trained), ``sparsity``, and ``codes_changed`` (per step, in share
    of all). The log history has them, and callbacks that come after this one: for TensorBoard, say,
    ``callbacks=[SQFCallback(), TensorBoardCallback()]`` with ``report_to="none"``.

    Args:
        mode: ``"light"`` trains scales and dictionaries: codes stay. ``"latent"`` trains codes, too: floats from which
            the codes are projected after each step, as dictionaries are. ``"hard"`` does so with the parameters
            themselves, and adds what the projection took from them at the next step.
        train: which weights: ``"all"``, with all that is not compressed (norms, biases, new heads) but embeddings;
            ``"light"``, the same without codes; or a regular expression, searched for in the names of weights and
            of other parameters: what it does not match stays as it is.
        resolution: least divisions of an octave in trained scales. The solvers have 16; finer scales take some bytes.
        code_rate: how far codes move while the logarithm of a scale moves 1: the ratio of their learning rates. Adam
            moves every code in every step, whatever its gradient tells: over a whole training a tenth of a step of the
            grid or two is much for a model of millions. Small models with labels take more.
        every: optimizer steps from one projection of codes on a trellis to the next. In between, the codes are those
            of the last one.
        share: most of the codes that a step may change, those first whose latents have gone furthest; on a trellis a
            few more have to go along. None: 0.002, but all of scalar and one-hot codes that start from an ``original``.
        original: the model that was compressed, such as the teacher of a distillation. Latents of codes that were
            rounded without data then start at its weights instead of at the codes (as near as leaves the codes as they
            are), and training codes gets much further: see :mod:`.latents`. It is left as it is, and may have any
            dtype.
        block_steps: steps in which each block is fitted to the original's before training from end to end begins, on
            batches of the training data, at the Trainer's learning rate: see :mod:`.blockwise`. Needs ``original``. A
            run that resumes from a checkpoint has had them.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        mode: str = "light",
        train: str = "all",
        resolution: int = 32,
        code_rate: float = 0.5,
        every: int = 8,
        share: float | None = None,
        original: PreTrainedModel | None = None,
        block_steps: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not isinstance(train, str):
            raise ValueError(f'train must be "all", "light" or a regular expression, got {train!r}')
        try:
            self._pattern = None if train in ("all", "light") else re.compile(train)
        except re.error as error:
            raise ValueError(f"train: {train!r} is not a regular expression: {error}") from error
        for name, value, least in (("resolution", resolution, 1), ("every", every, 1), ("code_rate", code_rate, 0.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least or value == 0:
                raise ValueError(f"{name} must be a number of {least or 'more than 0'} or more, got {value!r}")
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise ValueError(f"share must lie in (0, 1], got {share!r}")
        if isinstance(block_steps, bool) or not isinstance(block_steps, int) or block_steps < 0:
            raise ValueError(f"block_steps must be an integer of 0 or more, got {block_steps!r}")
        if block_steps and original is None:
            raise ValueError("block_steps needs the original that blocks are fitted to: give it as original=")
        codes = mode != "light" and train != "light"
        self.mode, self.train = mode, train
        self._options = Options(codes, mode == "hard", int(resolution), float(code_rate), int(every), share)
        self._original, self._block_steps = original, block_steps
        self._model: PreTrainedModel | None = None
        self._modules: list[tuple[SQFModule, dict[str, TrainedWeight]]] = []
        self._weights: list[TrainedWeight] = []
        self._frozen: list[nn.Parameter] = []
        self._keeper: Keeper | None = None
        self._beside: RelativeSteps | None = None
        self._logged: tuple[int, int] = 0, 0  # step, and codes changed until then
        TRAINERS.add(self)

    # ------------------------------------------------------------------------------------------ start and end

    def start(self, model: PreTrainedModel) -> None:
        """Make a compressed model trainable, in place; the Trainer's start does it.

        Raises:
            ValueError: there is nothing to train, or the original is another model's.
        """
        if any(isinstance(module, TrainedModule) for module in model.modules()):
            raise ValueError("the factors of this model are being trained already, by another SQFCallback")
        found = [(name, module) for name, module in compressed_modules(model) if self._takes(name, module)]
        if not found:
            where = "" if self._pattern is None else f" whose name matches train={self.train!r}"
            raise ValueError(f"the model has no compressed weight{where}: compress it first, see hf_sqf.compress")
        known: dict[nn.Parameter, TrainedWeight] = {}
        for path, module in found:
            trained = {}
            for name, held in module.held.items():
                data: nn.Parameter = getattr(module, name + SUFFIX)
                if data.is_meta:
                    raise ValueError(f"{held.name} is offloaded: load the model without offloading to train it")
                if data not in known:
                    packed = name_in(data.detach(), held.name)
                    matrices = self._matrices(held, f"{path}.{name}", packed)
                    known[data] = TrainedWeight(held.name, module.factors(name), self._options, packed, matrices)
                trained[name] = known[data]
            self._modules.append((module, trained))
        self._model, self._weights = model, list(known.values())
        self._keeper = Keeper(self._terms())
        self._install()

    def _matrices(self, held: Held, *names: str) -> list[Tensor] | None:
        """Return the matrices of the original's weight of one of these names, if there is an original."""
        if self._original is None or not self._options.codes:
            return None
        known = (_parameter(self._original, name) for name in names)
        weight = next((parameter for parameter in known if parameter is not None), None)
        if weight is None or tuple(weight.shape) != held.shape:
            found = "none of that name" if weight is None else f"one of shape {tuple(weight.shape)}"
            raise ValueError(f"original must have a weight {names[0]} of shape {held.shape}; it has {found}")
        return held.matrices(weight.detach())

    def _takes(self, name: str, module: SQFModule) -> bool:
        return self._pattern is None or any(self._pattern.search(f"{name}.{weight}") for weight in module.held)

    def _install(self) -> None:
        assert self._model is not None
        for module, trained in self._modules:
            start(module, trained)
        embeddings = _dense_embeddings(self._model) if self._pattern is None else set()
        for name, parameter in self._model.named_parameters():
            left_out = parameter in embeddings if self._pattern is None else not self._pattern.search(name)
            if parameter.requires_grad and PREFIX not in name and left_out:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
        self._beside = RelativeSteps(self._model)
        _restate(self._model, fidelity=None)  # what was measured is no longer what will be saved

    def _terms(self) -> list[TrainedTerm]:
        return [term for weight in self._weights for term in weight.all_terms()]

    def finish(self) -> None:
        """Turn the model into an ordinary compressed one again, with the factors as trained; the end of training does.

        Call it where training ended with an exception. Does nothing if there is nothing to do.
        """
        if self._model is None or not self._started():
            return
        for module, _ in self._modules:
            finish(module)  # type: ignore[arg-type]  # its class is another now
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        if self._keeper is not None:
            self._keeper.detach()
        coverage = self._model.config.quantization_config.coverage or {}
        if coverage.get("compressed"):
            bits = 8.0 * compressed_bytes(self._model) / coverage["compressed"]
            _restate(self._model, coverage={**coverage, "bits": round(bits, 4)})

    def _started(self) -> bool:
        return any(isinstance(module, TrainedModule) for module, _ in self._modules)

    # ------------------------------------------------------------------------------------------ the Trainer's events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the model trainable, before there is an optimizer.

        Raises:
            ValueError: the model or the arguments do not go with factors; says which and why.
        """
        model = kwargs["model"]
        if getattr(model, "peft_config", None):
            raise ValueError("adapters train without SQFCallback: leave it out, or train the factors without adapters")
        if args.fsdp:
            raise ValueError("fsdp shards parameters, and codes cannot be projected on shards: use DDP (torchrun)")
        if args.deepspeed:
            raise ValueError("deepspeed shards or offloads parameters, and codes cannot be projected there: use DDP")
        if args.weight_decay:
            raise ValueError(
                f"weight_decay={args.weight_decay} would draw scales towards 1 and codes towards 0: set weight_decay=0"
            )
        self.start(model)
        watch(model, args.gradient_accumulation_steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what a checkpoint keeps of the latents from the optimizer's state."""
        assert self._keeper is not None
        if not self._started():  # a second train(): the optimizer has the same parameters still
            for module, trained in self._modules:
                for name, weight in trained.items():
                    weight.read(module.factors(name))
            self._install()
        self._keeper.attach(kwargs["optimizer"])
        if self._block_steps and state.global_step == 0:
            self._fit_blocks(args, kwargs["train_dataloader"])
        self._logged = state.global_step, sum(term.changed for term in self._terms())

    def _fit_blocks(self, args: TrainingArguments, data: Iterable[Mapping[str, Any]]) -> None:
        assert self._model is not None and self._original is not None
        with torch.random.fork_rng():  # as if the data had not been looked at
            batches = [_inputs(batch) for batch in itertools.islice(data, min(self._block_steps, _BLOCK_BATCHES))]
        self._original.to(self._model.device)  # type: ignore[arg-type]  # as transformers annotates it
        before, after = distill_blocks(
            self._model, self._original, batches, self._block_steps, args.learning_rate, self._project_in
        )
        logger.info("Blocks fitted to the original's: mean relative error of %.4f became %.4f", before, after)

    @torch.no_grad()
    def _project_in(self, block: nn.Module, step: int) -> None:
        inside = set(block.modules())
        for weight in {w for module, trained in self._modules if module in inside for w in trained.values()}:
            weight.project(step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where biases and norms are."""
        assert self._beside is not None
        self._beside.begin()

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shorten the steps of biases and norms, and project the codes: from here on they are in their sets again."""
        assert self._beside is not None
        self._beside.end()
        for weight in self._weights:
            weight.project(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to what training logs. Callbacks that report must come after this one to see it."""
        if logs is None or "loss" not in logs or not self._started():
            return
        changed = sum(term.changed for term in self._terms())
        steps = max(state.global_step - self._logged[0], 1)
        figures = self.figures()
        figures["codes_changed"] = (changed - self._logged[1]) / steps / max(self._codes(), 1)
        self._logged = state.global_step, changed
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave an ordinary compressed model."""
        self.finish()

    # ------------------------------------------------------------------------------------------ figures

    def _codes(self) -> int:
        return sum(term.term.codes.numel() for term in self._terms())

    def figures(self) -> dict[str, float]:
        """Return ``bits`` per weight and ``sparsity`` of all that is trained, as the coder's models have it."""
        bits, parameters, zeros, codes = 0.0, 0, 0.0, 0
        for weight in self._weights:
            parameters += sum(m * n for m, n in weight.shapes)
            for trained in weight.all_terms():
                term = trained.current()
                scales = sum(ideal_bits(q[None].cpu().numpy()) for q in (term.rows, term.steps))
                bits += HEADER + trained.coded_bits() + scales
                count = term.codes.shape[0] * term.atom_count
                zeros += count * Factors((1, 1), "", (term,)).sparsity
                codes += count
        return {"bits": bits / max(parameters, 1), "sparsity": zeros / max(codes, 1)}


def _inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a batch without its labels."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and "label" not in name}


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _dense_embeddings(model: PreTrainedModel) -> set[nn.Parameter]:
    """Return the embeddings, tied to a head or not, that are not compressed: a scale's learning rate is not theirs."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    found = [module._parameters.get("weight") for module in (*modules, model.get_output_embeddings()) if module]
    return {parameter for parameter in found if parameter is not None}


def _restate(model: PreTrainedModel, **changes: Any) -> None:
    """Change fields of a model's own config of compression: of a copy, since configs are shared."""
    config = copy.copy(model.config.quantization_config)
    for name, value in changes.items():
        setattr(config, name, value)
    model.config.quantization_config = config
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config = config
