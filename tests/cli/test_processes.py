"""Every command once as a user starts it: a process of its own, with a Hub to talk to.

Each process imports torch and transformers, which takes seconds; those of the README run with the slow tests.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import ROOT, one_sentence
from tests.hub.conftest import environment
from tests.hub.server import HubServer, Repo

README = ROOT / "README.md"


def commands_of_readme() -> list[list[str]]:
    """The section "On the command line"."""
    section = README.read_text(encoding="utf-8").partition("## On the command line\n")[2].partition("\n## ")[0]
    return [line.split() for line in re.findall(r"^hf-sqf (.*)", section, flags=re.MULTILINE)]


@pytest.mark.slow
def test_what_the_readme_types(hub: HubServer, minilm: Path, process, tmp_path: Path):
    """As it stands there, the id on the Hub too, under which a Hub on loopback has the packaged model."""
    repo = hub.repos["sentence-transformers/all-MiniLM-L6-v2"] = Repo()
    files = [path for path in minilm.rglob("*") if path.is_file()]
    repo.commit("main", {path.relative_to(minilm).as_posix(): path.read_bytes() for path in files})
    env = environment(hub, tmp_path / "home", token=None)
    said = {arguments[0]: process(*arguments, env=env).stdout for arguments in commands_of_readme()}
    assert said.keys() == {"compress", "inspect", "report", "evaluate", "verify", "export"}
    assert "14.29 MB, 6.4 times smaller than 90.85 MB" in said["compress"]
    assert "encoder.layer.5" in said["inspect"]
    (cosine,) = re.findall(r" 0\.99\d\d ", said["evaluate"])[:1]
    assert float(cosine) > 0.99
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    for name in ("tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "small" / name).exists() and (tmp_path / "dense" / name).exists()
    assert "license: apache-2.0" in (tmp_path / "small" / "README.md").read_text()


def test_push(hub: HubServer, shrunk: Path, process, tmp_path: Path):
    env = environment(hub, tmp_path / "home")
    done = process("push", shrunk, "me/small", "--private", env=env)
    assert done.stdout.startswith(f"{hub.url}/me/small/commit/")
    assert hub.repos["me/small"].private
    done = process("push", shrunk, "me/small", "--revision", "later", "--json", env=env)
    said = json.loads(done.stdout)
    assert said["commit"] == hub.repos["me/small"].branches["later"] and said["url"].endswith(said["commit"])
    assert hub.files("me/small")["model.safetensors"] == (shrunk / "model.safetensors").read_bytes()


def test_compare_and_run(shrunk: Path, original: Path, texts: Path, process, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "none",
                "out": "results",
                "compressions": [{"name": "four", "bits": 4, "structure": "grid"}],
                "evaluations": [{"dataset": "texts.txt"}],
            }
        )
    )
    done = process("--quiet", "run", "mine.yaml", "--set", f"model={original}")
    assert (done.stdout, done.stderr) == ("", "")
    done = process("compare", "results/four", shrunk, "--against", original, "--dataset", texts, "--json", "--quiet")
    rows = json.loads(done.stdout)
    assert [row["model"] for row in rows] == ["results/four", str(shrunk)] and done.stderr == ""
    assert rows[0]["value"] == json.loads((tmp_path / "results" / "table.json").read_text())["rows"][0]["value"]


def test_a_push_that_is_refused(hub: HubServer, shrunk: Path, typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused for its recorded fidelity, before the Hub is asked anything."""
    shutil.copytree(shrunk, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["quantization_config"]["fidelity"] = {"metric": "kl", "value": 2.0}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    one_sentence(typed("push", "small", "me/small", code=1), "2 nats, above max_kl=1", "force")
    (tmp_path / "small" / "model.safetensors").write_bytes(b"")
    one_sentence(typed("push", "small", "me/small", "--force", code=1), "model.safetensors")
    assert "does not exist" in typed("push", "nowhere", "me/small", code=2).stderr
    assert hub.requests == []


ALONE = [  # command and options -> what it prints
    ("inspect SMALL --weights", "up_proj"),
    ("report SMALL page.html --force", "page.html: a page about"),
    ("evaluate SMALL --against ORIGINAL --dataset texts.txt --samples 2 --context 5 --json", '"count": 10'),
    ("verify SMALL", "all is as it was saved"),
    ("export SMALL dense --force --dtype bfloat16", "dense: an ordinary checkpoint"),
    (
        "compress ORIGINAL out --bits 5 --structure grid --trellis 8 --auto-class AutoModelForCausalLM",
        "bits per compressed weight",
    ),
]


@pytest.mark.parametrize(("line", "says"), ALONE, ids=[line.split()[0] for line, _ in ALONE])
def test_each_command_in_a_process_of_its_own(
    line: str, says: str, shrunk: Path, original: Path, texts: Path, process, tmp_path: Path
):
    for name in ("dense", "out"):  # a model stands there that --force may replace
        shutil.copytree(shrunk, tmp_path / name) if f" {name} --force" in line else None
    done = process(*line.replace("SMALL", str(shrunk)).replace("ORIGINAL", str(original)).split())
    assert says in done.stdout
    assert not list(tmp_path.glob(".*"))


def test_verify_takes_a_revision(hub: HubServer, shrunk: Path, process, tmp_path: Path):
    """The one that was whole, of a repository that has become damaged since."""
    repo = hub.repos["me/small"] = Repo()
    files = {path.name: path.read_bytes() for path in shrunk.iterdir() if path.is_file()}
    whole = repo.commit("main", files)
    repo.commit("main", files | {"model.safetensors": files["model.safetensors"][:-1]})
    env = environment(hub, tmp_path / "home")
    assert "model.safetensors" in process("verify", "me/small", env=env, code=1).stdout
    assert "all is as it was saved" in process("verify", "me/small", "--revision", whole, env=env).stdout
