"""How far a compressed model lies from its original: both run on the same inputs."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

Inputs = Mapping[str, Tensor]
"""Keyword arguments of a model's forward, a batch of them."""
TEXTS = f"pydoc_data.topics of Python {platform.python_version()}"
"""What :func:`default_texts` are, for the record."""
HEADINGS = {
    "value": {"kl": "KL (nats)", "cosine": "cosine"},
    "worst": {"kl": "worst KL", "cosine": "lowest cosine"},
    "agreement": {"kl": "top-1 agreement"},
    "perplexity": {"kl": "perplexity"},
    "original_perplexity": {"kl": "original's"},
    "accuracy": {"kl": "accuracy"},
    "original_accuracy": {"kl": "original's accuracy"},
    "word_error_rate": {"kl": "word errors"},
    "original_word_error_rate": {"kl": "original's word errors"},
}
"""Figure of a fidelity check -> metric -> heading."""
_SPOKEN = 32  # tokens of a decoder
_ROWS = 1024  # predictions whose distributions are held at once


def default_texts(count: int = 16) -> list[str]:
    """Return English technical prose that every Python brings along: the longest topics of its language reference."""
    from pydoc_data.topics import topics

    return sorted(topics.values(), key=len, reverse=True)[:count]


def padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, which pads with the token of the end where it has none to pad with."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_inputs(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], context: int, model: PreTrainedModel, batch: int = 8
) -> Iterator[Inputs]:
    """Yield the first ``context`` tokens of each text, ``batch`` texts at a time, padded to the longest."""
    texts = list(texts)
    padding(tokenizer)
    for at in range(0, len(texts), batch):
        encoded = tokenizer(
            texts[at : at + batch], truncation=True, max_length=context, padding=True, return_tensors="pt"
        )
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
        yield _with_decoder(inputs, model)


def random_inputs(model: PreTrainedModel, context: int, count: int = 8, seed: int = 0) -> Iterator[Inputs]:
    """Yield one batch of random tokens (uniform), pixels or mel bins (normal), for models without a tokenizer at hand.

    Raises:
        ValueError: the model takes something else.
    """
    config, draw = model.config, torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        tokens = torch.randint(0, vocabulary, (count, context), generator=draw)
        yield _with_decoder({"input_ids": tokens}, model)
    elif model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (count, getattr(config, "num_channels", 3), height, width)
        yield {"pixel_values": torch.randn(shape, generator=draw)}
    elif model.main_input_name == "input_features" and hasattr(config, "max_source_positions"):  # Whisper and its kin
        bins = torch.randn((count, config.num_mel_bins, 2 * config.max_source_positions), generator=draw)
        tokens = torch.randint(0, config.vocab_size, (count, min(_SPOKEN, context)), generator=draw)
        yield {"input_features": bins, "decoder_input_ids": tokens}
    else:
        raise ValueError(f"no random inputs for a model that takes {model.main_input_name}; give inputs=")


def _with_decoder(inputs: dict[str, Tensor], model: PreTrainedModel) -> Inputs:
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :_SPOKEN]
    return inputs


@torch.no_grad()
def compare(model: PreTrainedModel, original: PreTrainedModel, batches: Iterable[Inputs]) -> dict[str, Any]:
    """Run both models on the same inputs and return how far their outputs lie apart.

    Args:
        model: the compressed one.
        original: what it was made from.
        batches: inputs of both. Where they have ``labels`` (batch,), these are the classes that are right; the models
            do not see them.

    Returns:
        For models that give logits: ``metric`` "kl", ``value``, the mean of KL(original || model) per prediction in
        nats, ``worst``, its largest mean over one input, ``agreement``, the share of predictions whose most likely
        class is the same, ``count`` of predictions; for causal language models also ``perplexity`` and
        ``original_perplexity`` of the next tokens; with labels ``accuracy`` and ``original_accuracy``. For others:
        ``metric`` "cosine", ``value``, the mean cosine of the outputs (hidden states averaged over tokens), ``worst``,
        the smallest, ``count`` of inputs.

    Raises:
        ValueError: an output is not finite, there are no inputs, or labels come without one prediction each.
    """
    modes = model.training, original.training
    model.eval(), original.eval()
    sums = Sums(causal=original.can_generate() and not original.config.is_encoder_decoder)
    # A bar after two seconds, with the time left where the number of batches is known.
    for batch in transformers_logging.tqdm(batches, desc="Comparing with the original", delay=2.0):
        labels = batch.get("labels")
        outputs = [m(**_given(batch, m)) for m in (original, model)]
        mask = batch.get("attention_mask")
        if labels is not None:
            p, q = (o["logits"].float().cpu() if "logits" in o else None for o in outputs)
            sums.add_labels(p, q, labels.cpu())
        if "logits" in outputs[0]:
            for row in range(outputs[0].logits.shape[0]):
                p, q = (o.logits[row].reshape(-1, o.logits.shape[-1]).float().cpu() for o in outputs)
                # Where predictions are not one per token (classes, or a decoder's tokens), all of them count.
                kept = mask[row].bool() if mask is not None and p.shape[0] == mask.shape[1] else slice(None)
                sums.add_logits(p[kept], q[kept], batch["input_ids"][row][kept] if sums.causal else None)
        else:
            sums.add_vectors(*(_pooled(o[0].float().cpu(), mask) for o in outputs))
    model.train(modes[0]), original.train(modes[1])
    return sums.result()


def _given(batch: Inputs, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch without its labels where the model is, pictures and sounds in its dtype."""
    moved = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in moved.items()}


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average (batch, tokens, dim) over the tokens that count; flatten everything else to (batch, dim)."""
    if hidden.dim() == 3 and mask is not None and mask.shape == hidden.shape[:2]:
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return hidden.mean(1) if hidden.dim() == 3 else hidden.flatten(1)


class Sums:
    """What is known of two models' outputs so far; the outputs themselves are not kept.

    Args:
        causal: token ids come with the logits, each predicted by the logits before it.
    """

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.kl: list[Tensor] = []  # (predictions,) of each input
        self.cosine: list[Tensor] = []  # (inputs,) of each batch
        self.agreed = 0
        self.losses = [0.0, 0.0]
        self.tokens = 0
        self.right = [0, 0]
        self.labelled = 0

    def add_logits(self, p: Tensor, q: Tensor, tokens: Tensor | None) -> None:
        """Take float32 (predictions, classes) of one input, p the original's; tokens: (predictions,)."""
        parts = []
        for a, b in zip(p.split(_ROWS), q.split(_ROWS), strict=True):
            log_p, log_q = F.log_softmax(a, -1), F.log_softmax(b, -1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
            self.agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.kl.append(torch.cat(parts))
        if tokens is not None and len(tokens) > 1:
            for index, logits in enumerate((p, q)):
                self.losses[index] += float(F.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
            self.tokens += len(tokens) - 1

    def add_vectors(self, p: Tensor, q: Tensor) -> None:
        """Take float32 (inputs, dim) of a batch."""
        self.cosine.append(F.cosine_similarity(p, q, dim=-1))

    def add_labels(self, p: Tensor | None, q: Tensor | None, labels: Tensor) -> None:
        """Take the logits (inputs, classes) of a batch, p the original's, and the classes that are right (inputs,).

        Raises:
            ValueError: there is not one prediction for each input.
        """
        if p is None or q is None or p.dim() != 2:
            raise ValueError("labels are classes of inputs, and the model does not predict one for each input")
        for index, logits in enumerate((p, q)):
            self.right[index] += int((logits.argmax(-1) == labels).sum())
        self.labelled += len(labels)

    def perplexities(self) -> tuple[float, float]:
        """Return the original's and the model's perplexity of the next tokens, e^700 at most.

        Raises:
            ValueError: no tokens came with the logits.
        """
        if not self.tokens:
            raise ValueError("there are no tokens to tell a perplexity by")
        original, own = (math.exp(min(loss / self.tokens, 700.0)) for loss in self.losses)
        return original, own

    def result(self) -> dict[str, Any]:
        """Return what :func:`compare` returns.

        Raises:
            ValueError: an output was not finite, or there were no inputs.
        """
        if not self.kl and not self.cosine:
            raise ValueError("there are no inputs to compare the models on")
        values = torch.cat(self.kl or self.cosine)
        if not torch.isfinite(values).all():
            raise ValueError("an output of the original or of the compressed model is not finite")
        mean, count = round(float(values.mean()), 6), values.numel()
        if self.cosine:
            return {"metric": "cosine", "value": mean, "worst": round(float(values.min()), 6), "count": count}
        worst = max(float(kl.mean()) for kl in self.kl)
        found = {"metric": "kl", "value": mean, "worst": round(worst, 6), "count": count}
        found["agreement"] = round(self.agreed / count, 6)
        if self.tokens:
            original, own = self.perplexities()
            found |= {"perplexity": round(own, 4), "original_perplexity": round(original, 4)}
        if self.labelled:
            original, own = (round(right / self.labelled, 6) for right in self.right)
            found |= {"accuracy": own, "original_accuracy": original}
        return found
