"""The reference is built from docstrings: every public name is in it, and every link within it leads somewhere."""

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_sqf

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
