"""The entry point: harmless, fast, and easy to switch off."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hf_sqf_autoload

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


def watchers() -> list[object]:
    found = [finder for finder in sys.meta_path if isinstance(finder, hf_sqf_autoload.Watcher)]
    return [finder for finder in found if finder.watched == hf_sqf_autoload.WATCHED]


def test_imports_next_to_nothing():
    """What takes time at every ``import torch`` is what is imported: a few modules of the standard library at most."""
    program = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import hf_sqf_autoload\n"
        "hf_sqf_autoload.install()\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert "hf_sqf_autoload" in found and len(found) <= 20
    assert not {"torch", "transformers", "hf_sqf", "numpy"} & {name.split(".")[0] for name in found}


@pytest.mark.parametrize(("variable", "watching"), [(None, True), ("TORCH_DEVICE_BACKEND_AUTOLOAD", False)])
def test_torch_calls_it_unless_its_switch_is_off(variable: str | None, watching: bool):
    """The entry point itself, as ``import torch`` finds it; torch's switch is that of all its plugins."""
    switches = (hf_sqf_autoload.SWITCH, "TORCH_DEVICE_BACKEND_AUTOLOAD")
    env = {name: value for name, value in os.environ.items() if name not in switches}
    program = "import sys, torch; print(any(type(f).__module__ == 'hf_sqf_autoload' for f in sys.meta_path))"
    if variable is not None:
        env[variable] = "0"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(watching)


@pytest.mark.parametrize("value", ["0", "false", "No", "off"])
def test_own_switch(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.delitem(sys.modules, hf_sqf_autoload.WATCHED, raising=False)
    monkeypatch.setenv(hf_sqf_autoload.SWITCH, value)
    hf_sqf_autoload.install()
    assert not watchers()


def test_installs_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, hf_sqf_autoload.WATCHED, raising=False)
    monkeypatch.delenv(hf_sqf_autoload.SWITCH, raising=False)
    hf_sqf_autoload.install()
    hf_sqf_autoload.install()
    assert len(watchers()) == 1
    assert watchers()[0].find_spec("json", None) is None


def test_announces_at_once_where_transformers_is_there_already(monkeypatch: pytest.MonkeyPatch):
    table = types.SimpleNamespace(AUTO_QUANTIZATION_CONFIG_MAPPING={})
    monkeypatch.setitem(sys.modules, hf_sqf_autoload.WATCHED, table)
    monkeypatch.delenv(hf_sqf_autoload.SWITCH, raising=False)
    hf_sqf_autoload.install()
    assert table.AUTO_QUANTIZATION_CONFIG_MAPPING["sqf"] is hf_sqf_autoload.SQFConfig


@pytest.mark.parametrize("table", [None, 3, {"sqf": "the real one"}], ids=["missing", "odd", "known"])
def test_never_raises_and_never_replaces(table: object):
    module = types.ModuleType("auto")
    if table is not None:
        module.AUTO_QUANTIZATION_CONFIG_MAPPING = table
    hf_sqf_autoload.announce(module)
    assert getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", None) == table


def test_watched_module_is_found_and_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "watched_module.py").write_text("AUTO_QUANTIZATION_CONFIG_MAPPING = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hf_sqf_autoload, "WATCHED", "watched_module")
    monkeypatch.delenv(hf_sqf_autoload.SWITCH, raising=False)
    hf_sqf_autoload.install()
    import watched_module

    assert watched_module.AUTO_QUANTIZATION_CONFIG_MAPPING["sqf"] is hf_sqf_autoload.SQFConfig
    assert not watchers()


def test_a_missing_module_stays_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf_sqf_autoload, "WATCHED", "no_such_module_anywhere")
    monkeypatch.delenv(hf_sqf_autoload.SWITCH, raising=False)
    hf_sqf_autoload.install()
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_module_anywhere")


def test_the_stand_in_gives_the_real_config():
    from hf_sqf import SQFConfig

    assert isinstance(hf_sqf_autoload.SQFConfig.from_dict({"bits": 3}), SQFConfig)
