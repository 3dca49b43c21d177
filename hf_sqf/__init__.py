"""Stores a model's weights as sparse, quantized matrix factors.

Importing the package makes the quantization method ``"sqf"`` known to transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compress.checkpoint import compress_checkpoint
from .compress.factorize import factorize
from .compress.model import compress, dequantize
from .compress.on_load import CompressingQuantizer
from .hub import saving as _saving  # noqa: F401  (so that saved models bring a card)
from .runtime import sqf_hub as _sqf_hub  # noqa: F401  (so that saved models bring the code that loads them)
from .runtime.sqf_config import SQFConfig
from .runtime.sqf_factors import Factors
from .runtime.sqf_modules import set_runtime
from .runtime.sqf_quantizer import register
from .runtime.sqf_size import size_report
from .training import adapters as _adapters

if TYPE_CHECKING:
    from .training.callback import SQFCallback
    from .training.distillation import distillation_loss

register(CompressingQuantizer)
_adapters.guard()  # so that none is lost by merging

_LAZY = {"SQFCallback": ".training.callback", "distillation_loss": ".training.distillation"}
__version__ = "0.1.0"
__all__ = [
    "Factors",
    "SQFCallback",
    "SQFConfig",
    "compress",
    "compress_checkpoint",
    "dequantize",
    "distillation_loss",
    "factorize",
    "set_runtime",
    "size_report",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what trains when it is asked for: the Trainer's modules take a while, and import PEFT."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
