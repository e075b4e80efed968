"""Model families. The name of a file here is the `model_type` of the checkpoints it runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from kuiperllm.checkpoint import Checkpoint
from kuiperllm.config import ModelConfig
from kuiperllm.core import Device
from kuiperllm.errors import UnsupportedError
from kuiperllm.layers import ShapeChecker, WeightLoader
from kuiperllm.models.decoder import Decoder

__all__ = ["Decoder", "build_model", "check_model", "model_tensors", "supported_models"]


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


def model_tensors(config: ModelConfig, checkpoint: Checkpoint, device: Device) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model asks for, in the order in which it loads them.

    Raises:
        UnsupportedError: its `model_type` is not supported.
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    checker = _Recorder(checkpoint, device)
    check_model(config, checkpoint, device)
    _build(config, checker)
    return checker.shapes


class _Recorder(ShapeChecker):
    """Writes down what is asked for."""

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        super().__init__(checkpoint, device)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def expect_vector(self, name: str, size: int) -> None:
        """Note a vector's shape."""
        self.shapes[name] = (size,)

    def expect_matrix(self, names: Sequence[str], sizes: Sequence[int], columns: int, *, bias: bool) -> None:
        """Note the shapes of matrices, and of their biases."""
        for name, size in zip(names, sizes, strict=True):
            self.shapes[f"{name}.weight"] = (size, columns)
            if bias:
                self.shapes[f"{name}.bias"] = (size,)
