"""What recipes/compare_peers.py keeps: one table of several runs, and sides that lack a figure."""

from typing import Any

import pytest

from tests.conftest import module_of

NEW, OLD, FAILED = "HQQ, 4 bits", "torchao int8", "llama.cpp"


def record(date: str, sizes: dict[str, float], **failed: str) -> dict[str, Any]:
    rows = {name: {"side": name, "MB": size} for name, size in sizes.items()}
    runs = [{"date": date, "versions": {"torch": "1"}, "sides": [*sizes, *failed]}]
    return {"measured": "alike", "runs": runs, "rows": rows, "failed": failed}


def test_runs_are_joined_in_one_table():
    recipe = module_of("recipes/compare_peers.py")
    first = recipe.joined(None, record("monday", {recipe.BASE: 4.0, OLD: 2.0, NEW: 1.0}))
    second = record("tuesday", {recipe.BASE: 5.0, NEW: 1.5}, **{FAILED: "no such module"})
    second["rows"][NEW]["tokens/s at 1"] = 3.0
    both = recipe.joined(first, second)
    # In the order of the sides; what was measured again is new, and dense stays that of the first run.
    assert [(row["side"], row["MB"]) for row in both["rows"]] == [(recipe.BASE, 4.0), (NEW, 1.5), (OLD, 2.0)]
    assert [(run["date"], run["sides"]) for run in both["runs"]] == [
        ("monday", [recipe.BASE, OLD]), ("tuesday", [recipe.BASE, NEW, FAILED]),
    ]  # fmt: skip
    text = recipe.as_text(both)
    assert "monday: torch 1 (dense float32; torchao int8)" in text and "llama.cpp: did not run: no such module" in text
    assert text.count("3.00") == 1  # and nothing where others have no speed
    third = recipe.joined(both, record("wednesday", {recipe.BASE: 4.0, FAILED: 0.5}))
    assert third["failed"] == {} and len(third["rows"]) == 4


@pytest.mark.parametrize(("errors", "says"), [("a\nValueError: no\n\n", "ValueError: no"), ("", "killed")])
def test_an_error_in_a_line(errors: str, says: str):
    assert module_of("recipes/compare_peers.py").last_line(errors) == says
