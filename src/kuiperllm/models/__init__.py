"""Model families. The name of a file here is the `model_type` of the checkpoints it runs."""

from __future__ import annotations

import importlib
import pkgutil

from kuiperllm.checkpoint import Checkpoint
from kuiperllm.config import ModelConfig
from kuiperllm.core import Device
from kuiperllm.errors import UnsupportedError
from kuiperllm.layers import ShapeChecker, WeightLoader
from kuiperllm.models.decoder import Decoder

__all__ = ["Decoder", "build_model", "check_model", "supported_models"]


def supported_models() -> list[str]:
    """The values of `model_type` that this version runs."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "decoder")


def check_model(config: ModelConfig, checkpoint: Checkpoint, device: Device) -> None:
    """Find out whether a checkpoint has all that its model asks for, before anything is loaded.

    Raises:
        UnsupportedError: its `model_type` is not supported; the message lists those that are.
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    if config.model_type not in supported_models():  # config.json is not trusted with a module name
        raise UnsupportedError(
            f"{checkpoint.path}: model type {config.model_type!r} is not supported; "
            f"supported: {', '.join(supported_models())}"
        )
    _build(config, ShapeChecker(checkpoint, device))


def build_model(config: ModelConfig, weights: WeightLoader) -> Decoder:
    """The model that a configuration describes, with its weights.

    Raises:
        UnsupportedError: its `model_type` is not supported; the message lists those that are.
        CheckpointError: a tensor is missing or has the wrong shape.
        OutOfMemoryError: the weights do not fit.
    """
    check_model(config, weights.checkpoint, weights.device)
    return _build(config, weights)


def _build(config: ModelConfig, weights: WeightLoader) -> Decoder:
    model = importlib.import_module(f"{__name__}.{config.model_type}").build(config, weights)
    assert isinstance(model, Decoder)
    return model
