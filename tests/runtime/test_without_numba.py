"""Without numba the runtime reads and writes the same bytes."""

import subprocess
import sys
from pathlib import Path

import hf_sqf

CHILD = """
import json, sys
from pathlib import Path
sys.modules["numba"] = None  # importing it fails from here on
sys.path.insert(0, sys.argv[1])
import numpy as np
from runtime.sqf_codec import decode_integers, encode_integers  # alone, as it travels with models
from runtime.sqf_container import pack, unpack
from runtime.sqf_decoders import decode
from runtime.sqf_indices import decode_indices, encode_indices
from runtime.sqf_jit import HAVE_NUMBA

assert not HAVE_NUMBA
names = "arrays", "indices", "weights"
vectors = {name: json.loads((Path(sys.argv[2]) / f"{name}.json").read_text("utf-8")) for name in names}
for vector in vectors["arrays"]:
    values = np.array(vector["values"], np.int64).reshape(vector["shape"])
    context = vector["row_prior"], vector["col_prior"], vector["trellis"]
    decoded = decode_integers(bytes.fromhex(vector["bytes"]), values.shape, *context)
    assert np.array_equal(decoded, values), vector["name"]
    assert encode_integers(values, *context).hex() == vector["bytes"], vector["name"]
for vector in vectors["indices"]:
    values = np.array(vector["values"], np.int64)
    assert np.array_equal(decode_indices(bytes.fromhex(vector["bytes"]), len(values), vector["atoms"]), values)
    assert encode_indices(values, vector["atoms"]).hex() == vector["bytes"], vector["name"]
for vector in vectors["weights"]:
    data = bytes.fromhex(vector["bytes"])
    assert pack(unpack(data)).numpy().tobytes() == data, vector["name"]
try:
    decode_integers(bytes.fromhex(vectors["arrays"][4]["bytes"]), vectors["arrays"][4]["shape"], backend="numba")
except ValueError as error:
    print(error)
"""


def test_the_same_bytes_without_numba():
    package = Path(hf_sqf.__file__).parent
    vectors = Path(__file__).parents[1] / "vectors"
    command = [sys.executable, "-c", CHILD, str(package), str(vectors)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs the package numba" in done.stdout
