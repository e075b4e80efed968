"""Linear layer, embedding, norm and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence

from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.layers.weights import WeightLoader
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.norm_linear import norm_linear
from kuiperllm.ops.rope.frequencies import cos_sin_table


class Linear:
    """One or several projections of the same input, stacked: y = x W^T + bias."""

    def __init__(self, weight: LinearWeight) -> None:
        self.weight = weight

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
        """See `WeightLoader.matrix`."""
        return cls(weights.matrix(names, sizes, columns, bias=bias))

    def of_norm(self, x: Tensor, norm: RMSNorm, dtype: DType | None = None) -> Tensor:
        """[T, K] -> [T, N]: the projection of the normalized x, of x's type or another."""
        return norm_linear(x, norm.weight, norm.eps, self.weight, dtype=dtype)

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
