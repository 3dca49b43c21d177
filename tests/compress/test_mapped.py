"""Memory that is given back while a model is compressed."""

import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sqf.compress.mapped import Turns, releasing
from hf_sqf.compress.recorder import recomputed
from hf_sqf.runtime.sqf_memory import release
from tests.smaps import SMAPS, resident


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_pages_that_are_released_need_no_memory_and_come_back(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(1 << 20)}, path)
    mapped = load_file(path)["w"]
    assert float(mapped.sum()) == 1 << 20 and resident(path) >= 4096
    release(mapped)
    assert resident(path) < 100  # the page shared with the header stays
    assert float(mapped.sum()) == 1 << 20


def test_what_is_not_mapped_is_left_alone():
    tensor = torch.arange(1 << 16)
    release(tensor)
    assert torch.equal(tensor, torch.arange(1 << 16))


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_what_is_read_once_does_not_stay(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({str(i): torch.full((1 << 18,), float(i)) for i in range(8)}, path)
    mapped = list(load_file(path).values())
    with releasing(mapped, seconds=0.01):
        assert [float(tensor.mean()) for tensor in mapped] == [float(i) for i in range(8)]
        for _ in range(500):  # until the thread's turn comes
            if resident(path) < 100:
                break
            time.sleep(0.01)
        assert resident(path) < 100
        assert float(mapped[3].sum()) == 3 << 18
    assert resident(path) < 100


class Block(GradientCheckpointingLayer):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.gradient_checkpointing = True

    def forward(self, x):
        return torch.tanh(x @ self.weight.T)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_one_block_at_a_time_is_in_memory_forth_and_back(tmp_path):
    path, size = tmp_path / "blocks.safetensors", 512
    weights = {str(i): torch.randn(size, size, generator=torch.Generator().manual_seed(i)) / 16 for i in range(8)}
    save_file(weights, path)
    blocks = [Block(weight) for weight in load_file(path).values()]

    def most_in_memory(function):
        most = []
        for block in blocks:
            block._gradient_checkpointing_func = partial(function, block)
            release(block.weight)
        x = h = torch.ones(4, size, requires_grad=True)
        for block in blocks:
            h = block(h)
            h.register_hook(lambda gradient: most.append(resident(path)))
            most.append(resident(path))
        (gradient,) = torch.autograd.grad(h.sum(), x)
        assert len(most) == 16
        return gradient, max(most)

    expected, most = most_in_memory(lambda block, *args: checkpoint(*args, use_reentrant=False))
    assert most >= 8 * 1024  # kilobytes: a weight takes 1024
    found, most = most_in_memory(partial(recomputed, Turns()))
    assert torch.equal(found, expected)
    assert most < 3 * 1024  # this block's, and of the next one what the system reads ahead
