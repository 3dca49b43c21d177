"""Code integer arrays with the entropy coder of NNCodec (ISO/IEC 15938-17): run by codec_benchmark.py, elsewhere.

    python recipes/codec_nncodec.py ARRAYS.npz

Prints the bytes of each array as JSON. Takes the package's compiled coder alone, because the rest of it wants the
torchvision of its torch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

UNARY_LENGTH = 11  # the package's default, and optimised starts of its contexts
OPTIMIZE = 1


def coder() -> object:
    """Return the module deepCABAC, without importing the package around it."""
    package = importlib.util.find_spec("nncodec")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("nncodec is not installed")
    file = next(Path(package.submodule_search_locations[0]).glob("extensions/deepCABAC*.so"))
    spec = importlib.util.spec_from_file_location("deepCABAC", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Code the arrays of the file that the command line names."""
    module = coder()
    sizes = {}
    with np.load(sys.argv[1]) as arrays:
        for name in arrays.files:
            codes = np.ascontiguousarray(arrays[name], np.int32)
            encoder = module.Encoder()  # type: ignore[attr-defined]
            encoder.initCtxModels(UNARY_LENGTH, OPTIMIZE)
            rows = np.zeros(len(codes), np.int32)
            off = module.HdspMode.AlwaysOff, np.zeros(2, np.int8)  # type: ignore[attr-defined]
            encoder.encodeLayer(codes, 0, 0, 0, 0, 0, rows, *off, 0, 0)
            sizes[name] = int(encoder.finish().size)
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
