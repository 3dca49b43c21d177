"""Modules that hold factors: each kind against the ordinary module with the decoded weight."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sqf.compress.grid import solve_grid
from hf_sqf.compress.metric import Metric
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_modules import (
    ExpertStack,
    SQFConv1D,
    SQFConv2d,
    SQFEmbedding,
    SQFLinear,
    SQFModule,
    compress_module,
    decompress_module,
    weights_of,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class ScaledEmbedding(nn.Embedding):
    """As several models of transformers have it."""

    def __init__(self, *args, scale: float = 3.0, **options):
        super().__init__(*args, **options)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Experts(nn.Module):
    """Fused weights of three experts, applied one by one."""

    num_experts = 3

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(8**-0.5 * torch.randn(3, *((8, 12) if transposed else (12, 8))))
        self.down_proj = nn.Parameter(12**-0.5 * torch.randn(3, *((12, 8) if transposed else (8, 12))))

    def forward(self, x):
        for expert in (torch.tensor(2), torch.tensor(0)):
            up, down = self.up_proj[expert], self.down_proj[expert]
            x = x @ up @ down if self.is_transposed else nn.functional.linear(nn.functional.linear(x, up), down)
        return x


KINDS = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(2, 5, 12)),
    "linear_without_bias": (lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(12)),
    "conv1D": (lambda: Conv1D(8, 12), lambda: torch.randn(2, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 9)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding_mode="reflect", padding=1),
        lambda: torch.randn(2, 4, 9, 9),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, bias=False), lambda: torch.randn(1, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=3), lambda: torch.randint(20, (2, 5))),
    "scaled_embedding": (lambda: ScaledEmbedding(20, 8), lambda: torch.randint(20, (2, 5))),
    "experts": (Experts, lambda: torch.randn(4, 8)),
    "transposed_experts": (lambda: Experts(transposed=True), lambda: torch.randn(4, 8)),
}


def packed(matrices: list[torch.Tensor], step: float = 0.1) -> nn.Parameter:
    factors = [solve_grid(m, Metric.relative(m), step).factors for m in matrices]
    return nn.Parameter(pack(factors), requires_grad=False)


def compressed(module: nn.Module, step: float = 0.1) -> SQFModule:
    """Compress a module in place and return it."""
    weights = {
        name: (held, packed(held.matrices(getattr(module, name).detach()), step))
        for name, held in weights_of(module, "inner").items()
    }
    compress_module(module, weights, next(p.dtype for p in module.parameters() if p.is_floating_point()))
    return module


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    make, inputs = KINDS[request.param]
    return make, inputs()


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_that_of_the_decoded_module(kind, dtype: torch.dtype):
    make, x = kind
    module = compressed(make().to(dtype))
    out = module(cast(x, dtype))
    dense = copy.deepcopy(module)
    decompress_module(dense, {})
    assert type(dense) is type(make()) and not isinstance(dense, SQFModule)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, dense(cast(x, dtype)), rtol=2 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps
    )


def test_weight_is_close_to_the_original(kind):
    make, _ = kind
    original = make()
    module = compressed(copy.deepcopy(original), step=0.01)
    for name in module.held:
        weight = getattr(module, name)
        weight = weight.all() if isinstance(weight, ExpertStack) else weight
        assert weight.shape == getattr(original, name).shape and weight.dtype == torch.float32
        assert (weight - getattr(original, name)).norm() < 0.01 * getattr(original, name).norm()


def test_only_packed_bytes_are_kept(kind):
    module = compressed(kind[0]())
    names = set(dict(module.named_parameters()))
    assert {name + "_factors" for name in module.held} <= names and not names & set(module.held)
    assert module.state_dict().keys() == names
    for name in module.held:
        parameter = getattr(module, name + "_factors")
        assert parameter.dtype == torch.uint8 and parameter.dim() == 1 and not parameter.requires_grad


def test_compressed_and_decompressed_is_the_same_class(kind):
    make, x = kind
    module = make()
    hooked = []
    module.register_forward_hook(lambda *_: hooked.append(1))
    before = type(module), set(module.state_dict()), module.training
    compressed(module)
    module(x)
    decompress_module(module, {})
    module(x)
    assert (type(module), set(module.state_dict()), module.training) == before
    assert all(p.requires_grad for p in module.parameters())
    assert len(hooked) == 2


def test_copies_and_pickles(kind):
    make, x = kind
    module = compressed(make())
    expected = module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), expected)


def test_state_dict_replaces_what_was_decoded(kind):
    make, x = kind
    torch.manual_seed(1)
    module, other = compressed(make(), step=0.25), compressed(make(), step=0.25)
    expected = other(x)
    assert not torch.equal(module(x), expected)
    module.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(module(x), expected)


def test_bytes_changed_in_place_are_decoded_again():
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    module = compressed(nn.Linear(12, 8, bias=False))
    module(x)
    other = packed([torch.zeros(8, 12)])
    with torch.no_grad():
        module.weight_factors.set_(other)
    assert torch.equal(module(x), torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("change", "runtime"),  # the file's bytes differ in size: they cannot be copied
    [("copied", "int4"), ("copied", "int8"), *product(("data", "parameter"), ("int4", "int8", "stream"))],
)
def test_products_follow_the_bytes_whichever_way_they_change(change: str, runtime: str):
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    module, other = (compressed(nn.Linear(12, 8, bias=False), step=0.25) for _ in range(2))
    for one in (module, other):
        one.keep(runtime)
    before, expected = module(x), other(x)
    assert torch.equal(module(x), before) and not torch.equal(before, expected)
    theirs = other.weight_factors
    if change == "copied":
        with torch.no_grad():
            module.weight_factors.copy_(theirs)
    elif change == "data":
        module.weight_factors.data = theirs.data.clone()
    else:
        module.weight_factors = nn.Parameter(theirs.data.clone(), requires_grad=False)
    assert torch.equal(module(x), expected)


def test_an_input_on_another_device_is_an_error():
    """And not a crash: kernels take addresses."""
    linear, embedding = compressed(nn.Linear(12, 8, bias=False)), compressed(nn.Embedding(20, 8))
    for batch in (1, 40):
        linear(torch.randn(batch, 12))
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match="the input is on meta, the weight on cpu"):
                linear(torch.empty(batch, 12, dtype=dtype, device="meta"))
    with pytest.raises(ValueError, match="the input is on meta, the weight on cpu"):
        embedding(torch.zeros(2, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_keeps_the_bytes(kind, dtype: torch.dtype):
    make, x = kind
    module = compressed(make())
    before = {name: getattr(module, name + "_factors").clone() for name in module.held}
    module.to(dtype)
    assert module.compute_dtype == dtype
    assert all(torch.equal(getattr(module, name + "_factors"), value) for name, value in before.items())
    assert module(cast(x, dtype)).dtype == dtype
    module.to(torch.float32).half()
    assert module.compute_dtype == torch.float16


def test_casting_the_bytes_is_refused():
    module = compressed(nn.Linear(12, 8))
    for change in (lambda: module.type(torch.float32), lambda: module._apply(lambda t: t.float())):
        with pytest.raises(TypeError, match="must stay uint8"):
            change()
    assert module.weight_factors.dtype == torch.uint8


def test_moving_to_meta_and_back():
    module = compressed(nn.Linear(12, 8))
    module.to("meta")
    assert module.weight.is_meta and module.weight.shape == (8, 12) and module.compute_dtype == torch.float32


def test_weight_is_never_initialised_again(kind):
    module = compressed(kind[0]())
    assert module._is_hf_initialized
    assert all(getattr(module, name)._is_hf_initialized for name in module.held)


def test_gradients_reach_the_input():
    torch.manual_seed(0)
    for name in ("linear", "conv1D", "conv2d", "experts"):
        make, inputs = KINDS[name]
        module = compressed(make())
        dense = copy.deepcopy(module)
        decompress_module(dense, {})
        x, y = (inputs.clone().requires_grad_() for inputs in [inputs()] * 2)
        module(x).square().sum().backward()
        dense(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_empty_and_strided_inputs():
    torch.manual_seed(0)
    module = compressed(nn.Linear(12, 8))
    assert module(torch.empty(0, 12)).shape == (0, 8)
    x = torch.randn(12, 5).T
    torch.testing.assert_close(module(x), module(x.contiguous()))
    embedding = compressed(nn.Embedding(20, 8))
    assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 8)


@pytest.mark.parametrize("index", [-1, 20])
def test_ids_out_of_range_are_an_error(index: int):
    embedding = compressed(nn.Embedding(20, 8))
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, index]))


def test_experts_decode_only_those_asked_for(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    module = compressed(Experts())
    monkeypatch.setattr(SQFModule, "dense", lambda *_: pytest.fail("decoded all experts"))
    assert module(torch.randn(4, 8)).shape == (4, 8)


def test_experts_serve_as_a_tensor():
    torch.manual_seed(0)
    module = compressed(Experts())
    stack, dense = module.up_proj, module.dense("up_proj")
    assert (stack.shape, stack.ndim, len(stack), stack.dtype, stack.device) == (
        dense.shape,
        3,
        3,
        dense.dtype,
        dense.device,
    )
    assert torch.equal(stack[1], dense[1]) and torch.equal(stack[-1], dense[-1])
    for index in (slice(0, 2), torch.tensor([2, 0]), torch.tensor([True, False, True])):
        assert torch.equal(stack[index], dense[index])
    x = torch.randn(3, 8, 5)
    assert torch.equal(torch.bmm(stack, x), torch.bmm(dense, x))
    with pytest.raises(IndexError):
        stack[3]


def test_kinds_are_what_they_are_called():
    for module, kind in [
        (nn.Linear(12, 8), SQFLinear),
        (Conv1D(8, 12), SQFConv1D),
        (nn.Conv2d(2, 3, 3), SQFConv2d),
        (nn.Embedding(20, 8), SQFEmbedding),
    ]:
        assert type(compressed(module)) is kind
    scaled = compressed(ScaledEmbedding(20, 8))
    assert isinstance(scaled, ScaledEmbedding) and isinstance(scaled, SQFEmbedding)


def test_description_names_bits():
    assert "in_features=12, out_features=8, bias=True, weight=" in repr(compressed(nn.Linear(12, 8)))
    assert repr(compressed(Conv1D(8, 12))).startswith("SQFConv1D(nf=8, nx=12, weight=")


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(8), nn.Embedding(20, 8, max_norm=1.0), nn.ReLU()] + [nn.ConvTranspose2d(2, 3, 3), nn.LSTM(4, 4)],
)
def test_what_cannot_hold_factors(module: nn.Module):
    assert weights_of(module, "x") == {}


def test_damaged_bytes_name_the_tensor():
    module = compressed(nn.Linear(12, 8))
    with torch.no_grad():
        module.weight_factors[-1] ^= 1
    with pytest.raises(ValueError, match=r"inner\.weight_factors"):
        module.weight  # noqa: B018


def test_other_shapes_name_the_tensor():
    module = compressed(nn.Linear(12, 8))
    module.weight_factors = packed([torch.randn(12, 8)])
    with pytest.raises(ValueError, match=r"inner\.weight_factors.*\(12, 8\).*\(8, 12\)"):
        module.weight  # noqa: B018


def test_sizes_cannot_change():
    module = compressed(nn.Embedding(20, 8))
    module.num_embeddings = 20
    with pytest.raises(ValueError, match="num_embeddings of a compressed module cannot change from 20 to 24"):
        module.num_embeddings = 24
