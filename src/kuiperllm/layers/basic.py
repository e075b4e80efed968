"""Embedding, linear layer, norm and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence

from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, Tensor
from kuiperllm.layers.weights import WeightLoader
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight, linear
from kuiperllm.ops.rms_norm import rms_norm
from kuiperllm.ops.rope import rope
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

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return linear(x, self.weight)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual [T, N] += the projection of x [T, K]."""
        linear(x, self.weight, out=residual, accumulate=True)


class Embedding:
    """Token ids [T] to vectors [T, D]."""

    def __init__(self, weight: LinearWeight) -> None:
        self.weight = weight

    def __call__(self, ids: Tensor) -> Tensor:
        """int32 [T] -> float32 [T, D]."""
        return embedding(ids, self.weight)


class RMSNorm:
    """Root mean square norm with a learned weight."""

    def __init__(self, weights: WeightLoader, name: str, size: int, eps: float) -> None:
        self.weight = weights.vector(f"{name}.weight", size)
        self.eps = eps

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Normalize the rows of x; `out` may be x."""
        return rms_norm(x, self.weight, self.eps, out=out)


class RotaryEmbedding:
    """Rotates queries and keys by their position; holds the table of angles, which grows with the context."""

    def __init__(self, config: ModelConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self._table = Tensor.empty((0, config.head_dim))

    @property
    def num_positions(self) -> int:
        """How many positions the table covers."""
        return self._table.shape[0]

    def reserve(self, num_positions: int) -> None:
        """Cover at least this many positions. Graphs that were captured before keep the table they saw."""
        if num_positions > self.num_positions:
            config = self._config
            table = cos_sin_table(config.head_dim, config.rope_theta, num_positions, config.rope_scaling)
            self._table = Tensor.from_numpy(table).to(self._device)

    def __call__(self, x: Tensor, positions: Tensor) -> None:
        """Rotate x [T, heads, d] in place."""
        rope(x, positions, self._table)
