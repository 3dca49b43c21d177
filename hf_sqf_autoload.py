"""Makes compressed models load wherever hf-sqf is installed, without ``import hf_sqf``.

transformers looks for no plugins, but torch does: at the end of ``import torch`` it calls the entry points of the group
``torch.backends``, and :func:`install` is one. It does next to nothing then: it has ``transformers.quantizers.auto``
watched for, and once that is imported, puts a stand-in for the method ``"sqf"`` into its table. Only when a model asks
for the method is hf_sqf imported.

``HF_SQF_AUTOLOAD=0`` switches this off; so does ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, for all of torch's plugins.
A module of its own, outside the package: importing the package imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "HF_SQF_AUTOLOAD"
WATCHED = "transformers.quantizers.auto"


def install() -> None:
    """Have the method announced as soon as transformers' quantizers are imported. Never raises."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "false", "no", "off"):
        return
    when_imported(WATCHED, announce)


def when_imported(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call with a module once it has been imported: at once if it has been already. Asked again, it does no more."""
    module = sys.modules.get(name)
    if module is not None:
        call(module)
    elif not any(isinstance(finder, Watcher) and finder.watched == name for finder in sys.meta_path):
        sys.meta_path.insert(0, Watcher(name, call))


class Watcher:
    """Finds nothing itself; lets one module be found as ever, and calls with it once it has run."""

    def __init__(self, watched: str, call: Callable[[ModuleType], None]) -> None:
        self.watched, self.call = watched, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None for every module but the one that is watched."""
        if fullname != self.watched:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.call(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def announce(module: ModuleType) -> None:
    """Put the stand-in into the table of methods, unless the method is known or there is no such table."""
    known = getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if isinstance(known, dict):
        known.setdefault("sqf", SQFConfig)


class SQFConfig:
    """Stands for ``hf_sqf.SQFConfig`` until a model needs it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """Return the real config. Importing the package replaces this stand-in."""
        import hf_sqf

        return hf_sqf.SQFConfig.from_dict(config_dict, **kwargs)
