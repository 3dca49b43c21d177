"""What users give as calibration data becomes inputs without padding."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sqf.compress.calibration_data import calibration, library_text, texts, write

SMALL = {
    "vocab_size": 200,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PROSE = [f"paragraph {i} speaks of {'many ' * (i % 3)}things, and of number {i * i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    """Words, learned from the texts above."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        PROSE, trainers.WordLevelTrainer(vocab_size=200, special_tokens=["[UNK]", "[MASK]", "[B]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]", bos_token="[B]", model_max_length=512
    )


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def test_texts_are_joined_and_cut_to_sequences_of_one_length(tokenizer):
    found = calibration(llama(), PROSE, tokenizer, samples=8, context=10, own_text=False)
    assert len(found.batches) == 7 and len(found.held_out) == 1
    assert {batch["input_ids"].shape for batch in found.batches + found.held_out} == {(1, 10)}


def test_short_texts_still_serve(tokenizer):
    found = calibration(llama(), PROSE[:6], tokenizer, samples=8, context=512, own_text=True)
    assert len(found.held_out) >= 1 and all(batch["input_ids"].shape[1] > 1 for batch in found.batches)


def test_own_text_is_added_and_comes_alone_for_self(tokenizer):
    model = llama()
    both = calibration(model, PROSE, tokenizer, samples=8, context=10)
    assert len(both.batches) == 14 and len(both.held_out) == 2
    alone = calibration(model, "self", tokenizer, samples=8, context=10)
    assert len(alone.batches) == 7 and all(torch.equal(a["input_ids"], b["input_ids"])
                                           for a, b in zip(both.batches[7:], alone.batches, strict=True))  # fmt: skip


def test_a_model_writes_the_same_text_for_the_same_seed_and_disturbs_no_other_draw(tokenizer):
    model = llama()
    torch.manual_seed(1)
    undisturbed = torch.rand(1)
    torch.manual_seed(1)
    first = write(model, tokenizer, 3, 12, seed=5)
    assert torch.equal(torch.rand(1), undisturbed)
    assert first.shape == (3, 12)
    assert torch.equal(first, write(model, tokenizer, 3, 12, seed=5))
    assert not torch.equal(first, write(model, tokenizer, 3, 12, seed=6))


def test_encoders_read_texts_one_by_one_without_padding(tokenizer):
    found = calibration(BertModel(BertConfig(**SMALL)), PROSE, tokenizer, samples=12, own_text=False)
    every = found.batches + found.held_out
    assert sum(len(batch["input_ids"]) for batch in every) == 12
    assert all(batch["attention_mask"].all() for batch in every)


def test_masked_language_models_see_masks(tokenizer):
    found = calibration(BertForMaskedLM(BertConfig(**SMALL)), PROSE * 5, tokenizer, samples=100, own_text=False)
    ids = torch.cat([batch["input_ids"].flatten() for batch in found.batches])
    assert 0.1 < (ids == tokenizer.mask_token_id).double().mean() < 0.2


def test_encoders_without_data_read_docstrings(tokenizer):
    found = calibration(BertModel(BertConfig(**SMALL)), "self", tokenizer, samples=6, context=64)
    assert sum(len(batch["input_ids"]) for batch in found.batches + found.held_out) == 6
    paragraph = next(library_text())
    assert len(paragraph) > 60 and "\n" not in paragraph


def test_inputs_of_any_modality_pass_through():
    inputs = [{"pixel_values": torch.full((1, 3, 4, 4), float(i))} for i in range(10)]
    found = calibration(llama(), iter(inputs), samples=9)
    assert len(found.batches) + len(found.held_out) == 9
    assert torch.equal(found.batches[1]["pixel_values"], inputs[1]["pixel_values"])


def test_data_sets_by_column_and_what_is_none(tokenizer):
    assert list(texts([{"text": "a"}, "b"])) == ["a", "b"]
    with pytest.raises(ValueError, match="dataset must hold texts"):
        list(texts([3]))
    with pytest.raises(ValueError, match="dataset is empty"):
        calibration(llama(), [], tokenizer)
    with pytest.raises(ValueError, match="at least two inputs"):
        calibration(llama(), [{"input_ids": torch.ones(1, 2, dtype=torch.long)}])
    with pytest.raises(ValueError, match="tokenizer"):
        calibration(llama(), PROSE)


def test_a_name_is_what_datasets_loads(tmp_path):
    """A folder stands for an id on the Hub: the same function reads both."""
    pytest.importorskip("datasets")
    words = [f"text number {number}" for number in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in words))
    assert list(texts(str(tmp_path))) == words
    (tmp_path / "train.jsonl").write_text('{"content": "no text"}\n')
    with pytest.raises(ValueError, match="must hold texts, or mappings with a text"):
        list(texts(str(tmp_path)))
