"""Pushing for real, over HTTP: refusals, failures on the way, cards, the Trainer. One process a test."""

import json

import pytest
from huggingface_hub import ModelCard

from hf_sqf.hub.verification import travelling
from tests.hub.server import OTHER_TOKEN, HubServer

pytestmark = pytest.mark.slow

MADE = """
import copy, json, os, sys, urllib.request
import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from hf_sqf import SQFConfig, compress
from hf_sqf.hub import Unfaithful, check, push, verify

torch.manual_seed(0)
tokens = torch.arange(8)[None]

def made(**options):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    original = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes)).eval()
    return compress(copy.deepcopy(original), SQFConfig(bits=6, structure="grid", **options)), original

def fail_next(*faults):
    names = ("method", "path", "status")
    told = [dict(zip(names, fault)) for fault in faults]
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/tests/faults", json.dumps(told).encode()).close()
"""


def test_unfaithful_models_are_refused_unless_forced(hub: HubServer, run):
    done = run(
        MADE
        + """
model, original = made(max_kl=1e-9)
with pytest.raises(Unfaithful, match="above max_kl=1e-09"):
    model.push_to_hub("me/bad", original=original)
with pytest.raises(Unfaithful):  # the result is on record now
    model.push_to_hub("me/bad")
with pytest.raises(Unfaithful):
    model.save_pretrained("bad", push_to_hub=True, repo_id="me/bad")
with pytest.raises(Unfaithful):  # and goes along with the files
    push("bad", "me/bad")
with pytest.raises(RepositoryNotFoundError):  # a refused push leaves no trace
    HfApi().repo_info("me/bad")
model.push_to_hub("me/bad", force=True)

unknown, _ = made()
unknown.push_to_hub("me/unknown", tags=["mine"])
lenient, _ = made(max_kl=None, min_cosine=None)
lenient.save_pretrained("lenient", push_to_hub=True, repo_id="me/lenient", private=True, commit_message="first")
"""
    )
    assert "me/unknown is pushed without a fidelity check" in done.stderr
    assert "me/lenient is pushed without" not in done.stderr
    assert hub.repos["me/lenient"].private
    assert json.loads(hub.files("me/bad")["config.json"])["quantization_config"]["fidelity"]["value"] > 1e-9
    card = ModelCard(hub.files("me/unknown")["README.md"].decode())
    assert card.data.tags == ["sqf", "mine"] and "Not measured" in card.text
    assert 'from_pretrained("me/unknown"' in card.text


def test_a_push_that_fails_on_the_way_fails_loudly_and_can_be_repeated(hub: HubServer, run):
    """The weights cannot be stored; the commit is refused; the connection is cut and tried again, and all is well."""
    run(
        MADE
        + """
model, _ = made(max_kl=None, min_cosine=None)
def assert_nothing_there():
    assert HfApi().list_repo_files("me/small") == []
fail_next(("PUT", "/objects/", 403))
with pytest.raises((HfHubHTTPError, RuntimeError)):
    model.push_to_hub("me/small")
assert_nothing_there()
fail_next(("POST", "/commit/", 403))
with pytest.raises(HfHubHTTPError, match="403"):
    model.push_to_hub("me/small")
assert_nothing_there()
fail_next(("POST", "/objects/batch", 500), ("POST", "/preupload/", 0))
model.push_to_hub("me/small")
loaded = AutoModelForCausalLM.from_pretrained("me/small")
assert torch.equal(loaded(tokens).logits, model(tokens).logits)
assert verify("me/small") == []
"""
    )
    assert hub.files("me/small").keys() >= {"model.safetensors", "config.json", "README.md", *travelling()}
    assert [fault.times for fault in hub.faults] == [0, 0]


def test_private_and_gated_repositories(hub: HubServer, run):
    run(
        MADE
        + """
made(max_kl=None, min_cosine=None)[0].push_to_hub("me/closed", private=True)
assert verify("me/closed") == []
number = 0
def load_as(token):
    global number
    number += 1
    return AutoModelForCausalLM.from_pretrained("me/closed", token=token, cache_dir=f"cache {number}")
stranger = sys.argv[1]
def refused_as(kind, status, token):
    with pytest.raises(OSError) as caught:
        load_as(token)
    assert isinstance(caught.value.__cause__, kind), repr(caught.value.__cause__)
    assert caught.value.__cause__.response.status_code == status
load_as(None)
refused_as(RepositoryNotFoundError, 401, False)
refused_as(RepositoryNotFoundError, 404, stranger)
with pytest.raises(HfHubHTTPError, match="403"):
    made(max_kl=None, min_cosine=None)[0].push_to_hub("me/closed", token=stranger)

made(max_kl=None, min_cosine=None)[0].push_to_hub("me/open")
HfApi().update_repo_settings("me/open", gated="auto")
def load_as(token, load_closed=load_as):
    global number
    number += 1
    return AutoModelForCausalLM.from_pretrained("me/open", token=token, cache_dir=f"cache {number}")
load_as(None)
refused_as(GatedRepoError, 401, False)
refused_as(GatedRepoError, 403, stranger)
""",
        OTHER_TOKEN,
    )


def test_cards_of_others_stay_and_ours_are_renewed(hub: HubServer, run):
    run(
        MADE
        + """
def card(**where):
    return open(hf_hub_download("me/small", "README.md", **where)).read()
model, original = made()
model.push_to_hub("me/small")
assert "Not measured" in card()
model.push_to_hub("me/small", original=original)
assert "Not measured" not in card() and "random inputs" in card()
HfApi().upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="me/small")
model.push_to_hub("me/small", revision="next")
assert card(revision="next") == "# Mine"
"""
    )
    assert hub.files("me/small", "next")["README.md"] == b"# Mine"


def test_licence_and_language_come_from_the_base_model(hub: HubServer, run):
    run(
        MADE
        + """
made()[1].push_to_hub("me/base")
card = b"---\\nlicense: mit\\nlanguage: en\\n---\\n# Base"
HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/base")
model = AutoModelForCausalLM.from_pretrained("me/base", quantization_config=SQFConfig(bits=6, structure="grid"))
model.push_to_hub("me/small")  # finds the original in the cache and compares with it
"""
    )
    card = ModelCard(hub.files("me/small")["README.md"].decode())
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("me/base", "quantized")
    assert "random inputs" in card.text and "nats" in card.text
    assert len(card.data.eval_results) == 3


def test_trainer_trains_pushes_and_what_it_pushed_loads(hub: HubServer, run):
    """With ``push_to_hub=True``, at the end of training and of every epoch."""
    run(
        MADE
        + """
from transformers import Trainer, TrainingArguments
from hf_sqf import SQFCallback
made()[0].save_pretrained("base")
model = AutoModelForCausalLM.from_pretrained("base")
before = model(tokens).logits
arguments = TrainingArguments(
    "out", push_to_hub=True, hub_model_id="me/trained", report_to=[], use_cpu=True, max_steps=4, learning_rate=0.05
)
data = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SQFCallback()])
trainer.train()
trainer.push_to_hub()
loaded = AutoModelForCausalLM.from_pretrained("me/trained")
assert torch.equal(loaded(tokens).logits, model(tokens).logits)
assert not torch.equal(model(tokens).logits, before)
assert [fault.where for fault in verify("me/trained")] in ([], ["training_args.bin"])
"""
    )
    files = hub.files("me/trained")
    assert files.keys() >= travelling().keys()
    assert "sqf" in ModelCard(files["README.md"].decode()).data.tags
