"""``hf-sqf run``: compressions and their evaluations, named in one YAML file.

A run that was interrupted goes on where it stopped: ``done.json`` in the results says which models and which rows of
the table are there, and from which settings they came.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, field, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..hub.card import package_version
from ..report.writing import whole_file
from ..runtime.sqf_config import SQFConfig
from .compressing import compress, sqf_config
from .folders import refuse_overwriting
from .labelled import Labelled
from .measuring import SPLIT, Row, evaluate
from .originals import auto_class_for, ordinary_config
from .showing import markdown
from .tuning import Training, tune

_OPTIONS = {f.name for f in fields(SQFConfig)} - {
    "quant_method",
    "coverage",
    "fidelity",
    "format_version",
    "statistics",
}
_EVALUATION = {"dataset", "samples", "context", "labels", "inputs", "split"}
_LABELLED = {f.name for f in fields(Labelled)}
_TRAINING = {f.name for f in fields(Training)}
_DONE = "done.json"
_PACKAGES = ("torch", "transformers", "numba")


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        model: folder or id on the Hub.
        out: folder for the results: a model a compression, ``table.md``, ``table.json``, and the models' ``cards``.
        compressions: each the fields of an SQFConfig, and a ``name``, which its folder gets. Or, in place of an
            SQFConfig, ``from``, the name of one above, and ``train``, the fields of a
            :class:`hf_sqf.cli.tuning.Training`: that model, its factors trained.
        evaluations: each ``dataset`` (a file of texts or the id of a data set on the Hub; without, prose that comes
            with Python), its ``split`` (``validation`` unless it is named), ``samples`` and ``context``. With
            ``labels``, the fields of a :class:`hf_sqf.cli.labelled.Labelled`, too, which tell accuracies or word
            errors. The first is written into the cards.
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
        for name, known in (("compressions", _OPTIONS | {"name", "from", "train"}), ("evaluations", _EVALUATION)):
            entries = getattr(self, name)
            if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{name} must be a list of options, got {entries!r:.60}")
            for entry in entries:
                _refuse_unknown(entry, known, f"{name} of a recipe")
        self._check_labels()
        for name in ("model", "out", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        names = self.names()
        if len(set(names)) < len(names):
            raise ValueError(f"compressions need different names, got {', '.join(names)}")
        if odd := [name for name in names if not name or name.startswith(".") or "/" in name or "\\" in name]:
            raise ValueError(f"{odd[0]!r} cannot be the name of a compression's folder")
        for number, entry in enumerate(self.compressions):
            others = entry.keys() - {"name", "from", "train"}
            if ("from" in entry) != ("train" in entry) or ("from" in entry and others):
                raise ValueError(f"{names[number]}: from and train go together, with nothing else but a name")
            if "from" in entry and entry["from"] not in names[:number]:
                raise ValueError(f"{names[number]}: from must name a compression above, got {entry['from']!r}")
            if "train" in entry:
                self.training(entry)

    def _check_labels(self) -> None:
        for entry in self.evaluations:
            if "labels" in entry and not isinstance(entry.get("dataset"), str):
                raise ValueError("evaluations: labels are those of a dataset, which is missing")
            if "labels" not in entry and "inputs" in entry:
                raise ValueError("evaluations: inputs go with labels")

    def names(self) -> list[str]:
        """Return the name of each compression, which is that of its folder."""
        return [
            str(
                entry.get("name")
                or (f"{entry['from']}-trained" if "from" in entry else None)
                or entry.get("target_size")
                or f"{entry.get('bits', SQFConfig.bits):g}-bit"
            )
            for entry in self.compressions
        ]

    def configs(self) -> list[SQFConfig | None]:
        """Return what each compression asks for; None where another one is trained."""
        found: list[SQFConfig | None] = []
        for entry in self.compressions:
            options = {"dataset": self.dataset, **entry}
            options.pop("name", None)
            found.append(None if "from" in entry else sqf_config(**options))
        return found

    def training(self, entry: dict[str, Any]) -> Training:
        """Return how an entry with ``train`` is trained.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        if not isinstance(entry["train"], dict):
            raise ValueError(f"train must be options, such as {{steps: 100}}, got {entry['train']!r:.60}")
        _refuse_unknown(entry["train"], _TRAINING, "train of a recipe")
        data: dict[str, Any] = {} if self.dataset is None else {"dataset": self.dataset}
        return Training(**data | entry["train"])

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return, by name, all that a model depends on; files by what is in them."""
        common: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "auto_class": self.auto_class,
            "hf_sqf": package_version(),
        }
        common |= {"files": _state(self.model), "dataset": self.dataset, "texts": _hash(self.dataset)}
        found: dict[str, dict[str, Any]] = {}
        for name, entry in zip(self.names(), self.compressions, strict=True):
            asked = {key: value for key, value in entry.items() if key != "name"}
            if "from" in entry:
                training = self.training(entry)
                asked["train"] = {f.name: getattr(training, f.name) for f in fields(training)}
                found[name] = {**asked, "from": found[entry["from"]], "data": _hash(training.dataset)}
            else:
                found[name] = {**common, **asked, "data": _hash(entry.get("dataset"))}
        return found


def read_options(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Read the options of one compression: a file of them, or a recipe of one compression.

    Args:
        file: of YAML.
        given: options in place of the file's; a size takes the place of bits, and bits that of a size.

    Returns:
        The fields of an SQFConfig that are named, and ``dtype`` and ``auto_class``, if they are.

    Raises:
        ValueError: it is no YAML, a key is unknown, or the recipe has several compressions.
    """
    said = _read(file)
    if "compressions" in said:
        said = _only_options(file, read_recipe(file))
    else:
        _refuse_unknown(said, _OPTIONS | {"dtype", "auto_class"}, str(file))
    replaced = {"bits", "target_size"} if given.keys() & {"bits", "target_size"} else set()
    return {name: value for name, value in said.items() if name not in replaced} | given


def _only_options(file: Path, recipe: Recipe) -> dict[str, Any]:
    names = [name for name, entry in zip(recipe.names(), recipe.compressions, strict=True) if "from" not in entry]
    if len(names) > 1:
        raise ValueError(
            f"{file} has {len(names)} compressions ({', '.join(names)}), and hf-sqf run makes them all: "
            "compress --recipe takes the options of one, such as {bits: 2.5, structure: grid}"
        )
    common = {"dtype": recipe.dtype, "auto_class": recipe.auto_class, "dataset": recipe.dataset}
    given = {name: value for name, value in common.items() if value is not None}
    return given | {name: value for name, value in recipe.compressions[0].items() if name != "name"}


def read_recipe(file: Path, settings: dict[str, str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        file: of YAML.
        settings: key -> value (YAML, too) in place of what the file says.

    Raises:
        ValueError: it is no YAML, a key is unknown or missing, or a value does not fit.
    """
    said = _read(file, settings)
    _refuse_unknown(said, {f.name for f in fields(Recipe)}, str(file))
    if missing := [name for name in ("model", "out", "compressions") if name not in said]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return Recipe(**said)


def _read(file: Path, settings: dict[str, str] | None = None) -> dict[str, Any]:
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        changes = {key: yaml.safe_load(value) for key, value in (settings or {}).items()}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: " + " ".join(str(error).split())) from error
    if not isinstance(said, dict):
        raise ValueError(f"{file} must hold keys and values, as a recipe does")
    return said | changes


def run(recipe: Recipe, force: bool = False) -> list[Row]:
    """Make all models of a recipe, measure them, and write tables and cards into its folder.

    Models and rows that an earlier run made of the same settings stay; with ``force`` all are made again.

    Returns:
        The rows of the tables: each compression, measured in each evaluation.

    Raises:
        FileExistsError: a model's folder is not empty, and what is there was made of other settings.
        ValueError: see :func:`hf_sqf.cli.compressing.compress` and :func:`hf_sqf.cli.measuring.evaluate`.
    """
    out = Path(recipe.out)
    configs, settings = recipe.configs(), recipe.settings()
    done = _Done(out / _DONE)
    todo = [name for name in settings if force or not done.has(name, settings[name], out / name)]
    for name in todo:  # before any work
        refuse_overwriting(out / name, force, recipe.model)
    auto_class_for(ordinary_config(recipe.model), recipe.auto_class)
    for (name, asked), entry, config in zip(settings.items(), recipe.compressions, configs, strict=True):
        if name not in todo:
            continue
        done.forget(name)
        if config is None:
            tune(out / str(entry["from"]), out / name, recipe.model, recipe.training(entry))
        else:
            compress(recipe.model, out / name, config, auto_class=recipe.auto_class, dtype=recipe.dtype, force=force)
        done.keep(name, asked)
    rows: list[Row] = []
    for number, asked in enumerate(recipe.evaluations):
        file = asked.get("dataset")
        key = json.dumps([asked, _hash(file), number == 0], sort_keys=True)
        for name in settings:  # one at a time, so that each is kept
            if (row := done.row(name, key)) is None:
                labelled = None
                if "labels" in asked:
                    labelled = Labelled(**{"split": SPLIT} | {k: asked[k] for k in _LABELLED & asked.keys()})
                texts = file if labelled is None else None
                measured = texts, asked.get("samples"), asked.get("context"), number == 0, labelled
                split = asked.get("split", SPLIT)
                (row,) = evaluate([str(out / name)], recipe.model, *measured, split=split)
                row["model"] = name
                done.keep_row(name, key, row)
            rows.append(row)
    _write(out, recipe, [out / name for name in settings], rows)
    return rows


class _Done:
    """What is there already: settings and rows of each model, in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def has(self, name: str, asked: dict[str, Any], folder: Path) -> bool:
        same = name in self.known and self.known[name]["settings"] == json.loads(json.dumps(asked))
        return bool(same and (folder / "config.json").exists())

    def row(self, name: str, key: str) -> Row | None:
        row: Row | None = self.known[name]["rows"].get(key)
        return row

    def forget(self, name: str) -> None:
        if self.known.pop(name, None) is not None:
            self._write()

    def keep(self, name: str, asked: dict[str, Any]) -> None:
        self.known[name] = {"settings": asked, "rows": {}}
        self._write()

    def keep_row(self, name: str, key: str, row: Row) -> None:
        self.known[name]["rows"][key] = row
        self._write()

    def _write(self) -> None:
        whole_file(self.file, json.dumps(self.known, indent=1) + "\n")


def _hash(file: str | None) -> str | None:
    """Return what tells the contents of a data file; None for other kinds of data."""
    path = None if file is None else Path(file)
    return None if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()


def _state(model: str) -> list[list[Any]] | None:
    """Return what tells that a model's folder was written to; None for ids on the Hub, whose commits are not ours."""
    files = sorted(path for path in Path(model).glob("*.*") if path.suffix in (".safetensors", ".json", ".bin"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files] if files else None


def _write(out: Path, recipe: Recipe, folders: list[Path], rows: list[Row]) -> None:
    made = f"{date.today()}, Python {platform.python_version()}, hf-sqf {package_version()}, "
    made += ", ".join(f"{name} {version(name)}" for name in _PACKAGES) + f", {platform.machine()}"
    asked = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    whole_file(out / "table.json", json.dumps({"made": made, "recipe": asked, "rows": rows}, indent=1) + "\n")
    whole_file(out / "table.md", f"{recipe.model}\n\n{markdown(rows)}\n{made}\n")
    for folder in folders:
        card = (folder / "README.md").read_text(encoding="utf-8")
        whole_file(out / "cards" / f"{folder.name}.md", card)


def _refuse_unknown(said: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(str(key) for key in said.keys() - known):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
