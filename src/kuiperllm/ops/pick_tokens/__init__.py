"""The tokens that a pass begins with, some of which only the device knows yet."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

CONTRACT = Contract("pick_tokens", given="T : int32", source="T : int32", newest="S : int32", out="T : int32")


def pick_tokens(given: Tensor, source: Tensor, newest: Tensor, *, out: Tensor | None = None) -> Tensor:
    """newest[source[t]] where source[t] is not negative, and given[t] elsewhere.

    Args:
        given: int32 [T], tokens that the host knows.
        source: int32 [T], below S.
        newest: int32 [S], what the last pass chose; may be memory of the host that the device can address.
        out: int32 [T], where the result goes; must not overlap `newest` (default: a new tensor).

    Raises:
        ShapeError: the shapes do not match.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    if out is None:
        out = Tensor.empty(given.shape, given.dtype, given.device)
    CONTRACT.check(given, source, newest, out)
    implementation("pick_tokens", given.device).pick_tokens(given, source, newest, out)
    return out


def reference(given: NDArray[Any], source: NDArray[Any], newest: NDArray[Any]) -> NDArray[Any]:
    """NumPy's indexing."""
    picked: NDArray[Any] = np.where(source >= 0, newest[np.maximum(source, 0)], given)
    return picked


def _inputs(tokens: int, sequences: int) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {
            "given": rng.integers(0, 1000, tokens, np.int32),
            "source": rng.integers(-1, sequences, tokens, np.int32),
            "newest": rng.integers(1000, 2000, sequences, np.int32),
        }

    return make


CASES = [
    Case("one", pick_tokens, reference, _inputs(1, 1)),
    Case("none", pick_tokens, reference, _inputs(0, 3)),
    Case("many", pick_tokens, reference, _inputs(700, 40)),
]
