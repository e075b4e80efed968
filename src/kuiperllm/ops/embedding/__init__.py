"""Rows of a table, by token id."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import DeviceError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.linear import SCHEMES, LinearWeight, Rows, pack, random_rows
from kuiperllm.quant import QuantTensor, Scheme

CONTRACT = Contract("embedding", ids="T : int32", out="T D : activation")


def embedding(
    ids: Tensor, table: LinearWeight, *, dtype: DType = DType.float32, out: Tensor | None = None
) -> Tensor:
    """Row `ids[t]` of the table for each t.

    The table is a `LinearWeight`, so that a model whose output layer shares its weights with the embedding
    keeps them once.

    Args:
        ids: int32 [T], each 0 <= id < V; the row of any other id is zeros.
        table: [V, D].
        dtype: of the result.
        out: [T, D] (default: a new tensor).

    Raises:
        ShapeError: the shapes do not match.
        DTypeError: `ids` is not int32.
        DeviceError: ids and table live on different devices.
    """
    if out is None:
        out = Tensor.empty((*ids.shape, table.in_features), dtype, ids.device)
    CONTRACT.check(ids, out)
    if table.device is not ids.device:
        raise DeviceError(f"embedding: ids are on {ids.device}, the table is on {table.device}")
    implementation("embedding", ids.device, out.dtype).embedding(ids, table, out)
    return out


def reference(ids: NDArray[Any], table: Rows) -> NDArray[Any]:
    """The rows in NumPy."""
    matrix = table.dequantize() if isinstance(table, QuantTensor) else table.astype(np.float32)
    inside = (ids >= 0) & (ids < len(matrix))
    rows: NDArray[Any] = np.where(inside[:, None], matrix[np.where(inside, ids, 0)], np.float32(0))
    return rows


def _prepare(ids: Tensor, table: Tensor | QuantTensor) -> dict[str, Any]:
    return {"ids": ids, "table": pack(table, None, ids.device)}


def _inputs(tokens: int, vocab: int, width: int, format: str | Scheme, *, shuffled: bool = False) -> Any:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        ids = rng.integers(-1, vocab + 1, tokens).astype(np.int32)  # one outside at either end
        return {"ids": ids, "table": random_rows(rng, vocab, width, format, shuffled=shuffled)}

    return make


def _case(name: str, *shape: Any, shuffled: bool = False) -> Case:
    return Case(name, embedding, reference, _inputs(*shape, shuffled=shuffled), prepare=_prepare)


CASES = [
    *(
        _case(f"{format}-{tokens}x{vocab}x{width}", tokens, vocab, width, format)
        for format in ("float32", "float16", "bfloat16")
        for tokens, vocab, width in ((1, 1, 1), (9, 37, 33), (40, 16, 64))
    ),
    *(_case(name, 40, 37, 512, scheme) for name, scheme in SCHEMES.items()),
    _case("q8-g16-48", 5, 20, 48, SCHEMES["q8-g16"]),
    _case("q4-g32-shuffled", 20, 37, 96, SCHEMES["q4-g32"], shuffled=True),
]
