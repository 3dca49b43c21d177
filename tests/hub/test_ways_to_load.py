"""A model pushed by one process, loaded by others in the three ways, and by a fourth that must fail."""

import re
from pathlib import Path

import pytest

from hf_sqf.hub.verification import travelling
from tests.hub.server import HubServer

ROOT = Path(__file__).parent.parent.parent

# The tokenizer and the model are tiny; what they say is meaningless but must be the same everywhere.
PUSH = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from hf_sqf import SQFConfig

words = {word: number for number, word in enumerate("<pad> the cat sat on a mat and slept".split())}
made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<pad>")
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
                             tie_word_embeddings=True)).save_pretrained("original")
tokenizer.save_pretrained("original")
model = AutoModelForCausalLM.from_pretrained("original", quantization_config=SQFConfig(bits=6))
with torch.no_grad():
    torch.save(model(torch.arange(12)[None]).logits, "logits.pt")
weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight_factors")}
torch.save({name: weight.detach().clone() for name, weight in weights.items()}, "weights.pt")
print(model.push_to_hub("me/small").oid)
tokenizer.push_to_hub("me/small")
"""

# Way 2: sys.modules makes sure that neither the package nor numba can be imported.
ALONE = """
import sys
sys.modules["hf_sqf"] = sys.modules["numba"] = sys.modules["llvmlite"] = None
"""

SAME = """
import torch
from transformers import AutoModelForCausalLM
def assert_same(model):
    # Weights bit for bit; without numba other kernels multiply by them, and add up in another order.
    weights = torch.load("weights.pt")
    assert len(weights) == 16 and model.hf_quantizer.quantization_config.coverage["weights"] == 15
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(12)[None]).logits, torch.load("logits.pt"))
"""

LOADED_ALONE = (
    ALONE
    + SAME
    + """
from transformers import AutoConfig, AutoModel, pipeline
trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained("me/small", **trusted)
assert type(config).__module__.startswith("transformers_modules."), type(config)
model = AutoModelForCausalLM.from_pretrained("me/small", **trusted)
assert_same(model)
by_commit = AutoModelForCausalLM.from_pretrained("me/small", revision=sys.argv[1], **trusted)
assert_same(by_commit)
body = AutoModel.from_pretrained("me/small", **trusted)
assert torch.equal(body(torch.arange(12)[None])[0], model.model(torch.arange(12)[None])[0])
start = torch.tensor([[1, 2, 3]])
told = model.generate(start, max_new_tokens=5, do_sample=False)
assert told.shape == (1, 8)
said = pipeline("text-generation", "me/small", max_new_tokens=5, do_sample=False, **trusted)("the cat")
assert said[0]["generated_text"].startswith("the cat")

from sentence_transformers import SentenceTransformer
st = SentenceTransformer("me/small", model_kwargs=trusted, config_kwargs=trusted, **trusted)
vectors = st.encode(["the cat sat", "a mat"])
assert vectors.shape == (2, 64)
st.save("sentences")
again = SentenceTransformer("sentences", model_kwargs=trusted, config_kwargs=trusted, **trusted)
assert (again.encode(["the cat sat", "a mat"]) == vectors).all()

model.save_pretrained("saved_alone")
model.push_to_hub("me/passed-on")
"""
)

AGAIN_ALONE = (
    ALONE
    + SAME
    + """
for name in ("saved_alone", "me/passed-on"):
    assert_same(AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True))
"""
)

IMPORTED = (
    SAME
    + """
import sys
import hf_sqf
assert "numba" in sys.modules
model = AutoModelForCausalLM.from_pretrained("me/small")
assert_same(model)
assert type(model.hf_quantizer).__module__.startswith("hf_sqf.")
# Both copies in one process: the installed one runs, whatever came with the model.
both = AutoModelForCausalLM.from_pretrained("me/small", trust_remote_code=True)
assert_same(both)
assert type(both.hf_quantizer).__module__.startswith("hf_sqf.")
both.save_pretrained("saved_by_both")
from hf_sqf.hub import verify
assert verify("saved_by_both") == verify("me/small") == []
"""
)

INSTALLED = (
    SAME
    + """
import sys
assert "hf_sqf" not in sys.modules
model = AutoModelForCausalLM.from_pretrained("me/small")
assert "hf_sqf" in sys.modules
assert_same(model)
"""
)

NEITHER = ALONE + "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained('me/small')\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages as pip leaves it, with hf_sqf, its autoload module and its metadata."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("hf_sqf", "hf_sqf_autoload.py"):
        (folder / name).symlink_to(ROOT / name)
    declared = re.findall(
        r'^\[project\.entry-points\."(.+?)"\]\n(.+?)\n\n',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    assert declared, "pyproject.toml declares no entry point"
    info = folder / "hf_sqf-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-sqf\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{lines}\n".replace('"', "") for group, lines in declared)
    )
    return folder


def test_three_ways_to_load_and_one_to_fail(hub: HubServer, run, site: Path, tmp_path: Path):
    outside = {"PYTHONPATH": "", "HF_SQF_AUTOLOAD": "0"}  # as if hf_sqf were not installed
    commit = run(PUSH).stdout.split()[-1]
    pushed = hub.files("me/small")
    assert {path: content.decode() for path, content in pushed.items() if path.endswith(".py")} == {
        name: path.read_text(encoding="utf-8") for name, path in travelling().items()
    }

    run(IMPORTED, home="home of the first")
    run(LOADED_ALONE, commit, home="home of the second", **outside)
    run(INSTALLED, home="home of the third", PYTHONPATH=str(site))
    failed = run(NEITHER, home="home of the fourth", fails=True, **outside)
    assert "RuntimeError" in failed.stderr
    assert "hf-sqf" not in failed.stdout

    passed_on = hub.files("me/passed-on")
    assert passed_on.keys() >= {path for path in pushed if path.endswith((".py", ".safetensors"))}
    assert all(passed_on[path] == pushed[path] for path in pushed if path.endswith((".py", ".safetensors")))
    run(AGAIN_ALONE, home="home of the fifth", **outside)
