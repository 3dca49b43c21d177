"""Shares compressed models: cards, pushing, the fidelity check, verification, export."""

import importlib
from typing import Any

_WHERE = {
    "Fault": "verification",
    "OriginalMissing": "checking",
    "Unfaithful": "checking",
    "check": "checking",
    "export": "exporting",
    "push": "pushing",
    "verify": "verification",
    "write_card": "card",
}

__all__ = list(_WHERE)  # noqa: PLE0604


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what is asked for only then: ``import hf_sqf`` needs none of it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
