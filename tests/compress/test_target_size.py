"""The size of the saved files as a target."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sqf import SQFConfig, compress
from hf_sqf.compress.target_size import bytes_of_rest
from hf_sqf.compress.targets import find_targets
from hf_sqf.runtime.sqf_config import parse_size


def llama(tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [40_000, 70_000])
def test_met_from_below(tmp_path, tied, size):
    model = compress(llama(tied), SQFConfig(target_size=size))
    model.save_pretrained(tmp_path)
    assert 0.985 * size <= size_of(tmp_path) <= size


def test_what_stays_dense_counts(tmp_path):
    config = SQFConfig(target_size="200kB", include_embeddings=False)
    model = llama(True)
    rest = bytes_of_rest(model, find_targets(model, config)[0])
    compress(model, config).save_pretrained(tmp_path)
    assert rest > 600 * 64 * 4
    assert size_of(tmp_path) <= 200_000


def test_unreachable_sizes_are_refused_before_any_work():
    model = llama(True)
    with pytest.raises(ValueError, match="target_size=1000 cannot be reached"):
        compress(model, SQFConfig(target_size=1000))
    assert type(model.lm_head) is torch.nn.Linear


def test_sizes():
    assert [parse_size(s) for s in (5, "5B", "48MB", "1.5 GB", "2KiB")] == [5, 5, 48_000_000, 1_500_000_000, 2048]
    for wrong in ("48", "MB", 0, -3, "-1MB", "0MB", None, 1.5):
        with pytest.raises(ValueError, match="target_size"):
            parse_size(wrong)
