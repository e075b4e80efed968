"""The keys and values of one layer, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.dispatch import implementation


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """Keys and values of one layer: `num_blocks` blocks of `block_size` tokens each.

    A sequence's token number p lies in block `block_table[p // block_size]` at `p % block_size`; its slot is
    block * block_size + p % block_size. The order of elements within a block belongs to the device.
    """

    keys: Tensor
    values: Tensor
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def empty(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DType = DType.float32,
        device: Device | str = "cpu",
    ) -> LayerCache:
        """Memory for `num_blocks` blocks, all zeros.

        Raises:
            OutOfMemoryError: the device has not enough memory.
        """
        device = Device(device)
        shapes = implementation("attention", device).cache_shapes(
            num_blocks, block_size, num_kv_heads, head_dim
        )
        keys, values = (Tensor.zeros(shape, dtype, device) for shape in shapes)
        return cls(keys, values, num_blocks, block_size, num_kv_heads, head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def grown(self, num_blocks: int) -> LayerCache:
        """A larger cache that begins with the blocks of this one."""
        larger = LayerCache.empty(
            num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.keys.dtype, self.keys.device
        )
        larger.keys[: self.num_blocks].copy_(self.keys)
        larger.values[: self.num_blocks].copy_(self.values)
        return larger
