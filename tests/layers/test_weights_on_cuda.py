"""`WeightLoader` on a GPU: what is stacked, converted or rounded there comes out as on the CPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_weight_loader import InMemory, floats

from kuiperllm.checkpoint.base import Weight
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import CheckpointError
from kuiperllm.layers import WeightLoader
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.quant.q8 import quantize_q8


def values(weight: LinearWeight) -> np.ndarray[Any, Any]:
    """The matrix, as float32."""
    ids = Tensor.from_numpy(np.arange(weight.out_features, dtype=np.int32)).to(weight.device)
    return embedding(ids, weight).numpy()


@pytest.mark.parametrize("sizes", [(32, 16, 16), (24, 8, 9)])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": DType.float32}, {"dtype": DType.float16}, {"quant": "q8", "group_size": 32}]
)
@pytest.mark.parametrize("group_size", [0, 48, 96])
def test_the_same_as_on_the_cpu(
    sizes: tuple[int, ...], options: dict[str, Any], group_size: int, cuda: Device
) -> None:
    parts: dict[str, Weight] = {
        f"{name}.weight": floats(size, 96, ml_dtypes.bfloat16)
        for name, size in zip("qkv", sizes, strict=True)
    }
    parts |= {f"{name}.bias": floats(1, size)[0] for name, size in zip("qkv", sizes, strict=True)}
    if group_size:  # int8 beside floating point; groups of 48 are no multiples of 32, and are unpacked
        parts["k.weight"] = quantize_q8(floats(sizes[1], 96), group_size)
    made = [
        WeightLoader(InMemory(parts), device, **options).matrices(list("qkv"), list(sizes), 96, bias=True)
        for device in (Device("cpu"), cuda)
    ]
    for here, there in zip(*made, strict=True):
        assert here.format == there.format
        np.testing.assert_array_equal(values(there), values(here))
        assert here.bias is not None
        assert there.bias is not None
        n = here.out_features
        np.testing.assert_array_equal(there.bias.numpy()[:n], here.bias.numpy()[:n])


def test_what_cannot_be_quantized_is_named(cuda: Device) -> None:
    parts: dict[str, Weight] = {f"{name}.weight": floats(32, 64) for name in "qkv"}
    damaged = floats(32, 64)
    damaged[20, 3] = np.nan
    parts["k.weight"] = damaged
    loader = WeightLoader(InMemory(parts), cuda, quant="q8")
    with pytest.raises(CheckpointError, match=r"^memory: weights of k: a weight is NaN or infinite"):
        loader.matrices(list("qkv"), [32, 32, 32], 64)
