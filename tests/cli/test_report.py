"""hf-sqf report: one page for a browser, which says what inspect says."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_sqf import size_report
from hf_sqf.report.accounts import code_counts
from hf_sqf.report.page import page
from hf_sqf.runtime.sqf_container import Record
from hf_sqf.runtime.sqf_modules import SQFModule
from tests.cli.conftest import one_sentence

EMPTY = {"total_bytes": 0, "bits_per_weight": 0.0, "rows": [], "coverage": None, "fidelity": None}
VOID = {"meta", "br", "wbr"}


class Elements(HTMLParser):
    """Checks that elements close in the order in which they open; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    elements.close()
    assert not elements.open
    return elements


def test_page_says_what_size_report_says(shrunk: Path, typed, tmp_path: Path):
    assert json.loads(typed("report", shrunk, "page.html", "--json").stdout) == {"page": "page.html"}
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    elements = parsed(text)
    report = size_report(shrunk)
    assert f"{report.bits_per_weight:.3f}" in elements.text
    for row in report.rows:
        if row["structure"] not in ("dense", "file headers"):
            assert row["name"] in elements.text and f"{row['bytes']:,}" in elements.text
    assert "http" not in text and not elements.tags["script"] and not elements.tags["link"]
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_each_weight_is_decoded_once(shrunk: Path, typed, monkeypatch: pytest.MonkeyPatch):
    decoded, factors = [], Record.factors
    monkeypatch.setattr(Record, "factors", lambda self: decoded.append(self) or factors(self))
    typed("report", shrunk, "page.html")
    once = len(decoded)
    assert once == sum(row["matrices"] for row in size_report(shrunk).compressed_rows)


def test_codes_are_counted(shrunk: Path):
    model = AutoModelForCausalLM.from_pretrained(shrunk)
    expected: Counter[int] = Counter()
    seen = set()
    for module in model.modules():
        if isinstance(module, SQFModule) and module.weight_factors.data_ptr() not in seen:
            seen.add(module.weight_factors.data_ptr())
            for factors in module.factors():
                for term in factors.terms:
                    expected.update(term.codes.flatten().tolist())
    assert code_counts(shrunk) == expected


def test_names_are_escaped_and_rare_codes_share_a_bar():
    elements = parsed(page("<a & b>", EMPTY, Counter({0: 5, 20: 2, -30: 3})))
    assert "<a & b>" in elements.text
    assert "≥ 8" in elements.text and "20.00 %" in elements.text and "30.00 %" in elements.text


def test_a_model_of_codebooks_alone():
    assert "no codes" in parsed(page("m", EMPTY, Counter())).text


def test_what_stands_there_stays(shrunk: Path, typed, tmp_path: Path):
    kept = tmp_path / "page.html"
    kept.write_text("mine")
    one_sentence(typed("report", shrunk, kept, code=1), "--force")
    assert kept.read_text() == "mine"
    typed("report", shrunk, kept, "--force")
    assert kept.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["page.txt", "page"])
def test_another_ending_is_refused(shrunk: Path, typed, name: str):
    one_sentence(typed("report", shrunk, name, code=1), ".html")
