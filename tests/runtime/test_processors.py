"""Kernels compile and are right for processors with fewer instructions than the one that the tests run on."""

import os
import platform
import subprocess
import sys

import pytest

CHILD = """
import torch
from hf_sqf.runtime import sqf_integers
from hf_sqf.runtime.sqf_factors import Factors, Term
from hf_sqf.runtime.sqf_resident import lay_out, resident_matrices
from hf_sqf.runtime.sqf_vectors import BYTE_PRODUCTS, LANES

g = torch.Generator().manual_seed(0)
codes = (2.0 * torch.randn(37, 130, generator=g)).round().to(torch.int8)
steps, rows = torch.zeros(130, dtype=torch.int32), torch.zeros(37, dtype=torch.int32)
factors = Factors((37, 130), "grid", (Term(codes, 0, steps, rows),))
for runtime in ("int4", "int8"):
    matrix = resident_matrices(lay_out([factors], runtime))[0]
    for batch in (1, 3, 8, 20):
        x = torch.randn(batch, 130, generator=g)
        torch.testing.assert_close(matrix.multiply(x), x @ factors.dense().T, rtol=0.0, atol=1e-3)
    sqf_integers._BFLOAT16_ROWS = 20
    x = x.bfloat16()
    torch.testing.assert_close(matrix.multiply(x), x @ factors.dense().bfloat16().T)
print(LANES, BYTE_PRODUCTS)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="processors of other kinds have other names")
@pytest.mark.parametrize(
    ("features", "found"),
    [pytest.param("", "8 0", marks=pytest.mark.slow), ("+avx,+fma", "8 0"), ("+avx,+avx2,+fma", "8 32")],
    ids=["plain", "avx", "avx2"],
)
def test_a_processor_with_fewer_instructions(features, found, tmp_path):
    environment = os.environ | {
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == found
