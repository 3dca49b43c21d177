"""Memory that is given back while a model is compressed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sqf.compress.mapped import release

SMAPS = Path("/proc/self/smaps")


def resident(path: Path) -> int:
    """Return the kilobytes of a mapped file that are in memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0] and ":" not in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")
def test_pages_that_are_released_need_no_memory_and_come_back(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(1 << 20)}, path)
    mapped = load_file(path)["w"]
    assert float(mapped.sum()) == 1 << 20 and resident(path) >= 4096
    release(mapped)
    assert resident(path) < 100  # the page shared with the header stays
    assert float(mapped.sum()) == 1 << 20


def test_what_is_not_mapped_is_left_alone():
    tensor = torch.arange(1 << 16)
    release(tensor)
    assert torch.equal(tensor, torch.arange(1 << 16))
