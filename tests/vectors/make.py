"""Write the test vectors, for decoders in other languages: arrays and weights with the bytes that they become.

    python tests/vectors/make.py

The bytes change only with the format's version; ``tests/runtime/test_vectors.py`` holds that. Each file is JSON:
``arrays.json`` lists integer arrays (``shape``, ``values`` row by row, ``trellis``, priors or null, ``bytes`` in
hexadecimal), ``indices.json`` sequences of indices, ``weights.json`` whole weights with their terms, decoded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_sqf.runtime.sqf_codec import encode_integers
from hf_sqf.runtime.sqf_container import pack
from hf_sqf.runtime.sqf_factors import Factors, Term
from hf_sqf.runtime.sqf_indices import encode_indices
from hf_sqf.runtime.sqf_trellis import machine

FOLDER = Path(__file__).parent


def drawn(seed: int, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Return integers of about a given mean magnitude, the same with any version of numpy."""
    state, out = np.uint64(seed * 2654435761 + 1), []
    for _ in range(int(np.prod(shape))):
        value = 0.0
        for _ in range(4):  # the sum of four uniforms, from a 64-bit linear congruence
            state = np.uint64((int(state) * 6364136223846793005 + 1442695040888963407) % (1 << 64))
            value += float(state >> np.uint64(40)) / (1 << 24) - 0.5
        out.append(round(value * scale * 2.2))
    return np.array(out, np.int32).reshape(shape)


def arrays() -> list[dict[str, Any]]:
    """Return the vectors of integer arrays: one for each feature of the format."""
    rows, cols = drawn(1, (12,), 4), drawn(2, (30,), 4)
    scaled = np.rint(drawn(3, (12, 30), 40) * 2.0 ** (-(rows[:, None] + cols) / 4) / 10).astype(np.int32)
    outliers = drawn(4, (20, 20), 1.5)
    outliers[3, 5], outliers[17, 0] = 900, -70_000
    varied = np.rint(drawn(5, (60, 40), 30) * 2.0 ** (drawn(6, (60, 1), 1) - 3)).astype(np.int32)
    cases: list[tuple[str, np.ndarray, int, Any, Any]] = [
        ("empty", np.zeros((0, 4), np.int32), 0, None, None),
        ("constant", np.full((5, 3), -9, np.int32), 0, None, None),
        ("one symbol", np.array([[1, 0]], np.int32), 0, None, None),
        ("vector with an offset", drawn(7, (1, 50), 9) + 1000, 0, None, None),
        ("one lane", drawn(8, (12, 30), 1.5), 0, None, None),
        ("lanes with a tail", drawn(9, (150, 150), 3), 0, None, None),
        ("spreads of rows", varied, 0, None, None),
        ("priors", scaled, 0, rows.tolist(), cols.tolist()),
        ("escapes", outliers, 0, None, None),
        ("low bits", drawn(10, (20, 30), 4000), 0, None, None),
        ("all of 32 bits", np.array([[-(1 << 31), (1 << 31) - 1], [0, -1]]), 0, None, None),
    ]
    for states, scale in ((4, 1.5), (8, 1.5), (8, 800.0)):
        codes = drawn(11, (40, 25), scale)
        next_state, grid = machine(states)
        points, column = np.empty_like(codes), np.zeros(codes.shape[1], np.int64)
        for i, k in enumerate(codes):
            points[i] = 2 * k - grid[column] * np.sign(k)
            column = next_state[column, k & 1]
        cases.append((f"{states} states, magnitude {scale:g}", points, states, None, None))
    return [
        {
            "name": name,
            "shape": list(values.shape),
            "trellis": trellis,
            "row_prior": row_prior,
            "col_prior": col_prior,
            "values": values.reshape(-1).tolist(),
            "bytes": encode_integers(values, row_prior, col_prior, trellis).hex(),
        }
        for name, values, trellis, row_prior, col_prior in cases
    ]


def indices() -> list[dict[str, Any]]:
    """Return the vectors of sequences of indices."""
    falling = np.abs(drawn(12, (400,), 6))
    cases = [("equal", falling * 0, 1), ("table", falling % 20, 20), ("flat", np.arange(90) * 7 % 30, 30)]
    cases.append(("low bits", np.abs(drawn(13, (200,), 200)) % 1000, 1000))
    return [
        {"name": name, "atoms": atoms, "values": values.tolist(), "bytes": encode_indices(values, atoms).hex()}
        for name, values, atoms in cases
    ]


def weights() -> list[dict[str, Any]]:
    """Return the vectors of whole weights."""

    def tensor(seed: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.from_numpy(drawn(seed, shape, scale))

    one = torch.zeros(1, dtype=torch.int32)
    grid = Term(tensor(20, (8, 10), 1.5), -30_000, tensor(21, (10,), 9), tensor(22, (8,), 4))
    low_rank = Term(tensor(23, (8, 2), 20), -9000, tensor(24, (2,), 2), tensor(25, (8,), 3), tensor(26, (2, 10), 50), 1)
    chosen = torch.from_numpy(np.abs(drawn(27, (24,), 3)) % 5)
    codebook = Term(chosen, -4096, tensor(28, (5,), 1), one, tensor(29, (5, 4), 20), 1, one_hot=True)
    cases = [
        ("grid", [Factors((8, 10), "grid", (grid,))]),
        ("sum", [Factors((8, 10), "svd+grid", (low_rank, grid))]),
        ("blocks", [Factors((8, 10), "vq", (codebook,))]),
        ("experts", [Factors((8, 10), "grid", (grid,)), Factors((8, 10), "svd", (low_rank,))]),
    ]
    return [
        {
            "name": name,
            "matrices": [
                {
                    "shape": list(factors.shape),
                    "structure": factors.structure,
                    "terms": [
                        {
                            "scale": term.scale,
                            "step_resolution": term.step_resolution,
                            "row_resolution": term.row_resolution,
                            "one_hot": term.one_hot,
                            "trellis": term.trellis,
                            "codes": term.codes.tolist(),
                            "steps": term.steps.tolist(),
                            "rows": term.rows.tolist(),
                            "atoms": None if term.atoms is None else term.atoms.tolist(),
                        }
                        for term in factors.terms
                    ],
                }
                for factors in records
            ],
            "bytes": pack(records).numpy().tobytes().hex(),
        }
        for name, records in cases
    ]


def main() -> None:
    """Write the three files."""
    for name, made in (("arrays", arrays()), ("indices", indices()), ("weights", weights())):
        text = "[\n" + ",\n".join(json.dumps(vector) for vector in made) + "\n]\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
