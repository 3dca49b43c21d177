"""The reference, from docstrings: ``make docs``, or ``python docs/build.py [FOLDER]``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pdoc

# What pdoc does not find by itself: packages that hf_sqf.__all__ does not name.
REFERENCE = ("hf_sqf", "hf_sqf.runtime", "hf_sqf.training", "hf_sqf.report", "hf_sqf.hub")


def main(folder: Path) -> None:
    """Write the pages into a folder."""
    for module in map(import_module, REFERENCE):
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))  # pdoc looks for what is there; some comes when asked for
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*REFERENCE, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/docs"))
