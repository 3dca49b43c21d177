"""Imports point one way, and the runtime folder stands on its own.

    cli -> hub -> report, training -> compress -> runtime

``hf_sqf/__init__.py`` collects the public names and stands above all; nothing in the package imports it. What can be
typed on the command line is declared beside the package, in ``hf_sqf_command``, whose commands import from above.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_sqf"
RUNTIME = PACKAGE / "runtime"
RANK = {"runtime": 0, "compress": 1, "training": 2, "report": 2, "hub": 3, "cli": 4, "__init__": 5, "__main__": 5}
TRAVELS_WITH = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "accelerate"}
IF_PRESENT = {"numba", "llvmlite"}  # the second comes with the first


def imported(source: str, package: str) -> Iterator[tuple[str, ast.Import | ast.ImportFrom, bool]]:
    """Yield (absolute dotted name, statement, an except ImportError surrounds it) of every import in a module."""

    def walk(node: ast.AST, guarded: bool) -> Iterator[tuple[str, ast.Import | ast.ImportFrom, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node, guarded
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if module in (base, "hf_sqf"):  # from . import x, from hf_sqf import x: x may be a module
                for alias in node.names:
                    yield f"{module}.{alias.name}", node, guarded
            else:
                yield module, node, guarded
        elif isinstance(node, ast.Try):
            caught = {n.id for h in node.handlers if h.type for n in ast.walk(h.type) if isinstance(n, ast.Name)}
            for child in node.body:
                yield from walk(child, guarded or bool(caught & {"ImportError", "ModuleNotFoundError"}))
            for child in [*node.handlers, *node.orelse, *node.finalbody]:
                yield from walk(child, guarded)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, guarded)

    yield from walk(ast.parse(source), False)


def part_of(dotted: str) -> str:
    """Return which part of the package a dotted name belongs to; what is no part is a name in its ``__init__``."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def direction_faults(source: str, package: str, part: str) -> list[str]:
    """Return the imports of a module in ``part`` that point upwards or sideways."""
    faults = []
    for name, node, _ in imported(source, package):
        if name.split(".")[0] != "hf_sqf":
            continue
        target = part_of(name)
        if target != part and RANK[target] >= RANK[part]:
            faults.append(f"line {node.lineno}: {part} imports {name}")
    return faults


def runtime_faults(source: str) -> list[str]:
    """Return the imports that a travelling file must not have.

    transformers copies a file along with a model only where it is named in exactly the form ``from .name import x``.
    """
    faults = []
    for name, node, guarded in imported(source, "hf_sqf.runtime"):
        root = name.split(".")[0]
        if isinstance(node, ast.ImportFrom) and node.level:
            good = node.level == 1 and node.module and node.module.startswith("sqf_") and "." not in node.module
        else:
            good = root in TRAVELS_WITH or root in sys.stdlib_module_names or (root in IF_PRESENT and guarded)
        if not good:
            faults.append(f"line {node.lineno}: {name}")
    return faults


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_imports_point_one_way(path: Path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in RANK, f"{part}: a new part of the package needs its place in the order of imports"
    package = ".".join(("hf_sqf", *path.relative_to(PACKAGE).parent.parts))
    assert direction_faults(path.read_text(encoding="utf-8"), package, part) == []


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=relative)
def test_runtime_imports_nothing_outside_itself(path: Path):
    assert path.parent == RUNTIME, "runtime/ is flat: its files lie side by side in a model's folder"
    assert path.name == "__init__.py" or path.name.startswith("sqf_")
    assert runtime_faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source", "count"),
    [
        ("compress", "from ..runtime.sqf_config import SQFConfig", 0),
        ("compress", "from hf_sqf.runtime import sqf_config\nfrom .grid import round_in_metric", 0),
        ("compress", "from ..training import callback", 1),
        ("compress", "from .. import training", 1),
        ("compress", "from hf_sqf import SQFConfig", 1),
        ("compress", "import hf_sqf", 1),
        ("compress", "def f():\n    import hf_sqf.cli", 1),
        ("report", "from ..hub import card", 1),
        ("cli", "from ..compress import model\nfrom ..hub import card\nfrom .folders import whole_folder", 0),
        ("cli", "from .. import size_report", 1),
        ("hub", "from ..cli import originals", 1),
        (
            "training",
            "from ..compress.rate import term_bits\nfrom ..runtime.sqf_factors import Term\nfrom . import factors",
            0,
        ),
        ("training", "from ..report import fidelity", 1),
        ("training", "from ..hub import card", 1),
        ("runtime", "from ..training import callback", 1),
    ],
)
def test_wrong_directions_are_found(part: str, source: str, count: int):
    assert len(direction_faults(source, f"hf_sqf.{part}", part)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import math\nimport torch.nn as nn\nfrom .sqf_factors import Factors", 0),
        ("try:\n    import numba\nexcept ImportError:\n    numba = None", 0),
        ("import numba", 1),
        ("try:\n    import numba\nexcept ValueError:\n    pass", 1),
        ("try:\n    pass\nexcept ImportError:\n    import numba", 1),
        ("from . import sqf_factors", 1),
        ("from .sqf_factors.inner import x", 1),
        ("from .other import x", 1),
        ("from ..compress import model", 1),
        ("from hf_sqf.runtime.sqf_factors import Factors", 1),
        ("import scipy", 1),
    ],
)
def test_wrong_runtime_imports_are_found(source: str, count: int):
    assert len(runtime_faults(source)) == count


@pytest.mark.parametrize("path", [p for p in modules() if p.relative_to(PACKAGE).parts[0] != "cli"], ids=relative)
def test_only_the_command_line_needs_its_libraries(path: Path):
    package = ".".join(("hf_sqf", *path.relative_to(PACKAGE).parent.parts))
    roots = {name.split(".")[0] for name, _, _ in imported(path.read_text(encoding="utf-8"), package)}
    allowed = {"matplotlib"} if path == PACKAGE / "report" / "plots.py" else set()
    assert not roots & {"typer", "rich", "yaml", "matplotlib"} - allowed


def test_help_waits_for_no_heavy_import():
    """Whatever stands at the top of the command line's module is imported for ``hf-sqf --help``."""
    tree = ast.parse((PACKAGE.parent / "hf_sqf_command.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {name.split(".")[0] for name, _, _ in imported(ast.unparse(tree), "")}
    assert roots - sys.stdlib_module_names == {"typer"}


def test_runtime_runs_from_a_copy(tmp_path: Path):
    """The folder alone, under another name, where hf_sqf and numba cannot be imported."""
    shutil.copytree(RUNTIME, tmp_path / "travelled", ignore=shutil.ignore_patterns("__pycache__"))
    names = sorted(p.stem for p in RUNTIME.glob("sqf_*.py"))
    program = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(('hf_sqf', 'numba', 'llvmlite')))  # None: cannot be imported\n"
        "for name in sys.argv[1:]:\n"
        "    print(importlib.import_module('travelled.' + name).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"travelled.{name}" for name in names]
