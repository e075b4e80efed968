"""Model families. The name of a file here is the `model_type` of the checkpoints it runs."""

from __future__ import annotations

import importlib
import pkgutil

from kuiperllm.config import ModelConfig
from kuiperllm.errors import UnsupportedError
from kuiperllm.layers import ShapeChecker, WeightLoader
from kuiperllm.models.decoder import Decoder

__all__ = ["Decoder", "build_model", "supported_models"]


def supported_models() -> list[str]:
    """The values of `model_type` that this version runs."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "decoder")


def build_model(config: ModelConfig, weights: WeightLoader) -> Decoder:
    """The model that a configuration describes, with its weights.

    Raises:
        UnsupportedError: its `model_type` is not supported; the message lists those that are.
        CheckpointError: a tensor is missing or has the wrong shape.
        OutOfMemoryError: the weights do not fit.
    """
    if config.model_type not in supported_models():  # config.json is not trusted with a module name
        raise UnsupportedError(
            f"{weights.checkpoint.path}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(supported_models())}"
        )
    module = importlib.import_module(f"{__name__}.{config.model_type}")
    module.build(config, ShapeChecker(weights.checkpoint, weights.device))  # fails before anything is loaded
    model = module.build(config, weights)
    assert isinstance(model, Decoder)
    return model
