"""A Hub on loopback, processes that talk to it and to nothing else, and a small model to share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_sqf import SQFConfig, compress
from tests.hub.server import OWNER_TOKEN, HubServer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer().start()
    yield server
    server.stop()


def environment(hub: HubServer, home: Path, token: str | None = OWNER_TOKEN) -> dict[str, str]:
    """The variables of a process that is to talk to this Hub; ``home`` is its cache."""
    foreign = ("HF_", "HUGGING", "SQF_", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    kept |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    return kept if token is None else kept | {"HF_TOKEN": token}


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a process of its own: run(source, *arguments, token=, home=, env=).

    huggingface_hub reads its environment when it is imported, so whatever talks to the server needs a process.
    ``home`` names a cache; processes with the same name share it.
    """

    def start(
        source: str,
        *arguments: str,
        token: str | None = OWNER_TOKEN,
        home: str = "home",
        fails: bool = False,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", source, *arguments],
            cwd=tmp_path,
            env=environment(hub, tmp_path / home, token) | env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return start


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("original") / "tiny-llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    words = Tokenizer(
        WordLevel({word: i for i, word in enumerate(["?", "the", "a", "of", "and", "is"])}, unk_token="?")
    )
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", eos_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def model(original: Path) -> PreTrainedModel:
    """The model of that folder, compressed to six bits."""
    return compress(LlamaForCausalLM.from_pretrained(original), SQFConfig(bits=6, structure="grid"))


@pytest.fixture
def small(model: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder that the compressed model was saved to."""
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"
