"""Calibration in sequence: what is measured, what is rounded, and that it helps."""

import copy

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_sqf import SQFConfig, compress, dequantize
from hf_sqf.compress.collect import collect
from hf_sqf.compress.metric import Metric
from hf_sqf.compress.sequential import SHARE, Additions, Sequential, relative_weights
from hf_sqf.compress.statistics import shrink
from hf_sqf.compress.targets import find_targets
from hf_sqf.runtime.sqf_container import pack, unpack

from .test_collect import llama, mixtral, tokens


def measured(model, batches):
    targets = find_targets(model, SQFConfig())[0]
    return targets, collect(model, targets, batches[1:], batches[:1])


def rows_of(model, batches, name):
    """Return the inputs of a layer, (N, n)."""
    rows = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(rows)


def sums_of(model, batches, name):
    """Return what the outputs of a branch's last layer are added up to with the hidden states, (N, m)."""
    layer, sums = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0]), []
    if name.endswith("o_proj"):
        norm = layer.post_attention_layernorm
        handle = norm.register_forward_pre_hook(lambda m, args: sums.append(args[0].flatten(0, 1)))
    else:
        handle = layer.register_forward_hook(lambda m, args, out: sums.append(out.flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(sums)


def coarse(target, step=0.5):
    """Return packed bytes of a weight rounded to multiples of a step of its own size."""
    from hf_sqf.compress.factorize import solve

    return pack([solve(m, step=step, structure="grid").factors for m in target.matrices()], target.name)


def test_stages_follow_the_model():
    model, batches = llama(tie_word_embeddings=False), tokens(4)
    targets, statistics = measured(model, batches)
    with Sequential(model, targets, statistics, batches[1:]) as sequence:
        names = [[t.name.removeprefix("model.layers.") for t in stage.targets] for stage in sequence.stages]
    one = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
           ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
    assert names == [[f"{block}.{name}.weight" for name in stage] for block in (0, 1) for stage in one]
    assert [stage.joins for stage in sequence.stages] == 2 * [False, True, False, True]
    assert {t.name for t in sequence.outside} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_weights_are_fitted_to_the_inputs_they_get():
    """At every stage H' and W* are those of the model whose earlier weights are replaced by the compressed ones."""
    model, batches = llama(initializer_range=0.3), tokens(6)
    targets, statistics = measured(model, batches)
    before = {name: p.clone() for name, p in model.named_parameters()}
    replaced = copy.deepcopy(model)
    with Sequential(model, targets, statistics, batches[1:]) as sequence:
        packed = {t.name: coarse(t) for t in targets}
        sequence.leave(sequence.outside, packed)
        done = list(sequence.outside)
        for stage in sequence.stages:
            sequence.enter(stage)
            with torch.no_grad():
                for target in done:
                    (factors,) = unpack(packed[target.name])
                    replaced.get_parameter(target.name).copy_(factors.dense())
            name = stage.targets[0].name.removesuffix(".weight")
            x, seen = rows_of(model, batches[1:], name), rows_of(replaced, batches[1:], name)
            assert not torch.allclose(x, seen)
            a, weights = statistics.shrinkage[stage.key], torch.ones(len(seen), 1)
            if stage.joins:
                sums = sums_of(model, batches[1:], name)
                relative = [1.0 / part.square().mean(1) for part in sums.split(batches[1]["input_ids"].numel())]
                weights = torch.cat([part / part.mean() for part in relative])[:, None]
            H = shrink(seen.T @ (weights * seen) / len(seen), a)
            for target in stage.targets:
                (weight,), (metric,) = sequence.problem(target)
                torch.testing.assert_close(metric.H, H, rtol=1e-4, atol=1e-6)
                W = target.matrices()[0]
                lack = weights * (sums - sums_of(replaced, batches[1:], name)) if stage.joins else (x - seen) @ W.T
                whole = (1 - a) * lack.T.double() @ seen.double() / len(seen) @ torch.linalg.inv(H.double())
                torch.testing.assert_close(weight.double(), W + SHARE * whole, rtol=1e-3, atol=1e-3)
            sequence.leave(stage.targets, packed)
            done += stage.targets
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_tokens_count_relative_to_their_power():
    states = torch.tensor([[1.0, 1.0], [100.0, 0.0], [0.0, 2.0]])
    weights = relative_weights(states)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[:, 0] * states.square().mean(1), weights[0].expand(3))
    torch.testing.assert_close(relative_weights(torch.zeros(2, 3)), torch.ones(2, 1))
    some = torch.cat([torch.zeros(1, 4), torch.ones(2000, 4)])
    assert relative_weights(some)[0] / relative_weights(some)[1] == pytest.approx(1000.0)


def test_sums_are_found_where_outputs_are_added_to_a_tensor_of_their_shape():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    found = []
    with torch.no_grad(), Additions([first], lambda module, total: found.append((module, total.clone()))):
        x = torch.randn(2, 3)
        y = torch.nn.functional.dropout(first(x), 0.5, training=False)
        total = x + y
        y + 1.0
        y * x
        torch.add(y, x, alpha=2)
        x + second(x)
        x + y.sum(0)
        y + y**3
        y += x
    assert [module for module, _ in found] == [first, first]
    assert torch.equal(found[0][1], total)
    assert torch.equal(found[1][1], total)
    assert not first._forward_hooks


def test_experts_are_measured_as_they_are_hit():
    model, batches = mixtral(), tokens(6)
    targets, statistics = measured(model, batches)
    with Sequential(model, targets, statistics, batches[1:]) as sequence:
        sequence.leave(sequence.outside, {t.name: coarse(t) for t in sequence.outside})
        stage = next(stage for stage in sequence.stages if stage.experts)
        for earlier in sequence.stages[: sequence.stages.index(stage)]:
            sequence.enter(earlier)
            sequence.leave(earlier.targets, {t.name: coarse(t) for t in earlier.targets})
        sequence.enter(stage)
        (target,) = stage.targets
        weights, metrics = sequence.problem(target)
        originals = statistics.metrics(target.name, target.matrices())
    for weight, matrix, metric, original in zip(weights, target.matrices(), metrics, originals, strict=True):
        assert torch.equal(weight, matrix)
        assert original.H is None or not torch.equal(metric.H, original.H)
        assert torch.equal(metric.g, original.g)


def test_it_lowers_the_divergence():
    """On the data that was measured, at the same bits."""
    batches, divergences = tokens(24, length=24), {}
    data = [dict(batch) for batch in batches]
    torch.manual_seed(0)
    for sequential in (False, True):
        model = llama()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.25)
            before = [model(**batch).logits.log_softmax(-1) for batch in batches]
            config = SQFConfig(bits=6, structure="grid", dataset=data, samples=24, sequential=sequential)
            dequantize(compress(model, config))
            after = [model(**batch).logits.log_softmax(-1) for batch in batches]
        pairs = zip(before, after, strict=True)
        divergences[sequential] = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
    assert divergences[True] < 0.9 * divergences[False]


def test_a_model_without_blocks_is_calibrated_on_the_originals_inputs():
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    data = [{"pixel_values": torch.randn(2, 3, 32, 32, generator=draw)} for _ in range(6)]
    found = {}
    for sequential in (False, True):
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16))
        compress(model, SQFConfig(bits=4, structure="grid", dataset=data, sequential=sequential))
        found[sequential] = model.state_dict()
    assert all(torch.equal(tensor, found[True][name]) for name, tensor in found[False].items())


def test_a_singular_input_is_damped():
    """Fewer rows than dimensions: H' has no inverse but for its shrinkage."""
    model, batches = llama(), tokens(3, length=2)
    targets, statistics = measured(model, batches)
    with Sequential(model, targets, statistics, batches[1:]) as sequence:
        sequence.leave(sequence.outside, {t.name: coarse(t) for t in sequence.outside})
        sequence.enter(sequence.stages[0])
        for target in sequence.stages[0].targets:
            (weight,), (metric,) = sequence.problem(target)
            assert torch.isfinite(weight).all()
            assert isinstance(metric, Metric)
