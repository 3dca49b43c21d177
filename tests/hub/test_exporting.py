"""What other programs get: ordinary checkpoints, sentence-transformers, lm-eval."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from hf_sqf import SQFConfig
from hf_sqf.hub import export


@pytest.fixture
def with_tokenizer(small: Path, original: Path) -> Path:
    AutoTokenizer.from_pretrained(original).save_pretrained(small)
    return small


def header(file: Path) -> dict:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


@pytest.mark.parametrize(
    ("dtype", "code"), [(None, "F32"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")]
)
def test_export_is_an_ordinary_checkpoint(
    with_tokenizer: Path, original: Path, model: PreTrainedModel, tmp_path: Path, dtype: str | None, code: str
):
    out = export(with_tokenizer, tmp_path / "dense", dtype=dtype)
    exported, first = header(out / "model.safetensors"), header(original / "model.safetensors")
    shapes = {name: entry["shape"] for name, entry in exported.items() if name != "__metadata__"}
    assert shapes == {name: entry["shape"] for name, entry in first.items() if name != "__metadata__"}
    assert {entry["dtype"] for name, entry in exported.items() if name != "__metadata__"} == {code}
    assert not list(out.glob("*.py")) and not (out / "README.md").exists()
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (out, original))
    assert config == was | {"dtype": config["dtype"]}  # no auto_map, no quantization_config: what converters expect
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(original).get_vocab()
    weight = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight.to(weight.dtype))
    dense = LlamaForCausalLM.from_pretrained(out)
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_export_refuses_what_it_cannot_do(small: Path, original: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="dtype must be one of"):
        export(small, tmp_path / "out", dtype="int3")
    with pytest.raises(FileExistsError):
        export(small, small)
    with pytest.raises(ValueError, match="does not hold a model compressed"):
        export(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sentence_transformers(original: Path, tmp_path: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["the a of", "and is the of a a"]
    options = {"quantization_config": SQFConfig(bits=6, structure="grid")}
    made = sentence_transformers.SentenceTransformer(str(original), model_kwargs=options)
    vectors = made.encode(texts)
    made.save(str(tmp_path / "sentences"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "sentences"))
    assert (again.encode(texts) == vectors).all()
    assert again.dtype == torch.float32
    assert (
        json.loads((tmp_path / "sentences" / "config.json").read_text())["quantization_config"]["quant_method"] == "sqf"
    )
    assert (tmp_path / "sentences" / "sqf_hub.py").exists()


def test_the_way_lm_eval_loads(with_tokenizer: Path, model: PreTrainedModel):
    """Its HFLM reads the config first and hands the quantization config back to from_pretrained."""
    config = AutoModelForCausalLM.from_pretrained(with_tokenizer).config.to_dict()
    given = AutoQuantizationConfig.from_dict(config["quantization_config"])
    assert type(given) is SQFConfig
    loaded = AutoModelForCausalLM.from_pretrained(with_tokenizer, quantization_config=given)
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm_eval")
def test_lm_eval_itself(with_tokenizer: Path, model: PreTrainedModel):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(with_tokenizer), device="cpu", dtype="float32", batch_size=1)
    assert lm.model.hf_quantizer.quantization_config.quant_method == "sqf"
    request = Instance("loglikelihood", {}, ("the a of", " and is"), 0)
    ((logprob, _),) = lm.loglikelihood([request], disable_tqdm=True)
    ids = AutoTokenizer.from_pretrained(with_tokenizer)("the a of and is", return_tensors="pt").input_ids
    logp = torch.log_softmax(model(ids).logits[0].float(), -1)
    assert logprob == pytest.approx(float(logp[[2, 3], ids[0, 3:]].sum()), abs=1e-4)
