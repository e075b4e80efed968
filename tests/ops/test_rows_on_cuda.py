"""CUDA kernels that walk along rows: any alignment, in place, many rows, ids and positions that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kuiperllm.backends.cuda import rows as rows_of_kernels
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.add import add
from kuiperllm.ops.contract import ACTIVATIONS
from kuiperllm.ops.embedding import embedding
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.rms_norm import add_rms_norm, rms_norm
from kuiperllm.ops.rms_norm import reference as rms_norm_of
from kuiperllm.ops.rope import reference as rope_of
from kuiperllm.ops.rope import rope
from kuiperllm.ops.silu_mul import reference as silu_mul_of
from kuiperllm.ops.silu_mul import silu_mul
from kuiperllm.ops.softmax import reference as softmax_of
from kuiperllm.ops.softmax import softmax
from kuiperllm.quant import Scheme, int8_tensor, quantize_q8
from kuiperllm.quant.synthetic import random_tensor

INF, NAN = float("inf"), float("nan")
GUARD = 7.0
rng = np.random.default_rng(11)


def normal(*shape: int, dtype: DType = DType.float32) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape, np.float32).astype(dtype.numpy)


def within(array: np.ndarray[Any, Any], before: int, behind: int, device: Device) -> tuple[Tensor, Tensor]:
    """A matrix on the device, inside of a larger one that is otherwise `GUARD`; both."""
    rows, width = array.shape
    padded = np.full((rows, before + width + behind), GUARD, array.dtype)
    padded[:, before : before + width] = array
    whole = Tensor.from_numpy(padded).to(device)
    return whole[:, before : before + width], whole


def assert_guarded(whole: Tensor, before: int, width: int) -> None:
    found = whole.numpy().astype(np.float32)
    assert (found[:, :before] == GUARD).all()
    assert (found[:, before + width :] == GUARD).all()


def assert_close(found: Tensor, expected: np.ndarray[Any, Any]) -> None:
    tolerance = {DType.float32: 1e-5, DType.float16: 4e-3, DType.bfloat16: 3e-2}[found.dtype]
    np.testing.assert_allclose(found.numpy().astype(np.float32), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize(
    ("width", "before", "behind"),
    [(1, 0, 0), (16, 0, 0), (16, 8, 8), (16, 1, 15), (16, 1, 0), (40, 16, 8), (33, 0, 0), (33, 2, 5)],
)
def test_any_alignment(width: int, before: int, behind: int, dtype: DType, cuda: Device) -> None:
    """Vectors are loaded only where there are some, and nothing is written beside the result."""
    weight = normal(width)
    on_device = Tensor.from_numpy(weight).to(cuda)
    a, b = normal(3, width, dtype=dtype), normal(3, 2 * width, dtype=dtype)
    x, y = a.astype(np.float32), b[:, :width].astype(np.float32)
    calls = {
        "add": lambda s, t, out: (add(s, t[:, :width], out=out), x + y),
        "rms_norm": lambda s, _, out: (rms_norm(s, on_device, 1e-5, out=out), rms_norm_of(x, weight, 1e-5)),
        "add_rms_norm": lambda s, t, out: (
            add_rms_norm(t[:, :width], s, on_device, 1e-5, out=out),
            rms_norm_of(x + y, weight, 1e-5),
        ),
        "silu_mul": lambda _, t, out: (silu_mul(t, out=out), silu_mul_of(b)),
    }
    if dtype is DType.float32:
        calls["softmax"] = lambda s, _, out: (softmax(s, out=out), softmax_of(x))
    for call in calls.values():
        s, _ = within(a, before, behind, cuda)
        t, _ = within(b, before, behind, cuda)
        out, whole = within(np.zeros_like(a), before, behind, cuda)
        found, expected = call(s, t, out)
        assert_close(found, expected)
        assert_guarded(whole, before, width)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("half", "before"), [(8, 0), (8, 1), (5, 0)])
def test_rope_at_any_alignment(half: int, before: int, interleaved: bool, dtype: DType, cuda: Device) -> None:
    x, cos_sin = normal(3, 4 * half, dtype=dtype), normal(6, 2 * half)
    positions = np.array([4, 0, 5], np.int32)
    tensor, whole = within(x, before, 8, cuda)
    heads = x.reshape(3, 2, 2 * half)
    table, places = (Tensor.from_numpy(array).to(cuda) for array in (cos_sin, positions))
    found = rope(tensor.reshape(3, 2, 2 * half), places, table, interleaved=interleaved)
    assert_close(found, rope_of(heads.astype(np.float32), positions, cos_sin, interleaved))
    assert_guarded(whole, before, 4 * half)


def test_positions_outside_the_table_are_taken_for_the_nearest(cuda: Device) -> None:
    x, cos_sin = normal(3, 2, 16), normal(6, 16)
    found = [
        rope(
            Tensor.from_numpy(x).to(cuda),
            Tensor.from_numpy(np.array(positions, np.int32)).to(cuda),
            Tensor.from_numpy(cos_sin).to(cuda),
        ).numpy()
        for positions in ([-1, 6, 2**31 - 1], [0, 5, 5])
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_results_may_replace_operands(dtype: DType, cuda: Device) -> None:
    a, b, weight = normal(2, 40, dtype=dtype), normal(2, 40, dtype=dtype), normal(40)
    x, y = a.astype(np.float32), b.astype(np.float32)
    scale = Tensor.from_numpy(weight).to(cuda)
    tensor = Tensor.from_numpy(a).to(cuda)
    assert_close(rms_norm(tensor, scale, 1e-5, out=tensor), rms_norm_of(x, weight, 1e-5))
    tensor = Tensor.from_numpy(a).to(cuda)
    assert_close(add(tensor, tensor, out=tensor), x + x)
    tensor, residual = Tensor.from_numpy(a).to(cuda), Tensor.from_numpy(b).to(cuda)
    assert_close(add_rms_norm(residual, tensor, scale, 1e-5, out=tensor), rms_norm_of(x + y, weight, 1e-5))
    assert_close(residual, x + y)
    if dtype is DType.float32:
        tensor = Tensor.from_numpy(a).to(cuda)
        assert_close(softmax(tensor, out=tensor), softmax_of(x))


@pytest.mark.parametrize("dtype", [DType.float16, DType.bfloat16])
def test_a_fused_addition_gives_the_same_bits(dtype: DType, cuda: Device) -> None:
    a, b, weight = (
        Tensor.from_numpy(normal(2, 104, dtype=kind)).to(cuda) for kind in (dtype, dtype, DType.float32)
    )
    weight = weight[0]
    total = add(a, b)
    apart = rms_norm(total, weight, 1e-5)
    together = add_rms_norm(a, b, weight, 1e-5)
    np.testing.assert_array_equal(a.numpy(), total.numpy())
    np.testing.assert_array_equal(together.numpy(), apart.numpy())


def test_more_rows_than_a_grid_has(cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of_kernels, "_MAX_GRID_Y", 2)
    x, y, gate_up = normal(5, 24), normal(5, 24), normal(5, 48)
    table = normal(9, 24)
    ids = np.array([3, 0, 8, -1, 5], np.int32)
    a, b, g, i = (Tensor.from_numpy(array).to(cuda) for array in (x, y, gate_up, ids))
    assert_close(add(a, b), x + y)
    assert_close(silu_mul(g), silu_mul_of(gate_up))
    assert_close(softmax(a), softmax_of(x))
    expected = np.where(ids[:, None] >= 0, table[ids], 0)
    np.testing.assert_array_equal(embedding(i, LinearWeight.pack(table, device=cuda)).numpy(), expected)
    positions, cos_sin = np.arange(5, dtype=np.int32), normal(5, 12)
    p, c = (Tensor.from_numpy(array).to(cuda) for array in (positions, cos_sin))
    heads = x.reshape(5, 2, 12)
    assert_close(rope(a.reshape(5, 2, 12), p, c), rope_of(heads, positions, cos_sin))


def test_no_rows(cuda: Device) -> None:
    none = Tensor.zeros((0, 8), DType.float32, cuda)
    weight = Tensor.zeros((8,), DType.float32, cuda)
    assert add(none, none).shape == (0, 8)
    assert rms_norm(none, weight, 1e-5).shape == (0, 8)
    assert add_rms_norm(none, none, weight, 1e-5).shape == (0, 8)
    assert softmax(none).shape == (0, 8)
    assert softmax(Tensor.zeros((3, 0), DType.float32, cuda)).shape == (3, 0)
    assert silu_mul(none).shape == (0, 4)
    ids = Tensor.zeros((0,), DType.int32, cuda)
    assert embedding(ids, LinearWeight.pack(normal(3, 8), device=cuda)).shape == (0, 8)
    assert rope(none.reshape(0, 2, 4), ids, Tensor.zeros((3, 4), DType.float32, cuda)).shape == (0, 2, 4)


@pytest.mark.parametrize("width", [4, 33, 4100])
def test_special_values_of_softmax(width: int, cuda: Device) -> None:
    """In one chunk of a row, and with a whole chunk of minus infinity beside another."""
    x = np.zeros((5, width), np.float32)
    x[0, 1], x[1, 2], x[2], x[3, 1:], x[4, :-1] = NAN, INF, -INF, -INF, -INF
    found = softmax(Tensor.from_numpy(x).to(cuda)).numpy()
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found[3], np.eye(1, width)[0])
    np.testing.assert_array_equal(found[4], np.eye(1, width, width - 1)[0])


def test_special_values_of_sums_and_silu(cuda: Device) -> None:
    x = np.ones((2, 16), np.float32)
    x[0, 1], x[1, 2] = NAN, INF
    tensor, ones = (Tensor.from_numpy(array).to(cuda) for array in (x, np.ones(16, np.float32)))
    found = rms_norm(tensor, ones, 1e-5).numpy()
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1, 2])
    assert (np.delete(found[1], 2) == 0).all()
    gate_up = np.ones((1, 16), np.float32)
    gate_up[0, :4] = [NAN, INF, 0.0, -200.0]
    found = silu_mul(Tensor.from_numpy(gate_up).to(cuda)).numpy()[0]
    assert np.isnan(found[0])
    assert found[1] == INF
    assert abs(found[2:4]).max() < 1e-35


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "q8", "q8-float32"])
@pytest.mark.parametrize("columns", [64, 48])
def test_embedding_in_any_type(stored: str, columns: int, dtype: DType, cuda: Device) -> None:
    matrix = normal(21, columns)
    if stored.startswith("q8"):
        rows = quantize_q8(matrix, 16 if columns == 48 else 32)
        if stored == "q8-float32":
            scales = rows.scales.astype(np.float32) * np.float32(1.001)
            rows = int8_tensor(rows.codes.data.view(np.int8), scales)
        values = rows.dequantize()
    else:
        rows = matrix.astype(DType(stored).numpy)
        values = rows.astype(np.float32)
    ids = np.array([20, -1, 0, 21, 7], np.int32)
    found = embedding(
        Tensor.from_numpy(ids).to(cuda), LinearWeight.pack(rows, device=cuda), dtype=dtype
    ).numpy()
    expected = np.zeros((5, columns), np.float32)
    expected[[0, 2, 4]] = values[[20, 0, 7]]
    np.testing.assert_array_equal(found, expected.astype(dtype.numpy))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        *(Scheme(bits, 32, DType.float16, "minimum") for bits in (2, 3, 4, 5, 6, 8)),
        Scheme(4, 64, DType.float16, "zeros"),
        Scheme(8, 32, DType.float32, "e4m3"),
        Scheme(6, 16, DType.int8),
        Scheme(4, 32, DType.int8, "minimum"),
    ],
    ids=repr,
)
def test_embedding_of_any_scheme(scheme: Scheme, shuffled: bool, cuda: Device) -> None:
    table = random_tensor(np.random.default_rng(0), scheme, 21, 256, shuffled=shuffled)
    ids = np.array([20, -1, 0, 21, 7], np.int32)
    found = embedding(
        Tensor.from_numpy(ids).to(cuda), LinearWeight.pack(table, device=cuda), dtype=DType.float32
    )
    expected = np.zeros((5, 256), np.float32)
    expected[[0, 2, 4]] = table.dequantize()[[20, 0, 7]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
