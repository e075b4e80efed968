"""Linear layer, embedding, norm and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence

from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.layers.weights import WeightLoader
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.norm_linear import norm_linear
from kuiperllm.ops.norm_swiglu import norm_swiglu
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.rope.frequencies import cos_sin_table
from kuiperllm.ops.silu_mul import silu_mul


class Linear:
    """One or several projections of the same input, stacked: y = x W^T + bias.

    Args:
        weights: one matrix, or several whose results lie side by side.
    """

    def __init__(self, *weights: LinearWeight) -> None:
        self.weights = weights
        self.out_features = sum(weight.out_features for weight in weights)

    @classmethod
    def load(
        cls,
        weights: WeightLoader,
        names: Sequence[str],
        sizes: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
    ) -> Linear:
        """See `WeightLoader.matrices`."""
        return cls(*weights.matrices(names, sizes, columns, bias=bias))

    @property
    def weight(self) -> LinearWeight:
        """The matrix, where there is one."""
        (weight,) = self.weights
        return weight

    def of_norm(
        self, x: Tensor, norm: RMSNorm, dtype: DType | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """[T, K] -> [T, N]: the projection of the normalized x, of x's type or another."""
        if out is None:
            out = Tensor.empty((x.shape[0], self.out_features), dtype or x.dtype, x.device)
        if len(self.weights) == 1:
            return norm_linear(x, norm.weight, norm.eps, self.weight, out=out)
        normalized = rms_norm(x, norm.weight, norm.eps)
        first = 0
        for weight in self.weights:
            after = first + weight.out_features
            linear(normalized, weight, out=out[:, first:after])
            first = after
        return out

    def swiglu_of_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """[T, K] -> [T, N / 2]: silu(gate) * up of the normalized x, where the rows are gate, then up."""
        if len(self.weights) == 1:
            return norm_swiglu(x, norm.weight, norm.eps, self.weight)
        return silu_mul(self.of_norm(x, norm))

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual [T, N] += the projection of x [T, K]."""
        linear(x, self.weight, out=residual, accumulate=True)


class Embedding:
    """Token ids [T] to vectors [T, D]."""

    def __init__(self, weight: LinearWeight) -> None:
        self.weight = weight

    def __call__(self, ids: Tensor, dtype: DType) -> Tensor:
        """int32 [T] -> [T, D] of a floating-point type."""
        return embedding(ids, self.weight, dtype=dtype)


class RMSNorm:
    """Root mean square norm with a learned weight; what follows it applies it (see `ops.norm_linear`)."""

    def __init__(self, weights: WeightLoader, name: str, size: int, eps: float) -> None:
        self.weight = weights.vector(f"{name}.weight", size)
        self.eps = eps


class RotaryEmbedding:
    """The angles that queries and keys are turned by; their table grows with the context."""

    def __init__(self, config: ModelConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self.table = Tensor.empty((0, config.head_dim))
        """float32 [positions, d]: see `ops.rope`."""

    @property
    def num_positions(self) -> int:
        """How many positions the table covers."""
        return self.table.shape[0]

    def reserve(self, num_positions: int) -> None:
        """Cover at least this many positions. Graphs that were captured before keep the table they saw."""
        if num_positions > self.num_positions:
            config = self._config
            table = cos_sin_table(config.head_dim, config.rope_theta, num_positions, config.rope_scaling)
            self.table = Tensor.from_numpy(table).to(self._device)
