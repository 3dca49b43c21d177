"""The test vectors decode to what they say, with every decoder; and encoding gives their bytes again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sqf.runtime.sqf_codec import decode_integers, encode_integers
from hf_sqf.runtime.sqf_container import pack, unpack
from hf_sqf.runtime.sqf_decoders import BACKENDS
from hf_sqf.runtime.sqf_factors import Factors, Term
from hf_sqf.runtime.sqf_indices import decode_indices, encode_indices

FOLDER = Path(__file__).parents[1] / "vectors"
DECODERS = [name for name in BACKENDS if name != "auto"]


def vectors(name):
    return [pytest.param(v, id=v["name"]) for v in json.loads((FOLDER / f"{name}.json").read_text("utf-8"))]


@pytest.mark.parametrize("vector", vectors("arrays"))
def test_arrays(vector):
    values = np.array(vector["values"], np.int64).reshape(vector["shape"])
    context = vector["row_prior"], vector["col_prior"], vector["trellis"]
    data = bytes.fromhex(vector["bytes"])
    for backend in DECODERS:
        assert np.array_equal(decode_integers(data, values.shape, *context, backend), values)
    for compiled in (True, False):
        assert encode_integers(values, *context, compiled) == data


@pytest.mark.parametrize("vector", vectors("indices"))
def test_indices(vector):
    values, data = np.array(vector["values"], np.int64), bytes.fromhex(vector["bytes"])
    for backend in DECODERS:
        assert np.array_equal(decode_indices(data, len(values), vector["atoms"], backend), values)
    assert encode_indices(values, vector["atoms"]) == data


@pytest.mark.parametrize("vector", vectors("weights"))
def test_weights(vector, same_factors):
    made = [
        Factors(
            tuple(matrix["shape"]),
            matrix["structure"],
            tuple(
                Term(
                    **{key: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for key, v in term.items()}
                )
                for term in matrix["terms"]
            ),
        )
        for matrix in vector["matrices"]
    ]
    data = bytes.fromhex(vector["bytes"])
    found = unpack(data)
    assert len(found) == len(made)
    assert all(same_factors(a, b) for a, b in zip(found, made, strict=True))
    assert pack(made).numpy().tobytes() == data
