"""hf_sqf.report.plots: what is drawn is what was given; files are of their kind, and the same every time."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import Trainer

import hf_sqf
from hf_sqf import SQFCallback, SQFConfig
from hf_sqf.report import plots
from hf_sqf.report.accounts import bits_by_layer, code_shares
from tests.conftest import build
from tests.training.conftest import compressed, trainer_for  # noqa: F401 (a fixture)

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb  # noqa: E402


def texts(figure) -> set[str]:  # noqa: ANN001
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_series_have_their_names_and_do_not_need_colours():
    ours = plots.Series("ours", [10.0, 20.0], [0.3, 0.1], ["2 bits", "4 bits"])
    theirs = plots.Series("theirs", [15.0], [0.4])
    figure = plots.size_against_quality([ours, theirs], size="bits")
    (axes,) = figure.axes
    first, second = axes.lines
    assert list(first.get_xdata()) == [10.0, 20.0] and list(second.get_ydata()) == [0.4]
    assert (first.get_marker(), first.get_linestyle()) != (second.get_marker(), second.get_linestyle())
    for line in axes.lines:
        assert len(set(to_rgb(line.get_color()))) == 1  # a grey
    assert texts(figure) == {"ours", "theirs", "2 bits", "4 bits"}
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "bits" and "less is better" in axes.get_ylabel()


def test_names_do_not_cover_one_another():
    crowd = [plots.Series(f"model {i}", [10.0 + 0.01 * i], [0.3]) for i in range(4)]
    figure = plots.size_against_quality(crowd)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


def test_cosines_have_an_even_scale():
    figure = plots.size_against_quality([plots.Series("", [1.0, 2.0], [0.9, 0.99])], metric="cosine")
    assert figure.axes[0].get_yscale() == "linear" and "more is better" in figure.axes[0].get_ylabel()
    assert plots.size_against_quality([plots.Series("", [1.0], [0.0])]).axes[0].get_yscale() == "linear"


def test_measured_models_go_by_size():
    rows = [
        {"model": "b/large", "bytes": 4_000_000, "value": 0.1},
        {"model": "small", "bytes": 1_000_000, "value": 0.4},
    ]
    assert plots.models(rows) == plots.Series("", [1.0, 4.0], [0.4, 0.1], ["small", "large"])


def test_bits_by_layer_have_their_figures():
    model = hf_sqf.compress(build("llama"), SQFConfig(bits=3, structure="grid", trellis=None))
    rows = hf_sqf.size_report(model).compressed_rows
    figure = plots.layer_bits(rows)
    (axes,) = figure.axes
    found = bits_by_layer(rows)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["model.layers.0", "model.layers.1"]
    assert "self_attn.q_proj" in [label.get_text() for label in axes.get_xticklabels()]
    query = next(row for row in rows if row["name"] == "model.layers.1.self_attn.q_proj.weight")
    assert found.bits[1][found.weights.index("self_attn.q_proj")] == query["bits_per_weight"]
    assert len(axes.texts) == sum(bits is not None for line in found.bits for bits in line) == 14
    assert f"{query['bits_per_weight']:.2f}" in texts(figure)
    assert {name for name, _ in found.others} == {"model.embed_tokens", "lm_head"}


def test_the_histogram_is_of_the_shares():
    counts = Counter({0: 6, 1: 2, 30: 1, -9: 1})
    figure = plots.code_histogram(counts)
    shares = code_shares(counts)
    assert shares[0] == ("≤ -8", 0.1) and shares[-1] == ("≥ 8", 0.1) and len(shares) == 17
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([100 * share for _, share in shares])
    assert all(bar.get_hatch() for bar in bars)


def test_singular_values_end_where_the_rank_does():
    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    figure = plots.singular_values(weight, (u[:, :5] * s[:5]) @ v[:5], "layer.weight")
    (axes,) = figure.axes
    original, kept = axes.lines
    assert (original.get_linestyle(), kept.get_linestyle()) == ("-", "--")
    assert original.get_ydata() == pytest.approx(s.tolist(), rel=1e-4)
    assert kept.get_ydata() == pytest.approx(s[:5].tolist(), rel=1e-4)
    share = 100 * float(s[:5].square().sum() / s.square().sum())
    assert axes.get_title() == f"layer.weight: {share:.2f} % of the energy kept"


def test_curves_of_a_trainer(trainer_for):  # noqa: F811
    trainer: Trainer = trainer_for(compressed("llama"), SQFCallback(), max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    history = trainer.state.log_history
    figure = plots.training_curves(history)
    drawn = {axes.get_ylabel(): axes for axes in figure.axes if axes.lines}
    assert drawn.keys() == {"loss", "bits per weight", "share of zeros", "codes changed a step, share"}
    training, held_out = drawn["loss"].lines
    assert list(training.get_ydata()) == [entry["loss"] for entry in history if "loss" in entry]
    assert list(held_out.get_ydata()) == [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert [text.get_text() for text in drawn["loss"].get_legend().get_texts()] == ["training", "held out"]
    assert training.get_linestyle() != held_out.get_linestyle()
    assert list(drawn["bits per weight"].lines[0].get_xdata()) == [2, 4]


@pytest.mark.parametrize("name", ["picture.svg", "picture.PNG"])
def test_files_are_of_their_kind_and_the_same_every_time(name: str, tmp_path: Path):
    first, second = tmp_path / f"a{name}", tmp_path / f"b{name}"
    for file in (first, second):
        plots.save(plots.code_histogram(Counter({0: 3, 1: 1})), file, description="of four codes")
    assert first.read_bytes() == second.read_bytes() and b"of four codes" in first.read_bytes()
    if name.endswith("svg"):
        root = ElementTree.fromstring(first.read_text(encoding="utf-8"))
        assert "% of all codes" in {element.text for element in root.iter() if element.text}
    else:
        assert first.read_bytes().startswith(b"\x89PNG")


REFUSED = [
    (lambda: plots.Series("x", [1.0], []), "'x' needs as many sizes as values"),
    (lambda: plots.Series("x", [1.0], [1.0], ["a", "b"]), "2 labels"),
    (lambda: plots.size_against_quality([]), "no series"),
    (
        lambda: plots.size_against_quality([plots.Series("x", [1.0], [1.0])], metric="bleu"),
        "metric must be kl or cosine",
    ),
    (lambda: plots.layer_bits([]), "none of these weights"),
    (lambda: plots.code_histogram(Counter()), "looked up in codebooks"),
    (lambda: plots.singular_values(torch.ones(2, 3), torch.ones(3, 2)), "two matrices of one shape"),
    (lambda: plots.singular_values(torch.ones(2, 2), torch.full((2, 2), torch.nan), "w"), "w or what was kept"),
    (lambda: plots.training_curves([{"step": 1, "grad_norm": 1.0}]), "set logging_steps"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_drawn_is_refused(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_module_waits_for_matplotlib_until_it_draws():
    program = "import sys; sys.modules['matplotlib'] = None; import hf_sqf.report.plots; print('imported')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr
