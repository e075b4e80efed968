"""Normalizing while x is rounded to int8 groups is what normalizing first is."""

from __future__ import annotations

import numpy as np
import pytest

from kuiperllm.core import Device, Tensor
from kuiperllm.ops.linear import SCHEMES, LinearWeight, linear
from kuiperllm.ops.norm_linear import norm_linear
from kuiperllm.ops.norm_swiglu import norm_swiglu
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.silu_mul import silu_mul
from kuiperllm.quant.synthetic import random_tensor


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(
    ("name", "columns", "shuffled"),
    [("q4-g128-zeros", 384, True), ("q8-g16", 48, False), ("q4-k", 512, False), ("q6-k", 256, False)],
)
def test_norm_on_the_way(name: str, columns: int, shuffled: bool, tokens: int) -> None:
    rng = np.random.default_rng(0)
    rows = random_tensor(rng, SCHEMES[name], 64, columns, shuffled=shuffled)
    weight = LinearWeight.pack(rows, None, device=Device("cpu"))
    x = Tensor.from_numpy(rng.standard_normal((tokens, columns), np.float32))
    scale = Tensor.from_numpy(rng.uniform(0.5, 1.5, columns).astype(np.float32))
    expected = linear(rms_norm(x, scale, 1e-6), weight)
    np.testing.assert_allclose(norm_linear(x, scale, 1e-6, weight).numpy(), expected.numpy(), 1e-6, 1e-6)
    gated = silu_mul(expected)
    np.testing.assert_allclose(norm_swiglu(x, scale, 1e-6, weight).numpy(), gated.numpy(), 1e-5, 1e-6)
