"""What running a model takes, known before it is loaded."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from kuiperllm.checkpoint import Checkpoint, TensorInfo
from kuiperllm.config import EngineConfig
from kuiperllm.core import Device, DType
from kuiperllm.core.memory import MemoryInfo, format_bytes
from kuiperllm.engine.kv_cache import bytes_per_token
from kuiperllm.errors import OutOfMemoryError
from kuiperllm.layers.weights import UNPACKED
from kuiperllm.ops.linear import can_be_kept
from kuiperllm.quant import AT_LOAD

log = logging.getLogger(__name__)

_KV_SHARE = 0.9  # of what the weights leave free: the rest is for activations
_GPU_FIRST_TOKENS = 16384  # a cache for this many is reserved at once, if a quarter of the room suffices
_LARGE_GPU_BYTES = 32 << 30
_SHORTEST_CONTEXT = 64  # tokens; a model whose context had to be cut below that is not worth loading
_HOST_SEQUENCES, _GPU_SEQUENCES = 8, 256  # worked on at once, unless the user says how many


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Weights and key/value cache of a model, in bytes."""

    weight_bytes: int
    """Packed weights, estimated from the checkpoint's tensors."""
    kv_bytes_per_token: int
    kv_tokens: int
    """Tokens that the cache can grow to hold, a multiple of the block size."""
    block_size: int
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int
    """Most sequences that are worked on at once."""
    free_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one sequence of `max_model_len` tokens."""
        return self.kv_bytes_per_token * self.max_model_len

    @property
    def max_blocks(self) -> int:
        """Most blocks of the cache."""
        return self.kv_tokens // self.block_size

    def first_blocks(self, device: Device) -> int:
        """Blocks to begin with: growing costs a GPU much, and a CPU little."""
        if device.is_host:
            return 16
        room = int((self.free_bytes - self.weight_bytes) * _KV_SHARE) // 4
        return max(16, min(_GPU_FIRST_TOKENS, room // self.kv_bytes_per_token) // self.block_size)

    def __str__(self) -> str:
        cache = self.kv_bytes_per_token * self.kv_tokens
        return (
            f"weights {format_bytes(self.weight_bytes)}, KV cache {format_bytes(cache)} = {self.kv_tokens:,} "
            f"tokens of {format_bytes(self.kv_bytes_per_token)}, at most {self.max_num_seqs} requests of up "
            f"to {self.max_model_len:,} tokens at once; {format_bytes(self.free_bytes)} free"
        )


def plan_memory(checkpoint: Checkpoint, engine: EngineConfig, device: Device) -> MemoryPlan:
    """What running a checkpoint takes, and how long a context the memory allows.

    An explicit `max_model_len` may exceed what the checkpoint states: some state less than they can do.

    Raises:
        OutOfMemoryError: weights and cache do not fit; the message says what is needed, what there is, and
            what would fit.
    """
    config, size = checkpoint.config, engine.block_size
    trained = config.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > trained:
        log.warning("max_model_len=%d: the model states only %d positions", engine.max_model_len, trained)
    weight_bytes = packed_weight_bytes(checkpoint, engine)
    per_token = bytes_per_token(config, kv_dtype(checkpoint, engine))
    memory = device.memory_info()
    room = memory.free_bytes - weight_bytes
    most = min(trained, engine.kv_cache_tokens or trained)
    shortest = engine.max_model_len or min(most, _SHORTEST_CONTEXT)
    if room < per_token * shortest:
        needed, fitting = weight_bytes + per_token * shortest, int(room * _KV_SHARE) // per_token
        raise OutOfMemoryError(
            _too_little(device, needed, memory, _advice(checkpoint, engine, fitting, memory))
        )
    length = engine.max_model_len or most
    if room < per_token * length:
        length = max(shortest, int(room * _KV_SHARE) // per_token)
        log.info("memory allows a context of %d of the model's %d tokens", length, trained)
    sequences = engine.max_num_seqs or (_HOST_SEQUENCES if device.is_host else _GPU_SEQUENCES)
    longest = -(-length // size)
    blocks = min(longest * sequences, int(room * _KV_SHARE) // (per_token * size))
    if engine.kv_cache_tokens is not None:
        blocks = min(blocks, engine.kv_cache_tokens // size)
    tokens = max(longest, blocks) * size
    return MemoryPlan(weight_bytes, per_token, tokens, size, length, sequences, memory.free_bytes)


def _too_little(device: Device, needed: int, memory: MemoryInfo, advice: str) -> str:
    return (
        f"{device} memory: needs {format_bytes(needed)}, has {format_bytes(memory.free_bytes)} free of "
        f"{format_bytes(memory.total_bytes)}; {advice}"
    )


def _advice(checkpoint: Checkpoint, engine: EngineConfig, fitting: int, memory: MemoryInfo) -> str:
    """What to change, and to what. `fitting`: tokens for which there is room beside the weights."""
    if engine.max_model_len is not None and fitting >= _SHORTEST_CONTEXT:
        return f"use a smaller max_model_len: {fitting} fit"
    if not engine.quantizes:
        for quant in AT_LOAD:
            taken = packed_weight_bytes(checkpoint, replace(engine, quant=quant))
            if taken < _KV_SHARE * memory.free_bytes:
                return f"use quant={quant!r}, with which the weights take {format_bytes(taken)}"
    return "use a smaller model"


def kv_dtype(checkpoint: Checkpoint, engine: EngineConfig) -> DType:
    """The type of keys and values: the weights' own; of quantized ones, 16 bits that suit the device."""
    if engine.kv_cache_dtype != "auto":
        return DType(engine.kv_cache_dtype)
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    if engine.quantizes or any(info.scheme is not None for info in matrices):
        # float16 is the more precise; a GPU's tensor cores want it to be what the activations are.
        return DType.float16 if Device(engine.device).is_host else DType.bfloat16
    if engine.dtype != "auto":
        return DType(engine.dtype)
    stored = {info.dtype for info in matrices}
    return DType.float32 if "float32" in stored else DType(min(stored, default="float32"))


def max_batched_tokens(engine: EngineConfig, device: Device) -> int:
    """Most tokens that one pass takes in: what the user says, or what suits the device.

    A GPU wants many rows at a time; their activations take some hundred megabytes.
    """
    if engine.max_num_batched_tokens is not None:
        return engine.max_num_batched_tokens
    if device.is_host:
        return 512
    return 8192 if device.memory_info().total_bytes >= _LARGE_GPU_BYTES else 2048


def packed_weight_bytes(checkpoint: Checkpoint, engine: EngineConfig) -> int:
    """Memory that all tensors of a checkpoint will take once they are loaded."""
    return sum(_packed_bytes(info, engine) for info in checkpoint.tensors.values())


def _packed_bytes(info: TensorInfo, engine: EngineConfig) -> int:
    """Memory that a tensor will take once it is loaded."""
    elements = math.prod(info.shape)
    if len(info.shape) < 2:
        return 4 * elements
    columns = info.shape[1]
    if info.scheme is not None and can_be_kept(info.scheme, columns):
        return info.scheme.nbytes(*info.shape)
    if info.scheme is None and engine.quantizes and columns % 32 == 0:
        return AT_LOAD[str(engine.quant)](32).nbytes(*info.shape)
    if engine.dtype != "auto":
        return elements * DType(engine.dtype).itemsize
    return elements * (UNPACKED if info.scheme is not None else DType(info.dtype)).itemsize
