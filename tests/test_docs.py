"""The reference is built from docstrings: every public name is in it, and every link within it leads somewhere."""

import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_sqf

MAKEFILE = Path(__file__).parent.parent / "Makefile"
pdoc = pytest.importorskip("pdoc")


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
    folder = tmp_path_factory.mktemp("docs")
    pdoc.render.configure(docformat="google")
    (named,) = re.findall(r"^REFERENCE := (.*)$", MAKEFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    pdoc.pdoc(*named.split(), output_directory=folder)
    return folder


def test_every_public_name_is_in_it(built: Path):
    anchors = Page((built / "hf_sqf.html").read_text(encoding="utf-8")).anchors
    assert set(hf_sqf.__all__) <= anchors
    for module, lazy in (("callback", "SQFCallback"), ("distillation", "distillation_loss")):
        page = (built / "hf_sqf" / "training" / f"{module}.html").read_text(encoding="utf-8")
        assert lazy in Page(page).anchors


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
