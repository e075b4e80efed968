"""`WeightLoader`: formats, stacking, rounding to int8 groups; what it takes and refuses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kuiperllm.checkpoint.base import Checkpoint, TensorInfo, Weight
from kuiperllm.config import ModelConfig
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import CheckpointError, UnsupportedError
from kuiperllm.layers import Linear, RMSNorm, ShapeChecker, WeightLoader
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight, WeightFormat
from kuiperllm.quant import QuantTensor, int8_tensor, q8, quantize_q8
from tiny_models import BASE

CPU = Device("cpu")
rng = np.random.default_rng(4)


class InMemory(Checkpoint):
    """A checkpoint of given arrays; notes what is released."""

    format = "memory"

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        infos = {
            name: TensorInfo(
                name,
                w.scheme.name if isinstance(w, QuantTensor) else w.dtype.name,
                tuple(w.shape),
                int(w.nbytes),
                w.scheme if isinstance(w, QuantTensor) else None,
            )
            for name, w in weights.items()
        }
        super().__init__(Path("memory"), ModelConfig.from_hf(BASE), infos)
        self.weights = weights
        self.released: list[str] = []

    def _load(self, info: TensorInfo) -> Weight:
        return self.weights[info.name]

    def _release(self, info: TensorInfo) -> None:
        self.released.append(info.name)

    def close(self) -> None: ...


def floats(rows: int, columns: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal((rows, columns)).astype(dtype)


def values(weight: LinearWeight) -> np.ndarray:
    """The matrix as it was packed: an embedding looks its rows up without rounding anything."""
    ids = Tensor.from_numpy(np.arange(weight.out_features, dtype=np.int32))
    return embedding(ids, weight).numpy()


def load(parts: dict[str, Weight], *, bias: bool = False, **options: Any) -> LinearWeight:
    loader = WeightLoader(InMemory(parts), CPU, **options)
    names = [name.removesuffix(".weight") for name in parts if name.endswith(".weight")]
    sizes = [parts[f"{name}.weight"].shape[0] for name in names]
    (weight,) = loader.matrices(names, sizes, parts[f"{names[0]}.weight"].shape[1], bias=bias)
    return weight


def assert_holds(weight: LinearWeight, expected: QuantTensor) -> None:
    assert weight.format == expected.scheme
    np.testing.assert_array_equal(values(weight), expected.dequantize())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_q8_of_floats_is_what_quantize_q8_makes(dtype: Any, group_size: int) -> None:
    matrix = floats(75, 256, dtype)
    weight = load({"a.weight": matrix}, quant="q8", group_size=group_size)
    assert_holds(weight, quantize_q8(matrix, group_size))


@pytest.mark.parametrize(("columns", "asked", "group"), [(96, 64, 32), (192, 128, 64), (128, 64, 64)])
def test_groups_that_do_not_divide_the_columns_are_halved(columns: int, asked: int, group: int) -> None:
    matrix = floats(20, columns)
    assert_holds(load({"a.weight": matrix}, quant="q8", group_size=asked), quantize_q8(matrix, group))


def test_columns_that_no_group_divides_stay_floats_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts: dict[str, Weight] = {f"{name}.weight": floats(20, 40, np.float16) for name in "ab"}
    loader = WeightLoader(InMemory(parts), CPU, quant="q8")
    with caplog.at_level(logging.WARNING, "kuiperllm"):
        weights = [loader.matrix(name, 20, 40) for name in "ab"]
    assert [weight.format for weight in weights] == [DType.float16, DType.float16]
    np.testing.assert_array_equal(values(weights[1]), parts["b.weight"].astype(np.float32))
    assert [record.message for record in caplog.records] == [
        "rows of 40 weights cannot be cut into groups of 32; not quantized"
    ]


@pytest.mark.parametrize("sizes", [(16, 32, 16), (24, 8, 8), (7, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("quant", [None, "q8"])
def test_stacked_parts_with_biases(sizes: tuple[int, ...], quant: str | None) -> None:
    parts: dict[str, Weight] = {f"{n}.weight": floats(s, 64) for n, s in zip("qkv", sizes, strict=True)}
    biases = {f"{n}.bias": floats(1, s)[0] for n, s in zip("qkv", sizes, strict=True)}
    weight = load({**parts, **biases}, bias=True, quant=quant)
    whole = np.concatenate([parts[f"{n}.weight"] for n in "qkv"])
    if quant:
        assert_holds(weight, quantize_q8(whole, 64))
    else:
        np.testing.assert_array_equal(values(weight), whole)
    assert weight.bias is not None
    found = weight.bias.numpy()
    np.testing.assert_array_equal(found[: sum(sizes)], np.concatenate(list(biases.values())))
    assert not found[sum(sizes) :].any()


@pytest.mark.parametrize("sizes", [(32, 16), (24, 8)])
@pytest.mark.parametrize("scales", [np.float16, np.float32])
def test_stored_groups_are_kept_as_they_are(sizes: tuple[int, ...], scales: Any) -> None:
    """Also with float32 scales, as llama2.c has them, and with rows that fill no block."""
    stored = {}
    for name, size in zip("ab", sizes, strict=True):
        made = quantize_q8(floats(size, 96), 32)
        changed = (made.scales * np.float32(1.01)).astype(scales)
        stored[f"{name}.weight"] = int8_tensor(made.codes.data.view(np.int8), changed)
    for options in ({}, {"quant": "q8", "group_size": 64}, {"dtype": DType.bfloat16}):
        weight = load(dict(stored), **options)
        assert weight.format == q8(32, DType.of(np.dtype(scales)))
        np.testing.assert_array_equal(
            values(weight), np.concatenate([part.dequantize() for part in stored.values()])
        )


@pytest.mark.parametrize("sizes", [(32, 16), (24, 8)])
@pytest.mark.parametrize(("options", "format"), [({}, DType.float32), ({"quant": "q8"}, q8(64))])
def test_parts_of_which_only_some_are_quantized(
    sizes: tuple[int, ...], options: dict[str, Any], format: WeightFormat
) -> None:
    """Each is kept as it is: two matrices; neighbours of one format are one."""
    stored, matrix = quantize_q8(floats(sizes[0], 64), 32), floats(sizes[1], 64)
    parts = {"a.weight": stored, "b.weight": matrix, "c.weight": matrix}
    loader = WeightLoader(InMemory(parts), CPU, **options)
    weights = loader.matrices(list("abc"), [*sizes, sizes[1]], 64)
    assert [weight.format for weight in weights] == [q8(32), format]
    np.testing.assert_array_equal(values(weights[0]), stored.dequantize())
    expected = quantize_q8(matrix, 64).dequantize() if options else matrix
    np.testing.assert_array_equal(values(weights[1]), np.concatenate([expected, expected]))


@pytest.mark.parametrize("tokens", [1, 5])
def test_projections_of_several_formats_give_what_each_gives(tokens: int) -> None:
    stored, matrix = quantize_q8(floats(24, 64), 32), floats(40, 64)
    parts = {"a.weight": stored, "b.weight": matrix, "n.weight": 1 + floats(1, 64)[0] / 8}
    parts |= {"a.bias": floats(1, 24)[0], "b.bias": floats(1, 40)[0]}
    loader = WeightLoader(InMemory(parts), CPU)
    norm = RMSNorm(loader, "n", 64, 1e-5)
    both = Linear.load(loader, ["a", "b"], [24, 40], 64, bias=True)
    alone = [Linear.load(loader, [name], [size], 64, bias=True) for name, size in (("a", 24), ("b", 40))]
    x = Tensor.from_numpy(floats(tokens, 64))
    expected = np.concatenate([linear.of_norm(x, norm).numpy() for linear in alone], axis=1)
    np.testing.assert_array_equal(both.of_norm(x, norm).numpy(), expected)
    gate, up = expected[:, :32].astype(np.float64), expected[:, 32:]
    gated = both.swiglu_of_norm(x, norm).numpy()
    np.testing.assert_allclose(gated, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_conversion(stored: Any, wanted: str) -> None:
    matrix = floats(33, 50, stored)
    weight = load({"a.weight": matrix}, dtype=DType(wanted))
    assert weight.format is DType(wanted)
    expected = matrix.astype(DType(wanted).numpy).astype(np.float32)
    np.testing.assert_array_equal(values(weight), expected)
    assert load({"a.weight": matrix}).format is DType.of(matrix.dtype)


def test_large_matrices_are_packed_piece_by_piece() -> None:
    matrix = floats(5000, 512, np.float16)  # pieces of 8 MiB as float32: 4096 rows
    np.testing.assert_array_equal(values(load({"a.weight": matrix})), matrix.astype(np.float32))
    assert_holds(load({"a.weight": matrix}, quant="q8"), quantize_q8(matrix, 64))


def test_vectors_are_float32_and_tensors_are_released_with_progress() -> None:
    norm = floats(1, 40, ml_dtypes.bfloat16)[0]
    checkpoint = InMemory({"n.weight": norm, "a.weight": floats(16, 40), "a.bias": floats(1, 16)[0]})
    told: list[tuple[int, int]] = []
    loader = WeightLoader(checkpoint, CPU, progress=lambda done, total: told.append((done, total)))
    vector = loader.vector("n.weight", 40)
    np.testing.assert_array_equal(vector.numpy(), norm.astype(np.float32))
    loader.matrix("a", 16, 40, bias=True)
    assert checkpoint.released == ["n.weight", "a.weight", "a.bias"]
    total = 80 + 16 * 40 * 4 + 64
    assert told == [(80, total), (80 + 16 * 40 * 4, total), (total, total)]
    assert loader.packed_bytes == 160 + 16 * 40 * 4 + 64


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WeightLoader, ShapeChecker])
def test_missing_tensors_and_wrong_shapes(kind: type[WeightLoader]) -> None:
    checkpoint = InMemory(
        {"a.weight": floats(16, 40), "n.weight": floats(1, 8)[0], "a.bias": floats(1, 8)[0]}
    )
    loader = kind(checkpoint, CPU)
    with pytest.raises(CheckpointError, match=r"no tensor 'b.weight' among its 3 tensors"):
        loader.matrices(["a", "b"], [16, 16], 40)
    with pytest.raises(CheckpointError, match=r"a.weight has the shape \[16, 40\].* asks for \[16, 48\]"):
        loader.matrix("a", 16, 48)
    with pytest.raises(CheckpointError, match=r"a.bias has the shape \[8\].* asks for \[16\]"):
        loader.matrix("a", 16, 40, bias=True)
    with pytest.raises(CheckpointError, match=r"n.weight has the shape \[8\].* asks for \[9\]"):
        loader.vector("n.weight", 9)
    with pytest.raises(CheckpointError, match=r"no tensor 'm\.weight'"):
        loader.vector("m.weight", 8)
    assert loader.packed_bytes == 0
    assert checkpoint.released == []


@pytest.mark.parametrize(
    ("bad", "error", "reason"),
    [
        (np.nan, CheckpointError, "a weight is NaN or infinite"),
        (-np.inf, CheckpointError, "a weight is NaN or infinite"),
        (1e7, UnsupportedError, "a weight is too large"),
    ],
)
def test_what_cannot_be_quantized_is_named(bad: float, error: type[Exception], reason: str) -> None:
    parts: dict[str, Weight] = {f"model.{name}_proj.weight": floats(32, 64) for name in "qkv"}
    damaged = floats(32, 64)
    damaged[20, 3] = bad
    parts["model.k_proj.weight"] = damaged
    with pytest.raises(error, match=rf"^memory: weights of model\.k_proj: {reason}"):
        load(dict(parts), quant="q8")
    parts["model.k_proj.weight"] = damaged[5:]  # no whole blocks: the three are packed together
    with pytest.raises(error, match=rf"of model\.q_proj, model\.k_proj, model\.v_proj: {reason}"):
        load(dict(parts), quant="q8")
