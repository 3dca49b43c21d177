"""Files are written whole or not at all."""

from pathlib import Path

import pytest

from hf_sqf.report.writing import whole, whole_file


def test_a_file_is_as_said_and_alone(tmp_path: Path):
    for text in ("old", "nëu"):
        whole_file(tmp_path / "new" / "page.html", text)
    assert [(file.name, file.read_text("utf-8")) for file in (tmp_path / "new").iterdir()] == [("page.html", "nëu")]


def test_what_stood_there_stays_after_an_error(tmp_path: Path):
    file = tmp_path / "picture.svg"
    file.write_text("old")

    def fail(path: Path) -> None:
        assert path.suffix == ".svg"
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), whole(file) as part:
        fail(part)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("picture.svg", "old")]
