"""Data-aware rounding: what the inputs of matrices are like on a text, and GPTQ with that.

The text goes through the network one layer at a time, on the CPU, with the weights of the source. Of the
inputs of a layer's matrices the sums of x x^T are kept, then its matrices are rounded. In memory are the
residual stream of all tokens, one layer, and those sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint import Checkpoint
from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import CheckpointError, KuiperError, UsageError
from kuiperllm.layers import RotaryEmbedding, WeightLoader
from kuiperllm.layers.blocks import SelfAttention
from kuiperllm.models.decoder import DecoderLayer
from kuiperllm.ops.attention import Batch, LayerCache, attention, write_kv
from kuiperllm.ops.linear import linear
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.rope import rope
from kuiperllm.quant import QuantTensor, Scheme, concatenate
from kuiperllm.quant.gptq import Feedback, gptq
from kuiperllm.text import Tokenizer

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]

CONTEXT = 512
"""Tokens that see each other."""
MAX_TOKENS = 32_768
"""Of the text that are used; more change little."""
_BLOCK_SIZE = 32
_SUMMED = 2048  # inputs that are multiplied at a time
_STRIPE = 1024  # rows of the sums that a product makes at a time
_ROUNDED = 1 << 24  # weights that are rounded at a time
_CPU = Device("cpu")

# Which matrices of a layer have the same input.
_INPUTS = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}

Progress = Callable[[int, int], None]
"""Told of (bytes of layers done, bytes of all layers)."""


def calibration_windows(text: str, tokenizer: Tokenizer, config: ModelConfig) -> NDArray[np.int32]:
    """Token ids of stretches of a text, int32 [S, L], spread over all of it; each begins as a text does.

    Raises:
        UsageError: the text is too short.
    """
    ids = [i for i in tokenizer.encode(text, add_special_tokens=False) if i < config.vocab_size]
    begin = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
    length = min(CONTEXT, config.max_position_embeddings, len(ids) + len(begin)) - len(begin)
    if length < 16:
        raise UsageError(f"the text to calibrate with has {len(ids)} tokens; use one with some thousands")
    count = min(len(ids) // length, max(1, MAX_TOKENS // (length + len(begin))))
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    log.info("calibrating with %d stretches of %d tokens", count, length + len(begin))
    return np.array([begin + ids[start : start + length] for start in starts], np.int32)


class Sums:
    """The sum of x x^T over inputs x of K numbers, float32 [K, K]."""

    def __init__(self, size: int) -> None:
        self._sums = np.zeros((size, size), np.float32)
        self._waiting: list[Floats] = []
        self._count = 0

    def add(self, inputs: Floats) -> None:
        """Inputs [T, K], which are not kept."""
        self._waiting.append(inputs.copy())
        self._count += len(inputs)
        if self._count >= _SUMMED:
            self._multiply()

    def _multiply(self) -> None:
        """The upper half, in stripes: no product of the size of all sums is ever in memory."""
        inputs = np.concatenate(self._waiting)
        self._waiting, self._count = [], 0
        for start in range(0, len(self._sums), _STRIPE):
            stripe = slice(start, start + _STRIPE)
            self._sums[stripe, start:] += inputs[:, stripe].T @ inputs[:, start:]

    def result(self) -> Floats:
        """All sums."""
        if self._waiting:
            self._multiply()
        for start in range(0, len(self._sums), _STRIPE):
            end = start + _STRIPE
            self._sums[end:, start:end] = self._sums[start:end, end:].T
        return self._sums


class Calibrated:
    """Gives matrices rounded by GPTQ, layer after layer.

    Args:
        checkpoint: the source.
        windows: token ids of the text, int32 [S, L].
        schemes: what each matrix is rounded to, by name.
        progress: told after each layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: NDArray[np.int32],
        schemes: Mapping[str, Scheme],
        progress: Progress | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._schemes = schemes
        self._progress = progress
        self._layers = _Layers(checkpoint, windows)
        self._rounded: dict[str, QuantTensor] = {}

    def __call__(self, name: str) -> QuantTensor | None:
        """A matrix of a layer; None for what is not part of one. Names come in the order of layers.

        Raises:
            CheckpointError: a weight, or what the network makes of the text, is NaN or infinite.
        """
        if name not in self._schemes or not name.startswith("model.layers."):
            return None
        while name not in self._rounded:
            self._round_layer()
        return self._rounded.pop(name)

    def _round_layer(self) -> None:
        index, sums = next(self._layers)
        for inputs, parts in _INPUTS.items():
            names = [f"model.layers.{index}.{part}.weight" for part in parts]
            schemes = {name: self._schemes[name] for name in names if name in self._schemes}
            found = sums.pop(inputs)
            if schemes:
                feedback = Feedback.of(_finite(self._checkpoint, index, found.result()))
                del found
                for name, scheme in schemes.items():
                    self._rounded[name] = self._round(name, feedback, scheme)
        if self._progress is not None:
            sizes = {
                name: info.nbytes for name, info in self._checkpoint.tensors.items() if ".layers." in name
            }
            total, layers = sum(sizes.values()), self._checkpoint.config.num_hidden_layers
            self._progress(total * (index + 1) // layers, total)

    def _round(self, name: str, feedback: Feedback, scheme: Scheme) -> QuantTensor:
        weight = self._checkpoint.load(name)
        step = max(1, _ROUNDED // weight.shape[1])
        try:
            return concatenate(
                [
                    gptq(_floats(weight[start : start + step]), feedback, scheme)
                    for start in range(0, weight.shape[0], step)
                ]
            )
        except KuiperError as error:
            raise type(error)(f"{self._checkpoint.path}: tensor {name}: {error}") from None
        finally:
            self._checkpoint.release(name)


class _Layers(Iterator[tuple[int, dict[str, Sums]]]):
    """Runs the layers one after the other: number, and the sums of the inputs of its matrices."""

    def __init__(self, checkpoint: Checkpoint, windows: NDArray[np.int32]) -> None:
        self._checkpoint = checkpoint
        self._config = config = checkpoint.config
        self._batch = _batch(windows.shape[1])
        blocks = -(-windows.shape[1] // _BLOCK_SIZE)
        self._cache = LayerCache.empty(blocks, _BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self._rotary = RotaryEmbedding(config, _CPU)
        self._rotary.reserve(windows.shape[1])
        self._residual = _embed(checkpoint, windows)  # [S, L, D]
        self._index = 0

    def __next__(self) -> tuple[int, dict[str, Sums]]:
        if self._index == self._config.num_hidden_layers:
            raise StopIteration
        index, self._index = self._index, self._index + 1
        layer, sums = self._load(index), _empty_sums(self._config)
        for window in self._residual:
            _run(layer, Tensor.from_numpy(window), self._cache, self._batch, sums)
        del layer
        _CPU.allocator.empty_cache()  # rounding needs the memory
        return index, sums

    def _load(self, index: int) -> DecoderLayer:
        name, tensors = f"model.layers.{index}", self._checkpoint.tensors
        return DecoderLayer(
            self._config,
            WeightLoader(self._checkpoint, _CPU),
            name,
            self._rotary,
            qkv_bias=f"{name}.self_attn.q_proj.bias" in tensors,
            o_bias=f"{name}.self_attn.o_proj.bias" in tensors,
            qk_norm=f"{name}.self_attn.q_norm.weight" in tensors,
        )


def _run(
    layer: DecoderLayer, residual: Tensor, cache: LayerCache, batch: Batch, sums: Mapping[str, Sums]
) -> None:
    """`DecoderLayer.__call__` on a CPU, with the inputs of its matrices looked at on the way."""
    attn, mlp = layer.self_attn, layer.mlp
    sums["self_attn.qkv"].add(rms_norm(residual, attn.norm.weight, attn.norm.eps).numpy())
    mixed = _attend(attn, attn.qkv_proj.of_norm(residual, attn.norm), cache, batch)
    sums["self_attn.o"].add(mixed.numpy())
    linear(mixed, attn.o_proj.weight, out=residual, accumulate=True)
    sums["mlp.gate_up"].add(rms_norm(residual, mlp.norm.weight, mlp.norm.eps).numpy())
    gated = mlp.gate_up_proj.swiglu_of_norm(residual, mlp.norm)
    sums["mlp.down"].add(gated.numpy())
    mlp.down_proj.add_to(residual, gated)


def _attend(attn: SelfAttention, qkv: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
    """`ops.self_attention.cpu` up to the projection: [T, H d]."""
    heads, size = cache.num_kv_heads, cache.head_dim
    parts = qkv.reshape((qkv.shape[0], qkv.shape[1] // size, size))
    turned, v = parts[:, :-heads], parts[:, -heads:]
    q, k = turned[:, :-heads], turned[:, -heads:]
    if attn.q_norm is not None and attn.k_norm is not None:
        rms_norm(q, attn.q_norm.weight, attn.norm.eps, out=q)
        rms_norm(k, attn.k_norm.weight, attn.norm.eps, out=k)
    rope(turned, batch.positions, attn.rotary.table)
    write_kv(k, v, cache, batch.slot_mapping)
    mixed = attention(q, cache, batch, attn.scale)
    return mixed.reshape((mixed.shape[0], mixed.shape[1] * size))


def _empty_sums(config: ModelConfig) -> dict[str, Sums]:
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = {
        "self_attn.qkv": hidden,
        "self_attn.o": config.q_size,
        "mlp.gate_up": hidden,
        "mlp.down": inner,
    }
    return {inputs: Sums(size) for inputs, size in sizes.items()}


def _embed(checkpoint: Checkpoint, windows: NDArray[np.int32]) -> Floats:
    """[S, L] -> [S, L, D]."""
    name = "model.embed_tokens.weight"
    table = checkpoint.load(name)
    ids = windows.reshape(-1).astype(np.intp)
    step = max(1, _ROUNDED // table.shape[1])
    parts = [_floats(table[ids[start : start + step]]) for start in range(0, len(ids), step)]
    checkpoint.release(name)
    return np.concatenate(parts).reshape(*windows.shape, table.shape[1])


def _floats(rows: NDArray[np.float32] | QuantTensor) -> Floats:
    return rows.dequantize() if isinstance(rows, QuantTensor) else np.asarray(rows, np.float32)


def _finite(checkpoint: Checkpoint, index: int, sums: Floats) -> Floats:
    if not np.isfinite(np.diagonal(sums)).all():
        raise CheckpointError(
            f"{checkpoint.path}: in layer {index} the network makes NaN or infinity of the text; weights may "
            "be damaged (kuiper info --check finds that)"
        )
    return sums


def _batch(length: int) -> Batch:
    """One sequence of so many tokens, in blocks 0, 1, 2, ..."""

    def tensor(values: Sequence[int] | range, dtype: DType) -> Tensor:
        return Tensor.from_numpy(np.array(values, dtype.numpy))

    blocks = Tensor.from_numpy(np.arange(-(-length // _BLOCK_SIZE), dtype=np.int32)[None])
    return Batch(
        positions=tensor(range(length), DType.int32),
        slot_mapping=tensor(range(length), DType.int64),
        block_table=blocks,
        query_start_loc=tensor([0, length], DType.int32),
        seq_lens=tensor([length], DType.int32),
        max_query_len=length,
    )
