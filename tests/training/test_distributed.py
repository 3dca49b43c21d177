"""Two processes: the same weights on both after every run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sqf.runtime.sqf_modules import SUFFIX
from tests.training.conftest import compressed


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "latent", "hard"])
def test_ranks_end_with_the_same_weights(mode: str, tmp_path: Path):
    program = Path(__file__).with_name("distributed.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(program), str(tmp_path), mode], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"{mode}-{rank}").read_text() for rank in (0, 1))
    assert first == second
    saved = load_file(tmp_path / "checkpoint-4/model.safetensors")
    start = compressed("llama_tied", trellis=8 if mode == "latent" else None).state_dict()
    packed = [name for name in saved if name.endswith(SUFFIX)]
    assert packed and any(not torch.equal(saved[name], start[name]) for name in packed)
