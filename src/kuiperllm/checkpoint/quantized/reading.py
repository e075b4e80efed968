"""From the tensors of safetensors files to the matrices that they make."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kuiperllm.checkpoint.base import TensorInfo, brief
from kuiperllm.checkpoint.quantized.awq import Awq
from kuiperllm.checkpoint.quantized.base import Method, Module, QuantizedMatrix
from kuiperllm.checkpoint.quantized.compressed import CompressedTensors
from kuiperllm.checkpoint.quantized.fp8 import Fp8
from kuiperllm.checkpoint.quantized.gptq import Gptq
from kuiperllm.checkpoint.quantized.ours import QUANT_METHOD, Ours
from kuiperllm.errors import CheckpointError, ConfigError, UnsupportedError

log = logging.getLogger(__name__)

METHODS: dict[str, type[Method]] = {
    QUANT_METHOD: Ours,
    "awq": Awq,
    "gptq": Gptq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
}
# What tensors end in that only quantized checkpoints have.
_PACKED = ("qweight", "weight_packed")


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What the tensors of a checkpoint are."""

    plain: Mapping[str, TensorInfo]
    """Tensors that are as their name says."""
    matrices: Mapping[str, QuantizedMatrix]
    """Made of several tensors, by the name that they have together."""


def read_contents(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> Contents:
    """Find out which tensors belong together.

    Args:
        config: the contents of config.json.
        tensors: all tensors of the files.
        where: config.json, for messages.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
        ConfigError: the configuration makes no sense.
        UnsupportedError: the way of quantizing, or a variant of it, is not supported.
    """
    method = _method(config, where)
    if method is None:
        _refuse_unexplained(tensors, where)
        return Contents(tensors, {})
    matrices: dict[str, QuantizedMatrix] = {}
    plain: dict[str, TensorInfo] = {}
    unused = 0
    for module in _modules(tensors.values(), where):
        matrix = method.matrix(module)
        taken = set(matrix.parts) if matrix is not None else set()
        if matrix is not None:
            matrices[matrix.info.name] = matrix
        for suffix, info in module.tensors.items():
            if suffix in method.unused - taken:
                unused += 1
            elif suffix not in taken:
                if _has_codes(info):
                    raise CheckpointError(
                        f"{where}: tensor {brief(info.name)} is {info.dtype} without scales"
                    )
                plain[info.name] = info
    if unused:
        log.info("%s: %d scales of activations and other parts of no use here are ignored", where, unused)
    if both := matrices.keys() & plain.keys():
        raise CheckpointError(f"{where}: {brief(min(both))} is there both as it is and quantized")
    return Contents(plain, matrices)


def _method(config: Mapping[str, Any], where: str) -> Method | None:
    stated = config.get("quantization_config") or config.get("compression_config")
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise ConfigError(f"{where}: quantization_config must be an object, not {brief(stated)}")
    name = stated.get("quant_method")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise UnsupportedError(
            f"{where}: weights quantized with {brief(name)} are not supported; supported: "
            f"{', '.join(METHODS)}, and GGUF files"
        )
    return method(stated, where)


def _refuse_unexplained(tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse tensors that only quantized checkpoints have."""
    for name, info in tensors.items():
        if name.endswith(_PACKED) or _has_codes(info):
            raise CheckpointError(
                f"{where}: has no quantization_config, but tensor {brief(name)} is quantized ({info.dtype}); "
                "take config.json from where the weights come from"
            )


def _has_codes(info: TensorInfo) -> bool:
    """Whether a tensor that is named as a matrix holds no floating-point numbers as others compute with."""
    return (
        info.name.endswith(".weight")
        and len(info.shape) == 2
        and info.dtype.startswith(("int", "uint", "float8"))
    )


def _modules(infos: Iterable[TensorInfo], where: str) -> Iterable[Module]:
    modules: dict[str, dict[str, TensorInfo]] = {}
    for info in infos:
        name, _, suffix = info.name.rpartition(".")
        modules.setdefault(name, {})[suffix] = info
    return (Module(name, by_suffix, where) for name, by_suffix in modules.items())
