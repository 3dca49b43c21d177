"""The loss that holds a model to its original."""

import copy
import gc
import logging
from collections.abc import Callable

import pytest
import torch
from transformers import BertForSequenceClassification, Trainer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import hf_sqf
from hf_sqf import SQFCallback, distillation_loss
from hf_sqf.training import distillation
from hf_sqf.training.distillation import ForwardKL
from tests.conftest import build
from tests.training.conftest import compressed, rows


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The definition, from torch's own functions."""
    s = torch.log_softmax(student / temperature, -1)
    t = torch.log_softmax(teacher / temperature, -1)
    return torch.nn.functional.kl_div(s, t, log_target=True, reduction="none").sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_forward_kl_and_its_gradient(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distillation, "_LOGITS", chunk)
    torch.manual_seed(0)
    student = torch.randn(10, 5, requires_grad=True)
    teacher, weights = torch.randn(10, 5), torch.rand(10)
    expected = (divergence(student, teacher, temperature) * weights).sum()
    (gradient,) = torch.autograd.grad(3.0 * expected, student)
    found = ForwardKL.apply(student, teacher.clone(), weights, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3.0 * found, student)[0], gradient)


def test_a_large_vocabulary_takes_no_third_table():
    """Most of what is allocated beside the logits of both is one chunk."""
    student = torch.randn(2048, 8192, requires_grad=True)
    teacher = torch.randn(2048, 8192)
    address = teacher.data_ptr()
    loss = ForwardKL.apply(student, teacher, torch.ones(2048), 1.0)
    (kept,) = loss.grad_fn.saved_tensors
    assert kept.data_ptr() == address


class Named(torch.nn.Module):
    """Gives the outputs that it is made with."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output, self.one = output, torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None) -> object:
        return self.output


def test_only_predictions_of_labels_count():
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (2, 5))
    student, teacher = (
        Named(CausalLMOutput(logits=torch.randn(2, 5, 9))),
        Named(CausalLMOutput(logits=torch.randn(2, 5, 9))),
    )
    teacher.loss_type = "ForCausalLM"
    loss = distillation_loss(teacher, student=student)
    each = divergence(student.output.logits, teacher.output.logits, 1.0)

    def value(labels: torch.Tensor | None = None, items: int | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        return loss(student(input_ids=ids, **inputs), labels, num_items_in_batch=items)

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(value(), each.mean())
    torch.testing.assert_close(value(attention_mask=mask), each[mask.bool()].mean())
    labels = ids.clone()
    labels[0, :3] = -100  # positions 2 and 3 predict the labels 3 and 4
    torch.testing.assert_close(value(labels), torch.cat([each[0, 2:4], each[1, :4]]).mean())
    torch.testing.assert_close(value(labels, 12), torch.cat([each[0, 2:4], each[1, :4]]).sum() / 12)


def test_embeddings_are_pooled_over_the_mask():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    student, teacher = Named(BaseModelOutput(last_hidden_state=ours)), Named(BaseModelOutput(last_hidden_state=theirs))
    pooled = [torch.stack([h[0, :2].mean(0), h[1].mean(0)]) for h in (ours, theirs)]
    for kind, expected in (
        ("cosine", 1 - torch.nn.functional.cosine_similarity(*pooled).mean()),
        ("mse", torch.nn.functional.mse_loss(*pooled)),
    ):
        loss = distillation_loss(teacher, embeddings=kind, student=student)
        torch.testing.assert_close(loss(student(attention_mask=mask)), expected)


def test_hidden_states_add_to_the_loss():
    model, teacher = compressed("llama"), build("llama")
    ids = rows(2)[0]["input_ids"][None]
    plain = distillation_loss(teacher, student=model)
    base = plain(model(input_ids=ids))
    more = distillation_loss(teacher, hidden_states=2.0, student=model)
    outputs = model(input_ids=ids)
    assert len(outputs.hidden_states) == 3
    states = teacher(input_ids=ids, output_hidden_states=True).hidden_states
    apart = [(a - b).square().sum() / b.square().sum() for a, b in zip(outputs.hidden_states, states, strict=True)]
    torch.testing.assert_close(more(outputs), base + 2.0 * torch.stack(apart).mean())


def test_the_teacher_takes_no_gradients_and_does_not_change():
    model, teacher = compressed("llama"), build("llama").train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss = distillation_loss(teacher, student=model)
    loss(model(input_ids=rows(1)[0]["input_ids"][None])).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_a_teacher_in_bfloat16():
    model = compressed("llama")
    loss = distillation_loss(build("llama", torch.bfloat16), student=model)
    value = loss(model(input_ids=rows(1)[0]["input_ids"][None]))
    value.backward()
    assert value.dtype == torch.float32 and 0.0 < value.item() < 1.0


def test_classifiers(trainer_for: Callable[..., Trainer]):
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(build("bert").config)
    model = hf_sqf.compress(copy.deepcopy(teacher), hf_sqf.SQFConfig(bits=2.0, structure="grid", trellis=None))
    data = [{"input_ids": row["input_ids"], "labels": 0} for row in rows()]
    trainer = trainer_for(model, SQFCallback("latent"), teacher, data, max_steps=2)
    trainer.train()
    assert all(0.0 <= e["loss"] < 0.1 for e in trainer.state.log_history if "loss" in e)


def test_evaluation_gives_the_divergence(trainer_for: Callable[..., Trainer]):
    model, teacher = compressed("llama"), build("llama")
    trainer = trainer_for(model, SQFCallback(), teacher, per_device_eval_batch_size=8)
    ids = torch.stack([row["input_ids"] for row in rows(8)])
    with torch.no_grad():
        each = divergence(model.eval()(input_ids=ids).logits, teacher.eval()(input_ids=ids).logits, 1.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(each[:, :-1].mean()), rel=1e-3)


# What must fail


def test_without_inputs():
    teacher = build("llama")
    loss = distillation_loss(teacher)
    outputs = compressed("llama")(input_ids=rows(1)[0]["input_ids"][None])
    with pytest.raises(
        RuntimeError, match=r"callbacks=\[SQFCallback\(\)\], or say distillation_loss\(teacher, student"
    ):
        loss(outputs)


def test_teachers_of_another_vocabulary():
    student, teacher = (Named(CausalLMOutput(logits=torch.randn(1, 3, size))) for size in (5, 6))
    loss = distillation_loss(teacher, student=student)
    with pytest.raises(ValueError, match=r"teacher's logits are \(1, 3, 6\), the model's \(1, 3, 5\)"):
        loss(student(input_ids=torch.zeros(1, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"embeddings": "euclid"}, "embeddings must be cosine or mse"),
        ({"hidden_states": -1.0}, "hidden_states must be a weight of 0 or more"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        distillation_loss(build("llama"), **options)


def test_the_trainer_does_not_warn_at_every_step_that_there_are_no_labels(trainer_for: Callable[..., Trainer]):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(handler)
    try:
        data = [{"input_ids": row["input_ids"]} for row in rows()]
        trainer_for(compressed("bert"), SQFCallback(), build("bert"), data, max_steps=2).train()
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert said[-1] == "something else" and not any("labels=None" in message for message in said)


def test_the_student_drops_nothing():
    model, inputs = compressed("bert"), {"input_ids": torch.arange(3, 12)[None]}
    assert model.config.hidden_dropout_prob > 0
    distillation.watch(model)
    gc.collect()  # losses of other tests
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model.eval()(**inputs).last_hidden_state
        assert not torch.equal(model.train()(**inputs).last_hidden_state, expected)  # with labels, it drops
        loss = distillation_loss(build("bert"))
        assert torch.equal(model.train()(**inputs).last_hidden_state, expected)
    assert model.training and loss is not None
