"""Training in the Trainer: what a user does first, then what must hold."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainerCallback

import hf_sqf
from hf_sqf import SQFCallback, distillation_loss
from hf_sqf.runtime.sqf_factors import Term
from hf_sqf.runtime.sqf_modules import SUFFIX, SQFModule
from hf_sqf.training.modules import TrainedModule
from tests.conftest import build, inputs_for, outputs_of
from tests.training.conftest import compressed, images, rows

MakeTrainer = Callable[..., Trainer]
MODES = ("light", "latent", "hard")


def packed_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith(SUFFIX)}


def terms_of(model: torch.nn.Module) -> list[Term]:
    found = [m.factors(name) for m in model.modules() if isinstance(m, SQFModule) for name in m.held]
    return [term for factors in found for f in factors for term in f.terms]


def codes_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [term.codes for term in terms_of(model)]


def dictionaries_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [term.atoms for term in terms_of(model) if term.atoms is not None]


CASES = [
    ("llama_tied", {}, MODES),
    ("llama", {"trellis": 8}, ("latent",)),
    ("gpt2", {}, ("light",)),
    ("mixtral", {}, ("latent",)),
    ("llama", {"structure": "vq"}, ("light", "latent")),
    ("llama", {"structure": "pgd"}, ()),
    ("llama", {"structure": "sparse_pca"}, ()),
    ("llama", {"structure": "svd+grid", "bits": 5.0}, ("hard",)),
]
"""Architecture, options, and the modes that are not left to the slow tests."""


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        pytest.param(
            mode,
            name,
            options,
            id="-".join(map(str, (name, *options.values(), mode))),
            marks=() if mode in fast else pytest.mark.slow,
        )
        for name, options, fast in CASES
        for mode in MODES
    ],
)
def test_trains_and_leaves_a_compressed_model(
    mode: str, name: str, options: dict, trainer_for: MakeTrainer, tmp_path: Path
):
    model, teacher = compressed(name, **options), build(name)
    before, codes, dictionaries = outputs_of(model), codes_of(model), dictionaries_of(model)
    trainer = trainer_for(model, SQFCallback(mode, code_rate=100.0, every=2), teacher)
    torch.testing.assert_close(outputs_of(model.eval()), before)  # nothing changes until a step is made
    trainer.train()
    assert not any(isinstance(module, TrainedModule) for module in model.modules())
    after = outputs_of(model.eval())
    assert after.isfinite().all() and not torch.equal(after, before)
    same = all(torch.equal(one, other) for one, other in zip(codes, codes_of(model), strict=True))
    assert same == (mode == "light")
    moved = [not torch.equal(one, other) for one, other in zip(dictionaries, dictionaries_of(model), strict=True)]
    assert any(moved) == bool(dictionaries)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs_of(again), after)
    assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith(SUFFIX))


@pytest.mark.parametrize(
    ("mode", "name"),
    [("latent", "resnet"), ("light", "vit"), *(pytest.param(m, "resnet", marks=pytest.mark.slow) for m in MODES)],
)
def test_trains_with_labels(mode: str, name: str, trainer_for: MakeTrainer):
    model = compressed(name, bits=2.0)
    trainer = trainer_for(
        model, SQFCallback(mode), data=images(), max_steps=12, per_device_train_batch_size=32, logging_steps=1
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", MODES)
def test_distillation_brings_an_encoder_nearer(mode: str, trainer_for: MakeTrainer):
    model, teacher = compressed("bert", bits=2.0), build("bert")
    data = [{"input_ids": row["input_ids"]} for row in rows()]

    def distance() -> float:
        with torch.no_grad():
            pooled = [m.eval()(**inputs_for(m)).last_hidden_state.mean(1) for m in (model, teacher)]
        return float(1 - torch.nn.functional.cosine_similarity(*pooled).mean())

    before = distance()
    trainer_for(model, SQFCallback(mode), teacher, data, max_steps=24, per_device_train_batch_size=16).train()
    assert distance() < 0.9 * before


def test_without_the_callback_the_trainer_refuses(trainer_for: MakeTrainer):
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        trainer_for(compressed("llama"))


def test_logs(trainer_for: MakeTrainer):
    trainer = trainer_for(compressed("llama"), SQFCallback("latent", code_rate=100.0), build("llama"))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert 2.0 < entry["bits"] < 4.0 and 0.0 < entry["sparsity"] < 1.0 and entry["codes_changed"] > 0.0


def test_callbacks_that_report_after_it_see_the_figures(trainer_for: MakeTrainer):
    seen: list[dict] = []

    class Reporting(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = trainer_for(compressed("llama"), SQFCallback(), build("llama"))
    trainer.add_callback(Reporting())
    trainer.train()
    assert {"loss", "bits", "sparsity", "codes_changed"} <= seen[0].keys()


def test_a_regular_expression_chooses(trainer_for: MakeTrainer):
    model = compressed("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer_for(model, SQFCallback(train=r"layers\.1\.mlp"), build("llama")).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("layers.1.mlp" in name for name in changed)
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("norm.weight"))


@pytest.mark.parametrize(("train", "frozen"), [("all", True), (".", False)])
def test_dense_embeddings_stay_unless_they_are_named(train: str, frozen: bool, trainer_for: MakeTrainer):
    model = compressed("llama_tied", include_embeddings=False)
    before = model.model.embed_tokens.weight.clone()
    trainer_for(model, SQFCallback(train=train), build("llama_tied")).train()
    assert torch.equal(model.model.embed_tokens.weight, before) == frozen
    assert model.model.embed_tokens.weight.requires_grad


def test_new_heads_are_trained(trainer_for: MakeTrainer, tmp_path: Path):
    compressed("bert").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    before = model.classifier.weight.clone()
    data = [{"input_ids": row["input_ids"], "labels": 1} for row in rows()]
    trainer_for(model, SQFCallback(), data=data).train()
    assert not torch.equal(model.classifier.weight, before)


def test_light_is_a_choice_of_what_to_train_too(trainer_for: MakeTrainer):
    model = compressed("llama")
    codes = codes_of(model)
    trainer_for(model, SQFCallback("latent", train="light", code_rate=40.0), build("llama")).train()
    assert all(torch.equal(one, other) for one, other in zip(codes, codes_of(model), strict=True))


@pytest.mark.parametrize("mode", ["light", "latent"])
def test_accumulation_sums_up_to_one_batch(mode: str, trainer_for: MakeTrainer):
    outputs = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = compressed("llama")
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        trainer_for(model, SQFCallback(mode), build("llama"), optim="sgd", learning_rate=0.05, **options).train()
        outputs.append(outputs_of(model.eval()))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["light", "latent"])
def test_gradient_checkpointing_changes_nothing(mode: str, trainer_for: MakeTrainer):
    outputs = []
    for checkpointing in (False, True):
        model = compressed("llama")
        trainer_for(model, SQFCallback(mode), build("llama"), activation_checkpointing=checkpointing).train()
        outputs.append(outputs_of(model.eval()))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_autocast(mode: str, trainer_for: MakeTrainer):
    model = compressed("llama")
    trainer = trainer_for(model, SQFCallback(mode), build("llama"), bf16=True)
    trainer.train()
    assert outputs_of(model.eval()).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}


def test_models_in_bfloat16_train_in_float32_scales(trainer_for: MakeTrainer, tmp_path: Path):
    model = hf_sqf.compress(build("llama", torch.bfloat16), hf_sqf.SQFConfig(bits=3.0, structure="grid", trellis=None))
    trainer = trainer_for(model, SQFCallback("latent"), build("llama"))
    assert model.dtype == torch.bfloat16
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_second_train_goes_on(trainer_for: MakeTrainer):
    model = compressed("llama")
    trainer = trainer_for(model, SQFCallback("latent"), build("llama"))
    trainer.train()
    between = outputs_of(model.eval())
    trainer.train()
    assert not torch.equal(outputs_of(model.eval()), between)
    assert not any(isinstance(module, TrainedModule) for module in model.modules())


def test_finish_after_an_exception(trainer_for: MakeTrainer):
    model, callback = compressed("llama"), SQFCallback()
    trainer = trainer_for(model, callback, data=[{"input_ids": torch.tensor([1, 999]), "labels": torch.tensor([1, 2])}])
    with pytest.raises(IndexError):
        trainer.train()
    callback.finish()
    assert not any(isinstance(module, TrainedModule) for module in model.modules())
    assert outputs_of(model.eval()).isfinite().all()


def test_the_file_grows_by_less_than_half_a_percent(trainer_for: MakeTrainer):
    torch.manual_seed(0)
    config = build("llama").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 512, 1
    model = AutoModelForCausalLM.from_config(config)
    teacher = AutoModelForCausalLM.from_config(config)
    teacher.load_state_dict(model.state_dict())
    model = hf_sqf.compress(model, hf_sqf.SQFConfig(bits=3.0, structure="grid", trellis=8))
    for mode in MODES:
        before = hf_sqf.size_report(model).total_bytes
        trainer_for(model, SQFCallback(mode, code_rate=40.0), teacher, max_steps=8).train()
        after = hf_sqf.size_report(model)
        assert after.total_bytes < 1.005 * before
        assert model.config.quantization_config.coverage["bits"] == pytest.approx(after.bits_per_weight, abs=1e-3)


# What must fail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "mode must be one of light, latent, hard"),
        ({"train": "("}, "is not a regular expression"),
        ({"train": 3}, "train must be"),
        ({"resolution": 0}, "resolution must be a number of 1"),
        ({"every": 0}, "every must be a number of 1"),
        ({"share": 0.0}, r"share must lie in \(0, 1\]"),
        ({"code_rate": 0.0}, "code_rate must be a number of more than 0"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SQFCallback(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weight_decay": 0.1}, "set weight_decay=0"), ({"fsdp": "full_shard"}, "fsdp shards parameters")],
)
def test_arguments_that_do_not_go_with_factors(arguments: dict, message: str, trainer_for: MakeTrainer):
    model, callback = compressed("llama"), SQFCallback()
    if "fsdp" in arguments:  # accelerate refuses it on processors before the callback can
        trainer = trainer_for(compressed("llama"), SQFCallback())
        trainer.args.fsdp = arguments["fsdp"]
        with pytest.raises(ValueError, match=message):
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    else:
        with pytest.raises(ValueError, match=message):
            trainer_for(model, callback, **arguments)
    assert not any(isinstance(module, TrainedModule) for module in model.modules())


def test_a_model_that_is_not_compressed(trainer_for: MakeTrainer):
    with pytest.raises(ValueError, match="no compressed weight: compress it first"):
        trainer_for(build("llama"), SQFCallback())


def test_a_pattern_that_matches_nothing(trainer_for: MakeTrainer):
    with pytest.raises(ValueError, match="no compressed weight whose name matches train='nowhere'"):
        trainer_for(compressed("llama"), SQFCallback(train="nowhere"))


def test_two_callbacks(trainer_for: MakeTrainer):
    model = compressed("llama")
    trainer_for(model, SQFCallback())
    with pytest.raises(ValueError, match="being trained already"):
        trainer_for(model, SQFCallback())


def test_runtimes_wait_until_training_ends(trainer_for: MakeTrainer):
    model = compressed("llama")
    trainer = trainer_for(model, SQFCallback(), build("llama"))
    with pytest.raises(ValueError, match="while factors are trained"):
        hf_sqf.set_runtime(model, "dense")
    trainer.train()
    hf_sqf.set_runtime(model, "dense")


def test_names_of_the_package():
    assert hf_sqf.SQFCallback is SQFCallback and hf_sqf.distillation_loss is distillation_loss
    assert {"SQFCallback", "distillation_loss"} <= set(hf_sqf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_sqf.nothing
