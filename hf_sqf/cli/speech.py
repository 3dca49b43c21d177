"""Speech with what is said: sounds as a model's inputs, and how many words it gets wrong.

Word errors are counted here, and not with jiwer or ``evaluate``: it takes a few lines, and one dependency less.
"""

from __future__ import annotations

import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, PreTrainedModel, default_data_collator
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from transformers.utils import logging as transformers_logging

from ..hub.checking import tokenizer_of

_IGNORED = -100  # what transformers labels padding with
_WIDTHS = {1: np.uint8, 2: np.int16, 4: np.int32}
"""Bytes of a sample of PCM -> its type."""


class Listener:
    """Makes a speech model's inputs of sounds and of what is said in them.

    Args:
        model: with an encoder of sounds and a decoder of tokens, such as Whisper.
        where: folder or id of the original, which feature extractor and tokenizer come with.
        folder: that the paths of sounds are relative to.

    Raises:
        ValueError: there is no tokenizer.
    """

    def __init__(self, model: PreTrainedModel, where: str, folder: Path) -> None:
        tokenizer = tokenizer_of(where, local_files_only=False)
        if tokenizer is None:
            raise ValueError(f"labels of speech take a tokenizer, and none comes with {where}")
        self.tokenizer = tokenizer
        self.extractor = AutoFeatureExtractor.from_pretrained(where)
        self.folder = folder
        self.longest = model.config.max_target_positions
        self.start = model.config.decoder_start_token_id

    def features(self, sound: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the ``input_features`` of a sound: the path of a ``.wav``, or what ``datasets`` makes of one.

        Raises:
            ValueError: it is none of these, or not of the sampling rate that the model hears.
        """
        samples, rate = _samples(self.folder / sound if isinstance(sound, str) else sound)
        wanted = self.extractor.sampling_rate
        if rate != wanted:
            raise ValueError(f"{sound!r:.80} has {rate} samples a second, and the model takes {wanted}: resample it")
        return {"input_features": self.extractor(samples, sampling_rate=rate, return_tensors="pt").input_features[0]}

    def tokens(self, said: Any) -> Tensor:  # noqa: ANN401
        """Return what is said as token ids (tokens,), without the one that a decoder is started with."""
        if not isinstance(said, str):
            raise ValueError(f"what is said must be text, got {said!r:.60}")
        ids = self.tokenizer(said, truncation=True, max_length=self.longest)["input_ids"]
        return torch.tensor(ids[1:] if ids[:1] == [self.start] else ids)


def stacked(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return examples as a batch; ``labels`` of unequal length are filled up with what no loss counts."""
    labels = torch.nn.utils.rnn.pad_sequence([e["labels"] for e in examples], True, _IGNORED)
    return {
        **default_data_collator([{k: v for k, v in e.items() if k != "labels"} for e in examples]),
        "labels": labels,
    }


def forced(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch of one without its labels: the decoder reads what is said, and predicts each next token."""
    labels = batch["labels"]
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    return {"input_features": batch["input_features"], "decoder_input_ids": torch.cat([start, labels[:, :-1]], 1)}


@torch.no_grad()
def word_error_rate(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], where: str) -> float:
    """Return the words that a model gets wrong, of those that are said.

    That is, the fewest words to replace, to insert or to leave out that make what it writes what is said, over the
    number of words said; letters' case and punctuation do not count (Whisper's normalizer of any language).

    Args:
        model: the model; it writes greedily, as its own generation config says.
        batches: with ``input_features`` and ``labels``.
        where: folder or id of the original, which the tokenizer comes with.

    Raises:
        ValueError: no words are said.
    """
    tokenizer = tokenizer_of(where, local_files_only=False)
    assert tokenizer is not None  # the batches were made with it
    plain = BasicTextNormalizer()
    wrong = count = 0
    for batch in transformers_logging.tqdm(list(batches), desc="Listening", delay=2.0):
        sounds = batch["input_features"].to(model.device, model.dtype)
        written = model.generate(sounds, do_sample=False, num_beams=1)  # type: ignore[operator]
        said = batch["labels"].masked_fill(batch["labels"] == _IGNORED, tokenizer.pad_token_id)
        texts = zip(*(tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (written, said)), strict=True)
        for heard, right in texts:
            words = plain(right).split()
            wrong, count = wrong + word_errors(plain(heard).split(), words), count + len(words)
    if not count:
        raise ValueError("there are no words to tell an error rate by")
    return wrong / count


def word_errors(written: list[str], said: list[str]) -> int:
    """Return the least number of words to replace, insert or leave out between two texts (Levenshtein's distance)."""
    row = list(range(len(said) + 1))
    for number, word in enumerate(written, 1):
        before, row = row, [number]
        for at, right in enumerate(said):
            row.append(min(before[at] + (word != right), before[at + 1] + 1, row[at] + 1))
    return row[-1]


def _samples(sound: Any) -> tuple[np.ndarray, int]:  # noqa: ANN401
    """Return samples in [-1, 1], channels averaged, and how many a second."""
    if hasattr(sound, "get_all_samples"):  # what datasets gives where torchcodec is installed
        found = sound.get_all_samples()
        return found.data.mean(0).numpy(), found.sample_rate
    if isinstance(sound, dict) and "array" in sound:
        return np.asarray(sound["array"], np.float32), sound["sampling_rate"]
    if not isinstance(sound, Path):
        raise ValueError(f"sounds must be paths of .wav files, or decoded by datasets, got {sound!r:.60}")
    try:
        with wave.open(str(sound)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{sound}: sounds are read from .wav files of PCM ({error or 'cut short'})") from error
    if width not in _WIDTHS:
        raise ValueError(f"{sound}: samples must have 1, 2 or 4 bytes, got {width}")
    samples = np.frombuffer(raw, _WIDTHS[width]).astype(np.float32).reshape(-1, channels).mean(1)
    return (samples - 128 * (width == 1)) / 2 ** (8 * width - 1), rate
