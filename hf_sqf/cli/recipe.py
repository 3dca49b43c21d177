"""``hf-sqf run``: compressions and their evaluations, named in one YAML file."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..hub.card import package_version
from ..runtime.sqf_config import SQFConfig
from .compressing import compress, sqf_config
from .folders import refuse_overwriting
from .measuring import Row, evaluate
from .originals import auto_class_for, ordinary_config
from .showing import markdown

_OPTIONS = {f.name for f in fields(SQFConfig)} - {
    "quant_method",
    "coverage",
    "fidelity",
    "format_version",
    "statistics",
}
_EVALUATION = {"dataset", "samples", "context"}
_PACKAGES = ("torch", "transformers", "numba")


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        model: folder or id on the Hub.
        out: folder for the results: a model a compression, ``table.md``, ``table.json``, and the models' ``cards``.
        compressions: each the fields of an SQFConfig, and a ``name``, which its folder gets.
        evaluations: each ``dataset`` (a file of texts; without, prose that comes with Python), ``samples`` and
            ``context``. The first is written into the cards.
        dataset: calibration data of all compressions that name none: a file, an id on the Hub, or ``self``.
        dtype: that the weights are loaded in.
        auto_class: that loads the model; by default told from its config.
    """

    model: str
    out: str
    compressions: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    dataset: str | None = None
    dtype: str = "auto"
    auto_class: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("compressions", _OPTIONS | {"name"}), ("evaluations", _EVALUATION)):
            entries = getattr(self, name)
            if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{name} must be a list of options, got {entries!r:.60}")
            for entry in entries:
                _refuse_unknown(entry, known, f"{name} of a recipe")
        for name in ("model", "out", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        names = self.names()
        if len(set(names)) < len(names):
            raise ValueError(f"compressions need different names, got {', '.join(names)}")
        if odd := [name for name in names if not name or name.startswith(".") or "/" in name or "\\" in name]:
            raise ValueError(f"{odd[0]!r} cannot be the name of a compression's folder")

    def names(self) -> list[str]:
        """Return the name of each compression, which is that of its folder."""
        return [
            str(entry.get("name") or entry.get("target_size") or f"{entry.get('bits', SQFConfig.bits):g}-bit")
            for entry in self.compressions
        ]

    def configs(self) -> list[SQFConfig]:
        """Return what each compression asks for."""
        found = []
        for entry in self.compressions:
            options = {"dataset": self.dataset, **entry}
            options.pop("name", None)
            found.append(sqf_config(**options))
        return found


def read_recipe(file: Path, settings: dict[str, str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        file: of YAML.
        settings: key -> value (YAML, too) in place of what the file says.

    Raises:
        ValueError: it is no YAML, a key is unknown or missing, or a value does not fit.
    """
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        said = (
            said if not isinstance(said, dict) else said | {k: yaml.safe_load(v) for k, v in (settings or {}).items()}
        )
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: " + " ".join(str(error).split())) from error
    if not isinstance(said, dict):
        raise ValueError(f"{file} must hold keys and values, as a recipe does")
    _refuse_unknown(said, {f.name for f in fields(Recipe)}, str(file))
    if missing := [name for name in ("model", "out", "compressions") if name not in said]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return Recipe(**said)


def run(recipe: Recipe, force: bool = False) -> list[Row]:
    """Make all models of a recipe, measure them, and write tables and cards into its folder.

    Returns:
        The rows of the tables: each compression, measured in each evaluation.

    Raises:
        FileExistsError: a model's folder is not empty.
        ValueError: see :func:`hf_sqf.cli.compressing.compress` and :func:`hf_sqf.cli.measuring.evaluate`.
    """
    out = Path(recipe.out)
    configs, folders = recipe.configs(), [out / name for name in recipe.names()]
    for folder in folders:  # before any work
        refuse_overwriting(folder, force, recipe.model)
    auto_class_for(ordinary_config(recipe.model), recipe.auto_class)
    for folder, config in zip(folders, configs, strict=True):
        compress(recipe.model, folder, config, auto_class=recipe.auto_class, dtype=recipe.dtype, force=force)
    rows: list[Row] = []
    for number, asked in enumerate(recipe.evaluations):
        dataset = None if asked.get("dataset") is None else Path(asked["dataset"])
        found = evaluate(
            map(str, folders), recipe.model, dataset, asked.get("samples"), asked.get("context"), record=number == 0
        )
        rows += [{**row, "model": Path(row["model"]).name} for row in found]
    _write(out, recipe, folders, rows)
    return rows


def _write(out: Path, recipe: Recipe, folders: list[Path], rows: list[Row]) -> None:
    made = f"{date.today()}, Python {platform.python_version()}, hf-sqf {package_version()}, "
    made += ", ".join(f"{name} {version(name)}" for name in _PACKAGES) + f", {platform.machine()}"
    asked = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    (out / "table.json").write_text(json.dumps({"made": made, "recipe": asked, "rows": rows}, indent=1) + "\n", "utf-8")
    (out / "table.md").write_text(f"{recipe.model}\n\n{markdown(rows)}\n{made}\n", encoding="utf-8")
    (out / "cards").mkdir(exist_ok=True)
    for folder in folders:
        card = (folder / "README.md").read_text(encoding="utf-8")
        (out / "cards" / f"{folder.name}.md").write_text(card, encoding="utf-8")


def _refuse_unknown(said: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(str(key) for key in said.keys() - known):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
