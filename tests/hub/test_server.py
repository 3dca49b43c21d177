"""The Hub of these tests behaves as the real one does towards huggingface_hub, seen with an ordinary model."""

import json
import re

import pytest

from tests.hub.server import OTHER_TOKEN, Fault, HubServer

MODEL = """
import torch
from transformers import BertConfig, BertModel
torch.manual_seed(0)
model = BertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=8, max_position_embeddings=8))
"""


@pytest.mark.slow
def test_model_is_pushed_and_pulled_by_id_and_revision(hub: HubServer, run):
    run(
        MODEL
        + """
from transformers import AutoModel
model.push_to_hub("me/plain")
with torch.no_grad():
    model.embeddings.LayerNorm.bias.fill_(1)
second = model.push_to_hub("me/plain", revision="next", commit_message="shifted")
again = AutoModel.from_pretrained("me/plain")
assert again.embeddings.LayerNorm.bias.eq(0).all()
for revision in ("next", second.oid):
    again = AutoModel.from_pretrained("me/plain", revision=revision)
    assert again.embeddings.LayerNorm.bias.eq(1).all()
"""
    )
    files = hub.files("me/plain")
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert json.loads(files["config.json"])["model_type"] == "bert"
    assert any(re.fullmatch("PUT /objects/[0-9a-f]{64}", request) for request in hub.requests), "weights go by LFS"
    assert hub.files("me/plain", "next")["model.safetensors"] != files["model.safetensors"]


ASK = """
import sys
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, HfHubHTTPError
api = HfApi()
api.create_repo("me/private", private=True)
api.create_repo("me/gated")
for name in ("me/private", "me/gated"):
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id=name)
api.update_repo_settings("me/gated", gated="auto")
number = 0
for name in ("me/private", "me/gated"):
    for token in (False, sys.argv[1], None):
        number += 1
        try:
            print(open(hf_hub_download(name, "a.txt", token=token, cache_dir=str(number))).read())
        except (GatedRepoError, RepositoryNotFoundError) as error:
            print(type(error).__name__, error.response.status_code)
        try:
            api.upload_file(path_or_fileobj=b"x", path_in_repo="b.txt", repo_id=name, token=token)
        except HfHubHTTPError as error:
            print(error.response.status_code)
"""


def test_strangers_are_refused(hub: HubServer, run):
    said = run(ASK, OTHER_TOKEN).stdout.split("\n")
    assert said == [
        *("RepositoryNotFoundError 401", "401", "RepositoryNotFoundError 404", "403", "secret"),
        *("GatedRepoError 401", "401", "GatedRepoError 403", "403", "secret"),
        "",
    ]
    assert hub.repos["me/private"].private and hub.repos["me/gated"].gated


def test_faults_come_as_ordered(hub: HubServer, run):
    hub.faults.append(Fault("POST", "/commit/", 403))
    program = (
        "from huggingface_hub import HfApi\n"
        "HfApi().create_repo('me/r', exist_ok=True)\n"
        "HfApi().upload_file(path_or_fileobj=b'x', path_in_repo='a.txt', repo_id='me/r')\n"
    )
    assert "403" in run(program, fails=True).stderr
    assert hub.files("me/r") == {}
    run(program)
    assert hub.files("me/r") == {"a.txt": b"x"}
