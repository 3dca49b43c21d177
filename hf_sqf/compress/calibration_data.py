"""What a user gives as calibration data, as inputs of the model.

Inputs are made without padding, since what is padded would be measured too: texts are joined and cut into sequences of
one length where the model continues text, and grouped by their length where it encodes them.
"""

from __future__ import annotations

import ast
import itertools
import logging
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Item = TypeVar("Item")
SELF = "self"
"""The name of the data set that a model writes itself."""
HELD_OUT = 8
"""One of so many inputs is held out to choose shrinkage on."""
EVERY, LEAST = 2, 8
"""Of calibration in sequence: one input of so many is used, but so many at least."""
_MASKED = 0.15  # share of masked tokens, as masked language models are trained
_WRITTEN = 256  # tokens of a text that the model writes, at most: generation slows down as texts grow
_TOGETHER = 16  # texts that it writes at a time: the keys and values of each stay in memory
_LOOK = 8  # texts are read until there are so many times the tokens that are wanted
_LIBRARY = ("argparse", "collections", "csv", "datetime", "decimal", "difflib", "email", "fractions", "http", "imaplib",
            "json", "logging", "mailbox", "pathlib", "random", "sched", "shutil", "statistics", "string", "tarfile",
            "textwrap", "threading", "turtle", "typing", "unittest", "urllib", "uuid", "xml", "zipfile")  # fmt: skip


class Calibration(NamedTuple):
    """Inputs to measure on, and inputs held out."""

    batches: list[Batch]
    held_out: list[Batch]


def calibration(
    model: PreTrainedModel,
    dataset: Any,  # noqa: ANN401
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    samples: int = 32,
    context: int = 512,
    own_text: bool = True,
    seed: int = 0,
) -> Calibration:
    """Return a model's calibration inputs.

    Args:
        model: the model.
        dataset: a list of texts; a ``datasets.Dataset`` or the name of one on the Hub, whose column ``text`` is read;
            an iterable of mappings, which are the model's inputs themselves, of any modality; or ``"self"``: text that
            the model writes itself, which needs no data and has the very distribution that the model knows (an
            encoder reads the docstrings of Python's library instead).
        tokenizer: or its name; None stands for the model's own.
        samples: inputs of each kind of text.
        context: tokens of an input at most.
        own_text: add the text of ``"self"`` to the data given. It makes up for what one kind of text does not show.
        seed: of the text written.

    Raises:
        ValueError: there is no data, or it is of an unknown kind.
    """
    if isinstance(dataset, Iterable) and not isinstance(dataset, str) and not hasattr(dataset, "column_names"):
        head, dataset = _peek(dataset)
        if isinstance(head, Mapping) and "text" not in head:
            return _hold_out([dict(inputs) for inputs in itertools.islice(dataset, samples)])
    tokenizer = _tokenizer(model, tokenizer)
    sources = [] if isinstance(dataset, str) and dataset == SELF else [texts(dataset)]
    batches, held_out = [], []
    context = min(context, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", context))
    for source in sources:
        found = _hold_out(encode(model, tokenizer, source, samples, context, seed))
        batches += found.batches
        held_out += found.held_out
    if own_text or not sources:
        if model.can_generate() and not model.config.is_encoder_decoder:
            own = [{"input_ids": ids[None]} for ids in write(model, tokenizer, samples, min(context, _WRITTEN), seed)]
        else:
            own = encode(model, tokenizer, library_text(), samples, context, seed)
        found = _hold_out(own)
        batches += found.batches
        held_out += found.held_out
    return Calibration(batches, held_out)


def texts(dataset: Any) -> Iterator[str]:  # noqa: ANN401
    """Iterate over the texts of a list, a ``datasets.Dataset`` or the name of one on the Hub."""
    if isinstance(dataset, str):
        import datasets  # only a name on the Hub needs it

        dataset = datasets.load_dataset(dataset, split="train", streaming=True)
    for entry in dataset:
        text = entry.get("text") if isinstance(entry, Mapping) else entry
        if not isinstance(text, str):
            raise ValueError(
                f"dataset must hold texts, or mappings with a text or the model's inputs; got {entry!r:.80}"
            )
        yield text


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Iterable[str],
    samples: int,
    context: int,
    seed: int,
) -> list[Batch]:
    """Return texts as inputs: joined and cut where the model continues text, one by one where it encodes them."""
    if model.can_generate():
        ids: list[int] = []
        for text in source:
            ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= _LOOK * samples * context:
                break
        context = min(context, max(len(ids) // HELD_OUT, 2))  # short texts make shorter inputs, enough to hold one out
        pieces = [ids[at : at + context] for at in range(0, len(ids), context)]
        pieces = [p for p in pieces if len(p) == context]
        rows = [torch.tensor(piece)[None] for piece in spread(pieces, samples)]
        decoder = model.config.is_encoder_decoder
        return [{"input_ids": r, "decoder_input_ids": r} if decoder else {"input_ids": r} for r in rows]
    some = spread(list(itertools.islice((t for t in source if t.strip()), _LOOK * samples)), samples)
    encoded: list[Batch] = [
        dict(tokenizer(text, truncation=True, max_length=context, return_tensors="pt")) for text in some
    ]
    if model.get_output_embeddings() is not None and tokenizer.mask_token_id is not None:
        draw = torch.Generator().manual_seed(seed)
        for inputs in encoded:
            whole = inputs["input_ids"]
            masked = torch.rand(whole.shape, generator=draw) < _MASKED
            inputs["input_ids"] = whole.masked_fill(masked, tokenizer.mask_token_id)
    by_length: dict[int, list[Batch]] = {}
    for inputs in encoded:
        by_length.setdefault(inputs["input_ids"].shape[1], []).append(inputs)
    return [{k: torch.cat([inputs[k] for inputs in group]) for k in group[0]} for group in by_length.values()]


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, context: int, seed: int) -> Tensor:
    """Let a model write: token ids (samples, context), drawn from its own distribution, from the first token on."""
    first = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    written = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for starts in torch.full((samples, 1), first, device=model.device).split(_TOGETHER):
            written.append(model.generate(  # type: ignore[operator]
                starts,
                attention_mask=torch.ones_like(starts),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                min_new_tokens=context - 1, max_new_tokens=context - 1,
            ))  # fmt: skip
    return torch.cat(written)


def library_text() -> Iterator[str]:
    """Iterate over paragraphs of docstrings of Python's library: English prose that is always at hand."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in _LIBRARY:
        for path in sorted([library / f"{name}.py", *(library / name).glob("*.py")]):
            if not path.exists():
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    paragraphs = (ast.get_docstring(node) or "").split("\n\n")
                    yield from (" ".join(p.split()) for p in paragraphs if len(p) > 80)


def _peek(items: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    iterator = iter(items)
    head = next(iterator, None)
    if head is None:
        raise ValueError("dataset is empty")
    return head, itertools.chain([head], iterator)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` of the items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def thinned(batches: Sequence[Item]) -> list[Item]:
    """Return the inputs that run through a model again and again while it is compressed in sequence."""
    return spread(batches, max(len(batches) // EVERY, LEAST))


def _hold_out(batches: list[Batch]) -> Calibration:
    if len(batches) < 2:
        raise ValueError("dataset: calibration needs at least two inputs, or texts enough for two")
    period = min(HELD_OUT, len(batches))
    held = [i % period == period - 1 for i in range(len(batches))]
    return Calibration(
        [b for b, h in zip(batches, held, strict=True) if not h], [b for b, h in zip(batches, held, strict=True) if h]
    )


def _tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str | None) -> PreTrainedTokenizerBase:
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    name = tokenizer or model.name_or_path
    if not name:
        raise ValueError("tokenizer: the model has no name to find one by; give a tokenizer or the name of one")
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return found
