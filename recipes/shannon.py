"""How far from Shannon's limit: coded bytes of Gaussian and Laplacian samples, scalar and along a trellis.

    python recipes/shannon.py [--rows 2000] [--columns 1000]

For each rate the noise step is sought at which the coded bytes have that rate; the gap is the rate above what the
same mean squared error needs at least: ``R(D) = h - log2(2 pi e D) / 2`` with h the differential entropy, which is the
rate-distortion function of the Gaussian and Shannon's lower bound of the Laplacian. Writes results/shannon.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_sqf.compress.dependent import solve_dependent
from hf_sqf.compress.grid import solve_grid
from hf_sqf.compress.metric import Metric
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_trellis import TRELLIS_STATES

RATES = (1.5, 2.0, 2.5, 3.0, 4.0)
ENTROPIES = {"gaussian": 0.5 * math.log2(2 * math.pi * math.e), "laplacian": math.log2(math.e * math.sqrt(2))}
"""Differential entropies at unit variance, in bits."""
_TRIALS = 12


def coded(sample: Tensor, step: float, states: int) -> tuple[float, float]:
    """Return bits per sample, from the coded bytes, and mean squared error."""
    metric = Metric()
    dependent = solve_dependent(sample, metric, step, states) if states else None
    found = dependent or solve_grid(sample, metric, step, sparse=True)  # scalar: with the best dead zone
    return 8.0 * pack([found.factors]).numel() / sample.numel(), found.distortion / sample.numel()


def at_rate(sample: Tensor, rate: float, states: int) -> tuple[float, float]:
    """Return rate and error at a noise step whose coded bytes are within 0.02 bit of ``rate``."""
    log_step = 2.05 - rate
    found = coded(sample, 2.0**log_step, states)
    for _ in range(_TRIALS):
        if abs(found[0] - rate) <= 0.02:
            return found
        log_step += 0.8 * (found[0] - rate)
        found = coded(sample, 2.0**log_step, states)
    raise RuntimeError(f"no noise step found for {rate} bits")


def main() -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--columns", type=int, default=1000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = options.rows, options.columns
    samples = {"gaussian": rng.standard_normal(shape), "laplacian": rng.laplace(scale=math.sqrt(0.5), size=shape)}
    table = []
    for name, values in samples.items():
        sample = torch.from_numpy(values).float()
        variance = float(sample.double().square().mean())
        for states in (0, *TRELLIS_STATES):
            gaps, began = {}, time.perf_counter()
            for rate in RATES:
                bits, error = at_rate(sample, rate, states)
                limit = ENTROPIES[name] - 0.5 * math.log2(2 * math.pi * math.e * error / variance)
                gaps[rate] = round(bits - limit, 4)
            row = {"source": name, "states": states, "gap": gaps, "seconds": round(time.perf_counter() - began, 1)}
            table.append(row)
            label = f"{states} states" if states else "scalar"
            print(f"{name:10} {label:10}", *(f"{rate} bits: {gap:7.4f}  " for rate, gap in gaps.items()), flush=True)
    result = {"samples": shape, "machine": torch.__config__.parallel_info().split("\n")[1].strip(), "table": table}
    path = Path(__file__).parent / "results" / "shannon.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
