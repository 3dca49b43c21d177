"""Stores a model's weights as sparse, quantized matrix factors.

Importing the package makes the quantization method ``"sqf"`` known to transformers.
"""

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

register(CompressingQuantizer)

__version__ = "0.1.0"
__all__ = [
    "Factors",
    "SQFConfig",
    "compress",
    "compress_checkpoint",
    "dequantize",
    "factorize",
    "set_runtime",
    "size_report",
]
