"""From the name of a model to weights, tokenizer and chat template in memory."""

from __future__ import annotations

import importlib.resources
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from kuiperllm.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from kuiperllm.config import EngineConfig, GenerationDefaults, ModelConfig
from kuiperllm.core import Device, DType
from kuiperllm.core.memory import format_bytes, out_of_memory
from kuiperllm.engine.kv_cache import bytes_per_token
from kuiperllm.errors import TokenizerError
from kuiperllm.layers import WeightLoader
from kuiperllm.models import Decoder, build_model
from kuiperllm.quant import AT_LOAD
from kuiperllm.text import ChatTemplate, Tokenizer, load_tokenizer, tokenizer_from_gguf

log = logging.getLogger(__name__)

DEMO = "demo"
"""The name of the small model that comes with the package."""

Progress = Callable[[str, int, int], None]
"""Told of progress as (what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What running a model takes, in bytes, known before it is loaded."""

    weight_bytes: int
    """Packed weights, estimated from the checkpoint's tensors."""
    kv_bytes_per_token: int
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int
    free_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one sequence of `max_model_len` tokens."""
        return self.kv_bytes_per_token * self.max_model_len

    def max_blocks(self, block_size: int) -> int:
        """Most blocks of the cache: for `max_num_seqs` of the longest sequences, if memory has room."""
        longest = -(-self.max_model_len // block_size)
        room = int((self.free_bytes - self.weight_bytes) * _KV_SHARE)
        return max(longest, min(longest * self.max_num_seqs, room // (self.kv_bytes_per_token * block_size)))

    def first_blocks(self, block_size: int, device: Device) -> int:
        """Blocks to begin with: growing costs a GPU much, and a CPU little."""
        if device.is_host:
            return 16
        room = int((self.free_bytes - self.weight_bytes) * _KV_SHARE) // 4
        return max(16, min(_GPU_FIRST_TOKENS, room // self.kv_bytes_per_token) // block_size)

    def __str__(self) -> str:
        per_token, whole = format_bytes(self.kv_bytes_per_token), format_bytes(self.kv_bytes)
        return (
            f"weights {format_bytes(self.weight_bytes)}, KV cache {per_token} per token, {whole} for a "
            f"sequence of {self.max_model_len} tokens; {format_bytes(self.free_bytes)} free"
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that generating text needs."""

    name: str
    config: ModelConfig
    format: str
    generation: GenerationDefaults
    decoder: Decoder
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    kv_dtype: DType
    plan: MemoryPlan

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        ids = self.config.eos_token_ids, self.generation.eos_token_ids, self.tokenizer.eos_token_ids
        return frozenset(chain.from_iterable(ids))


def open_model(model: str | Path | None, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that a name stands for: a path, a hub id, or None or `demo` for the one in the package.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UnsupportedError: its format or architecture is not supported.
        DownloadError: the hub cannot be reached or refuses.
    """
    if model is None or (str(model) == DEMO and not Path(DEMO).exists()):
        model = Path(str(importlib.resources.files("kuiperllm") / "data" / "demo.gguf"))
    return open_checkpoint(model, progress=progress)


def load_model(
    model: str | Path | None,
    engine: EngineConfig,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Open, check, load and pack a model.

    Raises:
        KuiperError: something is wrong with the checkpoint, the tokenizer, the device or the memory.
    """
    device = Device(engine.device)
    with open_model(model, progress) as checkpoint:
        text = open_tokenizer(checkpoint, tokenizer)
        config = checkpoint.config
        if text.vocab_size > config.vocab_size:
            log.info("the tokenizer knows %d ids, the model %d", text.vocab_size, config.vocab_size)
        plan = plan_memory(checkpoint, engine, device)
        log.info("%s", plan)
        return LoadedModel(
            name=DEMO if model is None else str(model),
            config=config,
            format=checkpoint.format,
            generation=checkpoint.generation,
            decoder=load_decoder(checkpoint, engine, device, progress),
            tokenizer=text,
            chat_template=_chat_template(text),
            kv_dtype=kv_dtype(checkpoint, engine),
            plan=plan,
        )


def load_decoder(
    checkpoint: Checkpoint, engine: EngineConfig, device: Device, progress: Progress | None = None
) -> Decoder:
    """The weights of a checkpoint on a device, as the engine's configuration wants them."""
    weights = WeightLoader(
        checkpoint,
        device,
        dtype=None if engine.dtype == "auto" else DType(engine.dtype),
        quant=engine.quant if engine.quantizes else None,
        group_size=engine.group_size,
        progress=None if progress is None else lambda done, total: progress("loading", done, total),
    )
    return build_model(checkpoint.config, weights)


def open_tokenizer(checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, or the one at another path.

    Raises:
        TokenizerError: there is none, or it is damaged.
    """
    if tokenizer is not None:
        return load_tokenizer(Path(tokenizer))
    if "tokenizer.ggml.model" in checkpoint.metadata:
        return tokenizer_from_gguf(checkpoint.metadata)
    path = checkpoint.path
    if path.is_dir():
        return load_tokenizer(path)
    if checkpoint.format == "safetensors":
        return load_tokenizer(path.parent)
    for name in ("tokenizer.bin", "tokenizer.model"):
        if (path.parent / name).is_file():
            return load_tokenizer(path.parent / name)
    raise TokenizerError(
        f"{path}: there is no tokenizer.bin or tokenizer.model beside it; name one with --tokenizer"
    )


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    if tokenizer.chat_template is None:
        return None
    texts = {number: text for text, number in tokenizer.special_tokens.items()}
    eos = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None
    return ChatTemplate(
        tokenizer.chat_template,
        bos_token=texts.get(tokenizer.bos_token_id, "") if tokenizer.bos_token_id is not None else "",
        eos_token=texts.get(eos, "") if eos is not None else "",
    )


# --- memory -----------------------------------------------------------------------------------------------

_KV_SHARE = 0.9  # of what the weights leave free: the rest is for activations
_GPU_FIRST_TOKENS = (
    16384  # a cache for this many tokens is reserved at once, if a quarter of the room suffices
)
_LARGE_GPU_BYTES = 32 << 30
_SHORTEST_CONTEXT = 64  # tokens; a model whose context had to be cut below that is not worth loading


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


def plan_memory(checkpoint: Checkpoint, engine: EngineConfig, device: Device) -> MemoryPlan:
    """What running a checkpoint takes, and how long a context the memory allows.

    An explicit `max_model_len` may exceed what the checkpoint states: some state less than they can do.

    Raises:
        OutOfMemoryError: weights and cache do not fit; the message says what is needed and what there is.
    """
    config = checkpoint.config
    trained = config.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > trained:
        log.warning("max_model_len=%d: the model states only %d positions", engine.max_model_len, trained)
    weight_bytes = packed_weight_bytes(checkpoint, engine)
    per_token = bytes_per_token(config, kv_dtype(checkpoint, engine))
    memory = device.memory_info()
    room = memory.free_bytes - weight_bytes
    shortest = engine.max_model_len or min(trained, _SHORTEST_CONTEXT)
    if room < per_token * shortest:
        raise out_of_memory(str(device), weight_bytes + per_token * shortest, memory)
    length = engine.max_model_len or trained
    if room < per_token * length:
        length = max(shortest, int(room * _KV_SHARE) // per_token)
        log.info("memory allows a context of %d of the model's %d tokens", length, trained)
    return MemoryPlan(weight_bytes, per_token, length, engine.max_num_seqs, memory.free_bytes)


def max_batched_tokens(engine: EngineConfig, device: Device) -> int:
    """Most tokens of a prompt that one pass takes in: what the user says, or what suits the device.

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
    if info.scheme is not None:
        return info.scheme.nbytes(*info.shape)
    if engine.quantizes and info.shape[1] % 32 == 0:
        return AT_LOAD[str(engine.quant)](32).nbytes(*info.shape)
    return elements * (DType(info.dtype) if engine.dtype == "auto" else DType(engine.dtype)).itemsize
