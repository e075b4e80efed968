"""The keys and values of all layers, and what they cost."""

from __future__ import annotations

from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, DType
from kuiperllm.ops.attention import LayerCache


def bytes_per_token(config: ModelConfig, dtype: DType) -> int:
    """What one token adds to the cache, in bytes (padding of odd head sizes left out)."""
    return 2 * config.num_hidden_layers * config.kv_size * dtype.itemsize


class KVCache:
    """One `LayerCache` per layer; grows by copying into larger ones, one layer after the other.

    Args:
        config: the shape of the model.
        block_size: tokens in a block.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(self, config: ModelConfig, block_size: int, dtype: DType, device: Device) -> None:
        self.dtype = dtype
        self.bytes_per_token = bytes_per_token(config, dtype)
        self.block_size = block_size
        self.num_blocks = 0
        self._device = device
        self.layers: list[LayerCache] = [
            LayerCache.empty(0, block_size, config.num_key_value_heads, config.head_dim, dtype, device)
            for _ in range(config.num_hidden_layers)
        ]

    def reserve(self, num_blocks: int) -> None:
        """Hold at least so many blocks.

        Raises:
            OutOfMemoryError: the device has not enough memory; the blocks there were are as before.
        """
        if num_blocks <= self.num_blocks:
            return
        for index in range(len(self.layers)):
            if self.layers[index].num_blocks < num_blocks:  # it may have grown before memory ran out
                self.layers[index] = self.layers[index].grown(num_blocks)
                # The old memory is too small to be used again: without this, caches that were outgrown would
                # take as much as the one in use.
                self._device.allocator.empty_cache()
        self.num_blocks = num_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self.layers)
