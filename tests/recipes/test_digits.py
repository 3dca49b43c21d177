"""recipes/digits.py: trains, compresses, fine-tunes and writes its table, here with a few steps."""

import re
from pathlib import Path

import pytest

from tests.conftest import module_of

pytest.importorskip("sklearn")
KEPT = Path(__file__).parent.parent.parent / "recipes" / "results" / "digits.txt"


def rows(table: str) -> list[list[str]]:
    """Return model, structure, bits, kB, and means with least and most."""
    return [re.sub(r"[()]|to ", "", line).split() for line in table.splitlines() if re.match(r"(resnet|vit) ", line)]


def test_a_short_run(tmp_path: Path):
    kept = tmp_path / "digits.txt"
    arguments = ["--models", "vit", "--structures", "grid", "vq", "--bits", "3", "--steps", "30", "--tuning", "4"]
    assert module_of("recipes/digits.py").main([*arguments, "--seeds", "1", "--keep", str(kept)]) == 0
    dense, grid, vq = rows(kept.read_text(encoding="utf-8"))
    assert dense[:2] == ["vit", "dense"] and 0.2 < float(dense[-1]) <= 1.0  # ten classes
    for row, structure in ((grid, "grid"), (vq, "vq")):
        assert row[1] == structure and 2.5 < float(row[2]) < 3.1 and float(row[3]) < float(dense[3]) / 5
        assert len(row) == 10 and all(0.0 < float(accuracy) <= 1.0 for accuracy in row[4:])


def test_pictures_are_not_shared():
    trained_on, held_out = module_of("recipes/digits.py").pictures()
    assert (len(trained_on), len(held_out)) == (1300, 497)
    seen = {row["pixel_values"].numpy().tobytes() for row in trained_on}
    assert not any(row["pixel_values"].numpy().tobytes() in seen for row in held_out)


def test_the_kept_table_is_whole():
    """Every structure at every rate, on both models."""
    found = rows(KEPT.read_text(encoding="utf-8"))
    assert len(found) == 2 * (1 + 3 * 4)
    for model in ("resnet", "vit"):
        mine = [row for row in found if row[0] == model]
        assert mine[0][1] == "dense"
        assert [row[1] for row in mine[1:]] == ["grid", "pgd", "svd", "vq"] * 3
        for row, asked in zip(mine[1:], [4.0] * 4 + [2.0] * 4 + [1.0] * 4, strict=True):
            assert float(row[2]) == pytest.approx(asked, rel=0.05)
