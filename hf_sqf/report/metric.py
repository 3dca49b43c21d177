"""The fidelity of a compressed model as a metric of the library ``evaluate``: ``pip install 'hf-sqf[evaluate]'``.

It is a class of this package, so that nothing is loaded from the Hub::

    metric = Fidelity()
    for batch in batches:
        with torch.no_grad():
            metric.add_batch(predictions=compressed(**batch).logits, references=original(**batch).logits)
    metric.compute()  # {"kl": ..., "worst_kl": ..., "agreement": ..., "count": ...}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fidelity import Sums

try:
    import evaluate
    from datasets import Features, Sequence, Value
except ImportError as error:
    raise ImportError("hf_sqf.report.metric takes evaluate: pip install 'hf-sqf[evaluate]'") from error

KINDS = ("logits", "embeddings")
_IGNORED = -100  # what transformers labels padding with


class Fidelity(evaluate.Metric):
    """How far a compressed model's outputs (predictions) lie from its original's (references).

    Batches are reduced when they are added, as large as a language model's logits are; nothing is written to disk.

    Args:
        kind: ``"logits"`` or ``"embeddings"``.
        **kwargs: of ``evaluate.Metric``; one process measures.

    Raises:
        ValueError: the kind is unknown, or several processes are asked for.
    """

    def __init__(self, kind: str = "logits", **kwargs: Any) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(f"one process measures fidelity, and num_process={kwargs['num_process']} are asked for")
        self.kind = kind
        super().__init__(config_name=kind, **kwargs)
        self._sums = Sums(causal=False)

    def _info(self) -> evaluate.MetricInfo:
        outputs = {name: Sequence(Value("float32")) for name in ("predictions", "references")}
        tokens = {name: Sequence(Sequence(Value("float32"))) for name in outputs} | {"tokens": Sequence(Value("int64"))}
        return evaluate.MetricInfo(
            description="Fidelity of a compressed model to its original, from the outputs of both on the same inputs.",
            citation="",
            inputs_description="predictions: the compressed model's outputs; references: the original's.",
            features=[Features(outputs), Features(tokens)] if self.kind == "logits" else Features(outputs),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Take outputs of one batch.

        Args:
            predictions: the compressed model's: logits (inputs, ..., classes), or embeddings (inputs, dim). Tensors,
                arrays or lists.
            references: the original's, of the same shape.
            **kwargs: ``tokens``, the token ids (inputs, tokens) where logits are (inputs, tokens, vocabulary) and each
                predicts the next one; -100 where there is padding, which does not count.

        Raises:
            ValueError: shapes do not agree, or tokens do not go with these outputs.
        """
        if unknown := sorted(kwargs.keys() - {"tokens"}):
            raise ValueError(f"fidelity takes predictions, references and tokens, got {', '.join(unknown)}")
        own, original = _tensor(predictions, "predictions"), _tensor(references, "references")
        tokens = kwargs.get("tokens")
        if own.shape != original.shape or own.dim() < 2:
            shapes = f"{tuple(own.shape)} and {tuple(original.shape)}"
            raise ValueError(f"predictions and references must be of one shape, of two dimensions or more: {shapes}")
        if self.kind == "embeddings":
            if own.dim() != 2 or tokens is not None:
                raise ValueError("embeddings are (inputs, dim), and come without tokens")
            self._sums.add_vectors(original, own)
            return
        ids = None if tokens is None else torch.as_tensor(tokens).cpu()
        if ids is not None and ids.shape != own.shape[:-1]:
            raise ValueError(f"tokens must be of shape {tuple(own.shape[:-1])}, as the logits are: {tuple(ids.shape)}")
        for row, (p, q) in enumerate(zip(original, own, strict=True)):
            p, q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
            if ids is None:
                self._sums.add_logits(p, q, None)
            else:
                kept = ids[row] != _IGNORED
                self._sums.add_logits(p[kept], q[kept], ids[row][kept])

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Take outputs of one input: as :meth:`add_batch`, without the first dimension."""
        one = {
            name: _tensor(value, name)[None] for name, value in (("prediction", prediction), ("reference", reference))
        }
        if kwargs.get("tokens") is not None:
            kwargs["tokens"] = torch.as_tensor(kwargs["tokens"])[None]
        self.add_batch(predictions=one["prediction"], references=one["reference"], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the figures of all batches, and begin anew.

        Args:
            predictions: a last batch; may be left out, with references.
            references: as for :meth:`add_batch`.
            **kwargs: as for :meth:`add_batch`.

        Returns:
            For logits: ``kl``, the mean of KL(original || compressed) per prediction in nats, ``worst_kl``, its largest
            mean over one input, ``agreement``, the share of predictions whose most likely class is the same, and
            ``count`` of predictions; with tokens also ``perplexity``, ``original_perplexity``, and
            ``perplexity_ratio``, the one over the other. For embeddings: ``cosine``, the mean, ``lowest_cosine``, and
            ``count`` of inputs.

        Raises:
            ValueError: there were no outputs, or one is not finite.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        sums, self._sums = self._sums, Sums(causal=False)
        found = sums.result()
        if found.pop("metric") == "cosine":
            return {"cosine": found["value"], "lowest_cosine": found["worst"], "count": found["count"]}
        renamed = {"kl": found.pop("value"), "worst_kl": found.pop("worst"), **found}
        if sums.tokens:
            original, own = sums.perplexities()
            renamed["perplexity_ratio"] = own / original
        return renamed


def _tensor(values: Any, name: str) -> Tensor:  # noqa: ANN401
    if values is None:
        raise ValueError(f"{name} are missing")
    return torch.as_tensor(values).detach().float().cpu()
