"""Compression on load: transformers loads the model, then its weights are compressed in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..runtime.sqf_memory import trim
from ..runtime.sqf_quantizer import SQFQuantizer, settle
from .model import compress_weights


class CompressingQuantizer(SQFQuantizer):
    """Loads compressed checkpoints, and compresses others."""

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse device maps that keep weights on disk while they are to be compressed."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError('device_map has "disk": compress without offloading, save, then load again with it')

    def update_device_map(self, device_map: Any) -> Any:  # noqa: ANN401
        """Have ``"auto"`` mean the processor where there is no accelerator: mapped weights need no memory there."""
        if not self.pre_quantized and device_map == "auto" and not torch.accelerator.is_available():
            return {"": "cpu"}
        return device_map

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            super()._process_model_after_weight_loading(model, **kwargs)
        else:
            compress_weights(model, self.quantization_config)
            settle(model, self.quantization_config.runtime)
            trim()
