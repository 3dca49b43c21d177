"""The reference: all public names, links that lead somewhere; code in documents runs, and figures in cards are kept."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_sqf
from tests.hub.conftest import hub, original, run  # noqa: F401 (fixtures)
from tests.hub.server import HubServer, Repo

ROOT = Path(__file__).parent.parent
pytest.importorskip("pdoc")
pytest.importorskip("evaluate")  # hf_sqf.report.metric is in it, too


class Page(HTMLParser):
    """The anchors and the links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.add(str(found["href"]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("docs")
    assert "$(RUN) docs/build.py" in (ROOT / "Makefile").read_text(encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = [sys.executable, str(ROOT / "docs" / "build.py"), str(folder)]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "does not resolve" not in done.stderr
    return folder


def test_every_public_name_is_in_it(built: Path):
    text = (built / "hf_sqf.html").read_text(encoding="utf-8")
    assert set(hf_sqf.__all__) <= Page(text).anchors
    for name in hf_sqf.__all__:  # with what it says about itself
        first = (inspect.getdoc(getattr(hf_sqf, name)) or "").splitlines()[0]
        assert first.split(",")[0].split("`")[0].split("(")[0] in text, name


def test_links_lead_somewhere(built: Path):
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in built.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = (file.parent / target).resolve() if target else file
            if there not in pages or (anchor and anchor not in pages[there].anchors):
                broken.append(f"{file.name}: {link}")
    assert len(pages) > 10 and not broken


@pytest.mark.parametrize("name", hf_sqf.__all__)
def test_public_names_say_what_they_take_and_what_they_raise(name: str):
    documented = getattr(hf_sqf, name)
    text = inspect.getdoc(documented) or ""
    assert len(text.splitlines()) > 1
    function = documented if inspect.isfunction(documented) else documented.__init__
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert parameter.name in text + (inspect.getdoc(function) or ""), f"{name}: {parameter.name}"


def blocks(file: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# Why the code in a document is not run by this module.
ELSEWHERE = {
    "README.md": "tests/test_readme.py runs the Python, tests/cli/test_processes.py the command line",
    "CONTRIBUTING.md": "only make targets, which tests/test_readme.py looks up",
    "SECURITY.md": "no code",
    "CHANGELOG.md": "no code",
    "recipes/README.md": "tests/cli/test_recipes.py runs the recipes it names",
    "model_cards/README.md": "no code",
}
"""And the cards that recipes produced: their code is that of the template, which tests/hub/test_card.py looks at."""


def test_code_in_every_document_is_run_or_has_a_reason():
    documents = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.md")}
    documents |= {
        path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md"))
    }
    assert documents == ELSEWHERE.keys() | {"docs/sharing.md"}
    for name, reason in ELSEWHERE.items():
        assert not blocks(ROOT / name) or name == "README.md", f"{name}: {reason}"


def test_code_about_sharing_runs(hub: HubServer, run, original: Path):  # noqa: F811
    """All blocks in order, with a tiny model on a Hub on loopback in place of the reader's."""
    repo = hub.repos["org/original"] = Repo()
    repo.commit("main", {path.name: path.read_bytes() for path in original.iterdir()})
    first = """
import hf_sqf
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

snapshot_download("org/original")
asked = hf_sqf.SQFConfig(bits=6, structure="grid")
model = AutoModelForCausalLM.from_pretrained("org/original", quantization_config=asked)
held_out_texts = ["the a of and is", "is and of a the"]
"""
    code = blocks(ROOT / "docs" / "sharing.md")
    assert len(code) == 3
    last = 'print(model.config.quantization_config.fidelity["name"])'
    done = run("\n".join([first, *code, last]))
    assert done.stdout == "my texts, held-out part\n"  # nothing before it: verify found no fault
    assert "model.safetensors" in hub.files("me/my-model-sqf")


def test_cards_say_what_their_recipe_kept():
    """Sizes, bits and cosines of model_cards/ are those of recipes/results/."""
    table = (ROOT / "recipes" / "results" / "sentence_embeddings.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 4
    for name, size, bits, cosine, lowest, on in rows:
        card = (ROOT / "model_cards" / f"all-MiniLM-L6-v2-{name}.md").read_text(encoding="utf-8")
        source, _, context, dtype = on.replace("context ", "").split(", ")
        for said in (f"**{size}**", f"mean | {cosine} |", f"worst input | {lowest} |"):
            assert said in card, (name, said)
        (said,) = re.findall(r"bits per compressed weight \| 32 \| \*\*([\d.]+)", card)
        assert float(said) == pytest.approx(float(bits), abs=1.1e-3)  # each is rounded by itself
        assert f"Measured in {dtype} on {source}" in card and f"up to {context} tokens" in card
