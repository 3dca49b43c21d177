"""Statistics measured on tiny models, against what they are by definition."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sqf import SQFConfig
from hf_sqf.compress.collect import collect
from hf_sqf.compress.recorder import Recorder
from hf_sqf.compress.statistics import shrink, shrink_diagonal
from hf_sqf.compress.targets import find_targets

SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"num_key_value_heads": 2} | changes)))


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


def tokens(count, length=12, seed=0, **extra):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 60, (2, length), generator=draw), **extra} for _ in range(count)]


def measured(model, batches, **options):
    return collect(model, find_targets(model, SQFConfig())[0], batches[1:], batches[:1], **options)


def test_moments_are_the_mean_outer_products_of_the_inputs():
    model, batches = llama(), tokens(4)
    found = measured(model, batches)
    rows = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_hook(lambda module, args, output: rows.append(args[0].detach().flatten(0, 1)))
    for batch in batches[1:]:
        model(**batch)
    handle.remove()
    x = torch.cat(rows)
    torch.testing.assert_close(found.moments["model.layers.1.mlp.down_proj.weight"], x.T @ x / len(x))
    assert found.tokens == 2 * batches[0]["input_ids"].numel()  # gradients are taken of every second batch


def test_energies_are_those_of_the_fisher_information():
    """With many draws of labels, E[delta^2] at the head's input tends to diag(W^T (diag p - p p^T) W)."""
    model, batches = llama(num_hidden_layers=1, tie_word_embeddings=False), tokens(400, seed=1)
    last = model.model.layers[0].mlp.down_proj
    model.model.norm = torch.nn.Identity()  # so that the gradient at down_proj is that at the head's input
    found = measured(model, batches)
    expected = torch.zeros(16)
    with torch.no_grad():
        for batch in batches[1::2]:
            p = model(**batch).logits.softmax(-1).flatten(0, 1)
            W = model.lm_head.weight
            expected += (p @ W.square() - (p @ W).square()).sum(0)
    expected /= found.tokens
    assert last.weight.shape[0] == 16
    torch.testing.assert_close(found.energies["model.layers.0.mlp.down_proj.weight"], expected, rtol=0.1, atol=0)
    variance = torch.zeros(60)
    with torch.no_grad():
        for batch in batches[1::2]:
            p = model(**batch).logits.softmax(-1).flatten(0, 1)
            variance += (p * (1 - p)).sum(0)
    torch.testing.assert_close(found.energies["lm_head.weight"], variance / found.tokens, rtol=1e-3, atol=0)


def test_distance_predicts_the_divergence():
    """Half of d, summed over the weights, is the KL divergence that small errors cause."""
    model, batches = llama(tie_word_embeddings=False, initializer_range=0.2), tokens(150, seed=2)
    found = measured(model, batches)
    with torch.no_grad():
        before = [model(**batch).logits.log_softmax(-1) for batch in batches[1:]]
        expected = 0.0
        draw = torch.Generator().manual_seed(3)
        for target in find_targets(model, SQFConfig())[0]:
            (weight,) = target.matrices()
            noise = 0.01 * weight.std() * torch.randn(weight.shape, generator=draw)
            (metric,) = found.metrics(target.name, [weight])
            expected += 0.5 * found.typical * metric.distance(noise, None)
            target.parameter.add_(noise)
        after = [model(**batch).logits.log_softmax(-1) for batch in batches[1:]]
        divergence = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True))
        divergence /= sum(batch["input_ids"].numel() for batch in batches[1:])
    assert divergence == pytest.approx(expected, rel=0.5)


def test_scales_make_the_distance_that_of_a_mean_over_tokens():
    """What errors do to a sentence's embedding adds up over its tokens: the metric alone says far too little."""
    torch.manual_seed(4)
    model = BertModel(BertConfig(**SMALL | {"hidden_size": 32}), add_pooling_layer=False)
    with torch.no_grad():  # the tokens of a sentence come to resemble one another, as those of trained encoders do
        model.encoder.layer[0].attention.output.dense.weight.mul_(30.0)
    batches, count = tokens(200, seed=6), 60
    targets = find_targets(model, SQFConfig(include_embeddings=False))[0]
    found = collect(model, targets, batches[count:], batches[:count])

    def embeddings():
        with torch.no_grad():
            hidden = [model.eval()(**batch).last_hidden_state.mean(1) for batch in batches[:count]]
        return torch.nn.functional.normalize(torch.cat(hidden), dim=-1)

    before, draw, scales = embeddings(), torch.Generator().manual_seed(5), []
    for target in targets:
        (weight,) = target.matrices()
        (metric,) = found.metrics(target.name, [weight])
        white = torch.randn(weight.shape, generator=draw, dtype=torch.float64) / metric.row_weights()[:, None]
        noise = torch.linalg.solve_triangular(metric.cholesky(), white, upper=False, left=False).float()
        noise *= 0.02 * weight.norm() / noise.norm()
        own = target.parameter.detach().clone()
        target.parameter.data.add_(noise)
        really = float((embeddings() - before).square().sum(1).mean())
        target.parameter.data.copy_(own)
        assert really == pytest.approx(found.typical * metric.distance(noise, None), rel=0.35), target.name
        scales.append(found.scales[target.name])
    assert max(scales) > 4.0  # so that the test tells


def test_scales_of_a_table_and_of_the_head_are_as_defined(monkeypatch):
    """On one batch: labels are unrelated from row to row; a row of a table changes at all places that look it up."""
    model, batches = llama(tie_word_embeddings=False), tokens(41, length=30, seed=7)
    rows, inputs, name = [], [], "model.embed_tokens.weight"
    add = Recorder._add_moment

    def spy(self, key, some):
        rows.extend([some] if key == name else [])
        add(self, key, some)

    monkeypatch.setattr(Recorder, "_add_moment", spy)
    model.lm_head.register_forward_hook(lambda m, a, y: inputs.append(a[0].detach().flatten(0, 1)))
    found = measured(model, batches)  # the batch held out is the last one that gradients are taken of

    delta, ids = rows[-1], batches[0]["input_ids"].flatten()
    common = torch.zeros(60, 16).index_add_(0, ids, delta).square().sum(1) / len(ids)
    energy = shrink_diagonal(found.energies[name], found.shrinkage[f"{name}:g"])
    H = found.moments[name]
    assert found.scales[name] == pytest.approx(float((common / H.trace() / energy).mean()), rel=1e-4)

    name = "lm_head.weight"
    H = shrink(found.moments[found.inputs[name]], found.shrinkage[found.inputs[name]])
    energy = shrink_diagonal(found.energies[name], found.shrinkage[f"{name}:g"])
    x = inputs[-1]
    lengths = (x * torch.linalg.solve(H, x.T).T).sum(1) / 16
    p = model.eval()(**batches[0]).logits.detach().softmax(-1).flatten(0, 1)
    expected = ((p * (1 - p)) * lengths[:, None]).mean(0)
    assert found.scales[name] == pytest.approx(float((expected / energy).mean()), rel=0.15)


def test_shared_inputs_are_measured_once():
    found = measured(llama(), tokens(3))
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    assert {found.inputs[name] for name in names} == {names[0]}
    assert names[1] not in found.moments


def test_tied_embeddings_join_both_their_metrics():
    tied, loose = measured(llama(tie_word_embeddings=True), tokens(3)), measured(llama(), tokens(3))
    name = "model.embed_tokens.weight"
    assert name in tied.energies and "lm_head.weight" not in tied.energies
    assert "lm_head.weight" in loose.energies and name in loose.energies
    assert (tied.energies[name] > 0).all()  # every token can be predicted, though not every one was read


@pytest.mark.parametrize("make", [llama, mixtral])
def test_passes_do_not_change_the_result(make):
    one, several = measured(make(), tokens(4)), measured(make(), tokens(4), memory=4000)
    assert set(one.moments) == set(several.moments) and one.shrinkage == several.shrinkage
    assert one.scales == pytest.approx(several.scales, rel=1e-4) and one.scales
    for key in one.moments:
        torch.testing.assert_close(one.moments[key], several.moments[key])
    for name in one.energies:
        torch.testing.assert_close(one.energies[name], several.energies[name])


def test_experts_are_measured_apart_and_unrouted_ones_noted():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = -1e3 * model.model.layers[0].mlp.gate.weight[:3].sum(0)
    found = measured(model, tokens(3))
    key = "model.layers.0.mlp.experts.gate_up_proj"
    reached = [i for i in range(4) if f"{key}.{i}" in found.energies]
    noted = [i for i in range(4) if f"{key}.{i}" in found.notes]
    assert sorted(reached + noted) == [0, 1, 2, 3] and len(reached) >= 2
    assert len(found.metrics(key, [w for w in model.model.layers[0].mlp.experts.gate_up_proj.detach()])) == 4


MODELS = {
    "gpt2": lambda: (GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)), tokens(3)),
    "bert": lambda: (BertModel(BertConfig(**SMALL)), tokens(3)),
    "t5": lambda: (
        T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)),
        tokens(3, decoder_input_ids=torch.zeros(2, 3, dtype=torch.long)),
    ),
    "resnet": lambda: (
        ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)),
        [{"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)],
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_measured_and_left_as_it_was(kind):
    torch.manual_seed(0)
    model, batches = MODELS[kind]()
    model.train()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    targets = find_targets(model, SQFConfig())[0]
    found = collect(model, targets, batches[1:], batches[:1])
    for target in targets:
        metrics = found.metrics(target.name, target.matrices())
        assert all(m.H is None or m.H.shape[0] == w.shape[1] for m, w in zip(metrics, target.matrices(), strict=True))
    assert len(found.energies) > 0.7 * len(targets)
    assert model.training and all(m.training for m in model.modules())
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0] and torch.equal(p, before[name][1])
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_begin_at_tables_that_are_not_compressed(freeze):
    model = llama(tie_word_embeddings=True).requires_grad_(not freeze)
    targets = find_targets(model, SQFConfig(include_embeddings=False))[0]
    found = collect(model, targets, tokens(3)[1:], tokens(3)[:1])
    assert len(found.energies) == 14 and not found.notes
    assert len(find_targets(model, SQFConfig())[0]) == 15


def test_same_data_and_seed_give_the_same_statistics():
    one, other = measured(llama(), tokens(3), seed=5), measured(llama(), tokens(3), seed=5)
    assert all(torch.equal(one.energies[n], other.energies[n]) for n in one.energies)
    different = measured(llama(), tokens(3), seed=6)
    assert any(not torch.equal(one.energies[n], different.energies[n]) for n in one.energies)


def test_activations_that_are_not_finite_are_named():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj.*not finite"):
        measured(model, tokens(3))
    assert not any(m._forward_hooks for m in model.modules())


def test_no_data():
    with pytest.raises(ValueError, match="calibration needs data"):
        measured(llama(), tokens(1))
