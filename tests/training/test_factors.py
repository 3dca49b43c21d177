"""Trained weights: values as stored, gradients as of the same product written out."""

import copy

import pytest
import torch

from hf_sqf.runtime.sqf_factors import Factors
from hf_sqf.training.factors import TrainedWeight
from hf_sqf.training.straight_through import LogScale, logs_of, nearest_exponents
from hf_sqf.training.terms import Options
from tests.training.test_projecting import IDS, STRUCTURES, factors_of

STEP = 1e-3


def trained(factors: Factors, codes: bool = True, **options) -> TrainedWeight:
    given = {"hard": False, "resolution": 32, "code_rate": 3.0, "every": 1, "share": 1.0, **options}
    return TrainedWeight("weight", [factors], Options(codes=codes, **given))


@pytest.mark.parametrize("resolution", [1, 16, 32, 48, 4096])
def test_logarithms_lead_back_to_their_exponents(resolution: int):
    exponents = torch.arange(-30 * resolution, 30 * resolution + 1, max(1, resolution // 16), dtype=torch.int32)
    assert torch.equal(nearest_exponents(logs_of(exponents, resolution), resolution), exponents)


def test_the_gradient_of_a_scale():
    logs = torch.tensor([-1.0, 0.3], requires_grad=True)
    scales = LogScale.apply(logs, 4096)
    torch.testing.assert_close(scales, logs.exp(), rtol=2e-4, atol=0)
    (gradient,) = torch.autograd.grad(scales.sum(), logs)
    assert torch.equal(gradient, scales)


@pytest.mark.parametrize(("structure", "trellis"), STRUCTURES, ids=IDS)
def test_values_are_those_of_the_factors(structure: str, trellis: int):
    factors = factors_of(structure, trellis)
    weight = trained(factors)
    torch.testing.assert_close(weight.matrix(0).detach(), factors.dense())
    assert torch.equal(weight.factors()[0].dense(), factors.dense())


@pytest.mark.parametrize(("structure", "trellis"), STRUCTURES, ids=IDS)
def test_gradients_are_those_of_the_product_written_out(structure: str, trellis: int):
    """``diag(rows) Z diag(steps) D``, with all factors as floats, by torch's own operations."""
    weight = trained(factors_of(structure, trellis))
    target = torch.randn(48, 24, generator=torch.Generator().manual_seed(1))
    (weight.matrix(0) * target).sum().backward()
    for term in weight.all_terms():
        now = term.current()
        given = {"rows": now.row_values(), "steps": now.step_values() / now.scale_value()}
        one_hot = torch.nn.functional.one_hot(now.codes.long(), now.atom_count) if now.one_hot else now.codes
        given |= {"codes": one_hot.float()}
        given |= {"atoms": torch.eye(now.atom_count) if now.atoms is None else now.atoms.float()}
        floats = {name: value.clone().requires_grad_() for name, value in given.items()}
        dictionary = floats["atoms"] * floats["steps"].expand(now.atom_count)[:, None]
        blocks = floats["codes"] @ dictionary
        whole = blocks * floats["rows"][:, None] * now.scale_value()
        (whole.reshape(48, -1)[:, :24] * target).sum().backward()
        for name, parameter in term.parameters.items():
            expected = floats[name].grad
            if name in ("rows", "steps"):
                expected = expected * floats[name]
            if name == "codes" and now.one_hot:  # of the blocks that were assigned
                padded = torch.nn.functional.pad(target, (0, whole.numel() // 48 - 24)).reshape(whole.shape)
                expected = padded * floats["rows"][:, None] * now.scale_value()
            unit = term._units[name]
            torch.testing.assert_close(parameter.grad, (expected * unit).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("structure", ["grid", "vq", "svd", "pgd", "svd+grid"])
def test_products_and_rows_agree_with_the_matrix(structure: str, codes: bool):
    factors = factors_of(structure, 0)
    draw = torch.Generator().manual_seed(2)
    x, ids = torch.randn(2, 5, 24, generator=draw), torch.tensor([3, 47, 3])
    found = []
    for direct in (True, False):
        weight, inner = trained(factors, codes), x.clone().requires_grad_()
        y = weight.product(inner) if direct else inner @ weight.matrix(0).T
        rows = weight.pick(ids) if direct else weight.matrix(0)[ids]
        (y.square().sum() + rows.square().sum()).backward()
        found.append((y, rows, inner.grad, *(p.grad for _, p in weight.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_gradient_of_a_scale_is_the_slope():
    """Finite differences, on a grid so fine that it is none."""
    weight = trained(factors_of("grid", 0), codes=False, resolution=1 << 14)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    loss = lambda: weight.product(x).square().sum()  # noqa: E731
    loss().backward()
    for _, parameter in weight.parameters():
        index = int(parameter.grad.abs().argmax())
        slope = parameter.grad[index].item()
        with torch.no_grad():
            parameter[index] += STEP
            above = loss().item()
            parameter[index] -= 2 * STEP
            below = loss().item()
            parameter[index] += STEP
        assert (above - below) / (2 * STEP) == pytest.approx(slope, rel=0.05)


def test_nothing_dense_is_kept_for_the_backward():
    """Between forward and backward a product keeps its input and the codes in 8 bits."""
    kept: list[torch.Tensor] = []
    weight = trained(factors_of("grid", 0))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weight.product(torch.randn(1, 24, requires_grad=True))
    large = [t for t in kept if t.numel() >= 48 * 24]
    assert large and all(t.dtype == torch.int8 for t in large)


def test_scales_that_were_one_spread_where_it_costs_little():
    small = factors_of("grid", 0)
    assert small.terms[0].steps.numel() == 1
    assert trained(small).factors()[0].terms[0].steps.numel() == 1
    large = Factors((1536, 1536), "grid", (copy.copy(small.terms[0]),))
    codes = torch.randint(-3, 4, (1536, 1536), dtype=torch.int8)
    term = type(small.terms[0])(codes, 0, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    large = Factors((1536, 1536), "grid", (term,))
    spread = trained(large, codes=False).factors()[0].terms[0]
    assert spread.rows.numel() == 1536 and spread.steps.numel() == 1536
    assert torch.equal(spread.dense(), term.dense())


def test_factors_of_another_form_are_refused():
    weight = trained(factors_of("grid", 0))
    for other in (factors_of("vq", 0), factors_of("grid", 8), factors_of("svd+grid", 0)):
        with pytest.raises(ValueError, match="weight: the factors have another form"):
            weight.read([other])


def test_packed_bytes_are_one_tensor_until_something_moves():
    weight = trained(factors_of("grid", 0))
    first = weight.packed()
    assert weight.packed() is first
    with torch.no_grad():
        next(p for name, p in weight.parameters() if name.endswith("rows")).add_(0.5)
    assert not torch.equal(weight.packed(), first)
