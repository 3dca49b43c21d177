"""Tensors that lie in files without a name, and memory that is given back."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from hf_sqf.compress.mapped import on_disk, release

pytestmark = pytest.mark.skipif(os.name != "posix", reason="an ordinary copy elsewhere")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_copy_on_disk_is_a_tensor_like_any_other(temporary):
    tensor = torch.randn(300, 200)
    copy = on_disk(tensor)
    assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
    assert list(temporary.iterdir()) == []  # the file goes with the tensor
    release(copy.add_(tensor))
    assert torch.equal(copy, 2 * tensor)
    assert torch.equal(on_disk(torch.empty(0, 3)), torch.empty(0, 3))


def test_pages_that_are_released_need_no_memory(temporary):
    pagemap = Path("/proc/self/smaps")
    if not pagemap.exists():
        pytest.skip("needs Linux")

    def resident() -> int:
        """Kilobytes of the copy that are in memory."""
        lines = iter(pagemap.read_text().splitlines())
        found = next(line for line in lines if str(temporary) in line)
        assert found.endswith("(deleted)")
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    copy = on_disk(torch.ones(1 << 20))
    assert resident() == 0
    copy.add_(1.0)
    assert resident() == 4096
    release(copy)
    assert resident() == 0 and float(copy.sum()) == 2.0 * (1 << 20)


def test_a_full_disk_is_an_error(temporary, monkeypatch):
    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        on_disk(torch.ones(5))
    assert list(temporary.iterdir()) == []
