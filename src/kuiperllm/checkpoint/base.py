"""What every checkpoint format offers: a configuration and tensors under Hugging Face names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from types import MappingProxyType, TracebackType
from typing import Any

from numpy.typing import NDArray

from kuiperllm.config import GenerationDefaults, ModelConfig
from kuiperllm.errors import CheckpointError
from kuiperllm.quant import QuantTensor, Scheme

Weight = NDArray[Any] | QuantTensor

Progress = Callable[[str, int, int], None]
"""Told of progress as (what is being done, bytes done, bytes in all)."""

_brief = Repr()
_brief.maxstring = 100


def brief(value: object) -> str:
    """An untrusted value as one short line, for messages."""
    return _brief.repr(value)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of a tensor before it is loaded."""

    name: str
    """Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`."""
    dtype: str
    """A data type's name, or the name of a quantized format, such as `q8` or `Q4_K`."""
    shape: tuple[int, ...]
    nbytes: int
    """Bytes in the file."""
    scheme: Scheme | None = None
    """Of a quantized matrix."""


class Checkpoint(ABC):
    """An opened checkpoint. A context manager; arrays that were loaded outlive it."""

    format: str
    """`safetensors`, `gguf`, `llama2.c`, `llama2.c training` or `meta`."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        generation: GenerationDefaults | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        """The file; for Hugging Face checkpoints the folder, unless a file was named."""
        self.config = config
        self.generation = generation or GenerationDefaults()
        """What the checkpoint recommends for sampling."""
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        """By Hugging Face name. `lm_head.weight` is absent where it is tied to the embedding."""
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata or {}))
        """The key/value pairs of a GGUF file; empty for other formats."""

    def load(self, name: str, *, check: bool = True) -> Weight:
        """The tensor with this name: a read-only view of the mapped file wherever the layout allows.

        Args:
            name: Hugging Face's.
            check: refuse a quantized matrix with a scale or minimum that is NaN or infinite.

        Raises:
            CheckpointError: there is no such tensor, its scales are damaged, or the checkpoint is closed.
            UnsupportedError: its layout cannot be read.
        """
        weight = self._load(self._info(name))
        if check and isinstance(weight, QuantTensor) and not weight.has_finite_scales:
            raise CheckpointError(
                f"{self.path}: tensor {name} has scales that are NaN or infinite; the file is damaged: copy "
                "or download it again"
            )
        for array in weight.arrays if isinstance(weight, QuantTensor) else (weight,):
            array.flags.writeable = False
        return weight

    def release(self, name: str) -> None:
        """Say that the tensor is not needed for now: its mapped pages may be dropped from resident memory.

        Views stay valid; touching them reads the file again.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._release(self._info(name))

    def expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The description of a tensor that must exist and have this shape.

        Raises:
            CheckpointError: it is missing or has another shape; the message states both.
        """
        info = self._info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the shape {list(info.shape)}, "
                f"but the configuration asks for {list(shape)}"
            )
        return info

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: there is no tensor {brief(name)} among its {len(self.tensors)} tensors"
            )
        return info

    @abstractmethod
    def _load(self, info: TensorInfo) -> Weight: ...

    @abstractmethod
    def _release(self, info: TensorInfo) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Give up the file; loading from it is an error from here on."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<{self.format} checkpoint {self.path}: {self.config.model_type}, {len(self.tensors)} tensors>"
        )
