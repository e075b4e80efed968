"""Tensors: making, viewing, copying, converting; NumPy is the truth."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuiperllm.core import Buffer, Device, DType, Tensor
from kuiperllm.errors import DeviceError, DTypeError, OutOfMemoryError, ShapeError, UsageError

CPU = Device("cpu")


def numbered(*shape: int, dtype: DType = DType.int32) -> tuple[Tensor, np.ndarray]:
    """A tensor whose values are 0, 1, 2 …, and the same as an array of its own."""
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype.numpy)
    tensor = Tensor.empty(shape, dtype)
    tensor.numpy()[...] = array
    return tensor, array


def same(tensor: Tensor, array: np.ndarray) -> bool:
    """Equal in shape, type and values; the flag of contiguity agrees as well."""
    values = tensor.numpy()
    return (
        tensor.shape == array.shape
        and values.dtype == array.dtype
        and np.array_equal(values, array)
        and tensor.is_contiguous == values.flags.c_contiguous
    )


# --- making -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,), (3, 0, 2)])
def test_empty_zeros_full(dtype: DType, shape: tuple[int, ...]) -> None:
    empty = Tensor.empty(shape, dtype)
    assert (empty.shape, empty.dtype, empty.device, empty.offset) == (shape, dtype, CPU, 0)
    assert empty.numel == empty.size == math.prod(shape)
    assert empty.nbytes == empty.numel * dtype.itemsize == empty.numpy().nbytes
    assert empty.itemsize == dtype.itemsize
    assert empty.ndim == len(shape)
    assert empty.is_contiguous
    assert empty.writable
    assert same(Tensor.zeros(shape, dtype.value), np.zeros(shape, dtype.numpy))
    assert same(Tensor.full(shape, 7, dtype), np.full(shape, 7, dtype.numpy))


def test_zeros_clears_reused_memory() -> None:
    for _ in range(3):
        tensor = Tensor.zeros(1000)
        assert not tensor.numpy().any()
        tensor.numpy()[:] = 1
        del tensor


def test_shapes_may_be_an_integer_a_list_or_numpy_integers() -> None:
    assert Tensor.empty(3).shape == (3,)
    assert Tensor.empty([2, 3]).shape == (2, 3)
    shape = Tensor.empty((np.int64(2), 3)).shape
    assert shape == (2, 3)
    assert all(type(size) is int for size in shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, -1), r"^shape \[2, -1\]: sizes must not be negative$"),
        ((2.5,), r"^shape \(2.5,\): must be integers$"),
        ("ab", "shape 'ab': must be integers"),
        (None, "must be integers"),
        (
            (1 << 40, 1 << 40),
            r"^shape \[1099511627776, 109.*\]: too large, its bytes do not fit into 64 bits$",
        ),
        ((1 << 63,), "too large"),
    ],
)
def test_impossible_shapes(shape: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Tensor.empty(shape)


def test_other_impossible_arguments() -> None:
    with pytest.raises(DTypeError, match="data type 'float64' is not supported"):
        Tensor.empty(3, "float64")
    with pytest.raises(DeviceError, match="unknown device 'tpu'"):
        Tensor.empty(3, device="tpu")
    with pytest.raises(OutOfMemoryError):
        Tensor.empty(1 << 60, "int8")
    for dtype, value in (("int8", 300), ("int32", math.nan), ("int32", 1.5), ("float16", 1e6), ("int8", "x")):
        with pytest.raises(DTypeError, match=f"^{dtype} cannot hold the value {value!r}$"):
            Tensor.full(3, value, dtype)
    assert Tensor.full(1, -math.inf, "float16").item() == -math.inf
    assert Tensor.full(1, 0.1, "bfloat16").item() == 0.10009765625


def test_a_view_on_a_buffer_is_bounds_checked() -> None:
    buffer = CPU.allocator.allocate(64)
    assert Tensor(buffer, "float32", (4, 4)).strides == (4, 1)
    assert Tensor(buffer, "float32", 4, offset=48).address == buffer.address + 48
    assert Tensor(buffer, "float32", (2, 8), (8, -1), 28).shape == (2, 8)
    assert Tensor(buffer, "float32", (100, 0), offset=64).numel == 0
    for arguments in (
        ((17,),),
        ((4, 4), None, 4),
        ((4, 4), (5, 1)),
        ((4,), (-1,)),
        ((4,), (-1,), 8),
        ((4,), None, -4),
        ((4, 4), (1,)),
        ((0,), None, 68),
    ):
        with pytest.raises(ShapeError, match=r"^shape \["):
            Tensor(buffer, "float32", *arguments)
    with pytest.raises(ShapeError, match="offset 2 is not a multiple of 4 bytes"):
        Tensor(buffer, "float32", 4, offset=2)


# --- from and to NumPy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DType))
def test_numpy_shares_memory_both_ways(dtype: DType) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype.numpy)
    for view in (array, array[::2, ::-1], array.T, array[1, 2:], array[1:1], array[-1, -1, None]):
        tensor = Tensor.from_numpy(view)
        assert same(tensor, view)
        assert tensor.numel == 0 or tensor.address == view.ctypes.data
        assert np.shares_memory(tensor.numpy(), view) == (view.size > 0)
    Tensor.from_numpy(array).numpy()[0, 0] = 9
    assert array[0, 0] == 9
    copied = Tensor.from_numpy(array, copy=True)
    copied.numpy()[0, 0] = 1
    assert array[0, 0] == 9
    assert copied.address % 64 == 0


def test_bfloat16_comes_as_ml_dtypes() -> None:
    array = Tensor.full(3, 1.5, "bfloat16").numpy()
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype(np.float32).tolist() == [1.5] * 3


def test_arrays_that_cannot_be_shared_are_copied() -> None:
    swapped = np.arange(6, dtype=">i4").reshape(2, 3)
    packed = np.zeros(4, np.dtype([("tag", "i1"), ("value", "<i4")]))["value"]  # stride 5: not whole elements
    packed[:] = [1, 2, 3, 4]
    shifted = np.frombuffer(bytearray(b"x" + np.arange(3, dtype=np.int32).tobytes()), np.int32, 3, 1)
    for array in (swapped, packed, shifted):
        tensor = Tensor.from_numpy(array)
        assert tensor.tolist() == array.tolist()
        assert not np.shares_memory(tensor.numpy(), array)
        assert tensor.writable


def test_read_only_arrays() -> None:
    array = np.arange(6, dtype=np.float32)
    array.flags.writeable = False
    tensor = Tensor.from_numpy(array)
    assert not tensor.writable
    assert not tensor[1:].numpy().flags.writeable
    with pytest.raises(UsageError, match=r"a tensor of shape \[6\] is read-only; clone\(\) it first"):
        tensor.copy_(Tensor.zeros(6))
    clone = tensor.clone().copy_(Tensor.zeros(6))
    assert (clone.tolist(), array.tolist()) == ([0.0] * 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert Tensor.from_numpy(array, copy=True).writable


@pytest.mark.parametrize("dtype", ["float64", "bool", "complex64", "uint16", "S3"])
def test_types_that_are_not_supported(dtype: str) -> None:
    with pytest.raises(DTypeError, match="is not supported; supported: float32, float16, bfloat16"):
        Tensor.from_numpy(np.zeros(3, dtype))


def test_the_array_lives_as_long_as_the_tensor_and_the_other_way_round() -> None:
    array = np.arange(1000, dtype=np.float32)
    tensor = Tensor.from_numpy(array)[500:]
    del array
    gc.collect()
    assert tensor[0].item() == 500.0
    start = CPU.allocator.stats().allocated_bytes
    made = Tensor.full(1000, 2).numpy()[10:]
    gc.collect()
    assert CPU.allocator.stats().allocated_bytes == start + 4096
    assert (made == 2).all()
    del made
    assert CPU.allocator.stats().allocated_bytes == start


def test_numpy_functions_take_tensors() -> None:
    tensor, array = numbered(2, 3)
    assert np.array_equal(np.asarray(tensor), array)
    assert np.asarray(tensor, np.float64).dtype == np.float64
    assert np.shares_memory(np.asarray(tensor), tensor.numpy())
    assert not np.shares_memory(np.array(tensor), tensor.numpy())


def test_item_tolist_len_iter() -> None:
    tensor, array = numbered(2, 3)
    assert tensor.tolist() == array.tolist()
    assert [row.tolist() for row in tensor] == array.tolist()
    assert len(tensor) == 2
    assert tensor[1, 2].item() == 5
    assert type(Tensor.full((1, 1), 0.5, "bfloat16").item()) is float
    with pytest.raises(ShapeError, match=r"shape \[2, 3\]: item\(\) needs exactly one element"):
        tensor.item()
    for use in (lambda: len(tensor[0, 0]), lambda: iter(tensor[0, 0])):
        with pytest.raises(ShapeError, match=r"shape \[\] has no length"):
            use()


def test_repr() -> None:
    tensor, _ = numbered(2, 3, dtype=DType.bfloat16)
    assert repr(tensor) == "Tensor(shape=[2, 3], dtype=bfloat16, device=cpu)\n[[0 1 2]\n [3 4 5]]"
    assert repr(Tensor.zeros((0, 3))).startswith("Tensor(shape=[0, 3], dtype=float32, device=cpu)\n")
    large = repr(numbered(1000, 1000)[0])
    assert "\n[[     0      1      2 ...    997    998    999]\n" in large
    assert len(large) < 1000


# --- views against NumPy ----------------------------------------------------------------------------------

SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)


@st.composite
def shape_and_index(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    shape = draw(SHAPES)
    return shape, draw(hnp.basic_indices(shape, allow_newaxis=True, max_dims=8))


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, np.ndarray]:
    """A view that was sliced and permuted: any strides, signs and offsets."""
    tensor, array = numbered(*draw(SHAPES))
    index = draw(hnp.basic_indices(array.shape, allow_newaxis=True, max_dims=6))
    tensor, array = tensor[index], array[index]
    if not isinstance(array, np.ndarray):
        return tensor, np.asarray(array)
    order = draw(st.permutations(range(array.ndim)))
    return tensor.permute(order), array.transpose(order)


@settings(max_examples=300, deadline=None)
@given(shape_and_index())
def test_indexing(case: tuple[tuple[int, ...], Any]) -> None:
    shape, index = case
    tensor, array = numbered(*shape)
    view = tensor[index]
    assert view.buffer is tensor.buffer
    assert same(view, np.asarray(array[index]))


@settings(max_examples=300, deadline=None)
@given(views(), st.data())
def test_reshape(case: tuple[Tensor, np.ndarray], data: st.DataObject) -> None:
    tensor, array = case
    sizes = data.draw(factorizations(array.size))
    try:
        expected = np.reshape(array, sizes, copy=False)
    except ValueError:
        with pytest.raises(ShapeError, match=r"call contiguous\(\) first"):
            tensor.reshape(sizes)
        tensor, expected = tensor.contiguous(), array.reshape(sizes)
    view = tensor.reshape(sizes)
    assert view.buffer is tensor.buffer
    assert same(view, expected)
    if array.size:
        for axis in range(len(sizes)):
            asked = (*sizes[:axis], -1, *sizes[axis + 1 :])
            assert tensor.reshape(asked).shape == sizes


def factorizations(numel: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes with that many elements."""

    def split(cuts: list[int]) -> tuple[int, ...]:
        rest, sizes = numel, []
        for cut in cuts:
            size = math.gcd(rest, cut)
            sizes.append(size)
            rest //= size or 1
        return (*sizes, rest)

    return st.lists(st.integers(1, 12), max_size=4).map(split)


@settings(max_examples=200, deadline=None)
@given(views(), st.data())
def test_other_views(case: tuple[Tensor, np.ndarray], data: st.DataObject) -> None:
    tensor, array = case
    assert same(tensor.T, array.T)
    axis = data.draw(st.integers(-array.ndim - 1, array.ndim))
    assert same(tensor.unsqueeze(axis), np.expand_dims(array, axis))
    assert same(tensor.unsqueeze(axis).squeeze(axis), array)
    assert same(tensor.squeeze(), array.squeeze())
    lead = data.draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
    wanted = lead + tuple(3 if size == 1 else size for size in array.shape)
    expanded, expected = tensor.expand(wanted), np.broadcast_to(array, wanted)
    assert expanded.shape == expected.shape
    assert np.array_equal(expanded.numpy(), expected)
    if array.ndim:
        a, b = (data.draw(st.integers(-array.ndim, array.ndim - 1)) for _ in range(2))
        assert same(tensor.transpose(a, b), array.swapaxes(a, b))
        step = data.draw(st.integers(1, 6))
        pieces = tensor.split(step, a)
        starts = range(step, array.shape[a], step)
        expected_pieces = np.split(array, list(starts), a) if array.shape[a] else []
        assert len(pieces) == len(expected_pieces)
        assert all(map(same, pieces, expected_pieces))


@settings(max_examples=200, deadline=None)
@given(views(), st.data())
def test_copies(case: tuple[Tensor, np.ndarray], data: st.DataObject) -> None:
    tensor, array = case
    for copied in (tensor.contiguous(), tensor.clone()):
        assert same(copied, np.ascontiguousarray(array).reshape(array.shape))
    assert tensor.clone().buffer is not tensor.buffer
    assert (tensor.contiguous() is tensor) == tensor.is_contiguous
    order = data.draw(st.permutations(range(array.ndim)))
    target, expected = numbered(*(array.shape[axis] for axis in np.argsort(order)))
    assert target.permute(order).copy_(tensor).shape == tensor.shape
    expected.transpose(order)[...] = array
    assert np.array_equal(target.numpy(), expected)


@pytest.mark.parametrize(
    ("to", "source"),
    [
        (slice(0, 6), slice(2, 8)),
        (slice(2, 8), slice(0, 6)),
        (slice(None), slice(None, None, -1)),
        (slice(1, 8, 2), slice(0, 4)),
        (slice(0, 4), slice(0, 8, 2)),
    ],
)
def test_copies_between_overlapping_views(to: slice, source: slice) -> None:
    tensor, array = numbered(8, 3)
    expected = array.copy()
    expected[to] = array[source]
    tensor[to].copy_(tensor[source])
    assert np.array_equal(tensor.numpy(), expected)


def test_every_type_is_copied_by_its_bits() -> None:
    for dtype in DType:
        bits = np.random.default_rng(0).integers(0, 256, 24 * dtype.itemsize, np.uint8)
        tensor = Tensor.from_numpy(bits.view(dtype.numpy).reshape(4, 6))
        for view in (tensor, tensor.T, tensor[::-1, ::2]):
            assert view.clone().numpy().tobytes() == np.ascontiguousarray(view.numpy()).tobytes()


def test_copy_refuses_what_does_not_match() -> None:
    tensor = Tensor.zeros((2, 3))
    with pytest.raises(ShapeError, match=r"shape \[2, 3\]: cannot take the values of shape \[3, 2\]"):
        tensor.copy_(Tensor.zeros((3, 2)))
    with pytest.raises(DTypeError, match="cannot copy float16 into a tensor of float32"):
        tensor.copy_(Tensor.zeros((2, 3), "float16"))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda t: t[2], "index 2 is out of range for axis 0"),
        (lambda t: t[0, -4], "index -4 is out of range for axis 1"),
        (lambda t: t[0, 0, 0], "3 indices are too many"),
        (lambda t: t[..., 0, ...], "one ellipsis only"),
        (lambda t: t[::0], "step other than 0"),
        (lambda t: t["a":], "is no slice of integers"),
        (lambda t: t[1.0], "float is no index"),
        (lambda t: t[True], "True is no index"),
        (lambda t: t[[0, 1]], "list is no index"),
        (lambda t: t[np.array([0, 1])], "ndarray is no index"),
        (lambda t: t.reshape(4), r"cannot reshape 6 elements to \[4\]"),
        (lambda t: t.reshape(-1, 4), r"cannot reshape 6 elements to \[-1, 4\]"),
        (lambda t: t.reshape(-1, -1), "one size may be -1"),
        (lambda t: t.reshape(-2, -3), "one size may be -1"),
        (lambda t: t.reshape(-1, 0), r"cannot reshape 6 elements to \[-1, 0\]"),
        (lambda t: t.reshape(2.0, 3), "must be integers"),
        (lambda t: t.transpose(0, 2), "axis 2 is out of range for 2 axes"),
        (lambda t: t.permute(0, 0), r"\[0, 0\] is no order of its axes"),
        (lambda t: t.permute(0), r"\[0\] is no order of its axes"),
        (lambda t: t.permute("ab"), "axes 'ab': must be integers"),
        (lambda t: t.squeeze(1), "axis 1 has size 3, not 1"),
        (lambda t: t.unsqueeze(4), "axis 4 is out of range for 3 axes"),
        (lambda t: t.expand(3, 3), r"cannot expand to \[3, 3\]"),
        (lambda t: t.expand(3), r"cannot expand to \[3\]"),
        (lambda t: t.expand(-1, 3), "must not be negative"),
        (lambda t: t.split(0), "cannot split into pieces of 0"),
        (lambda t: t.split([1, 3], 1), r"\[1, 3\] do not add up to 3, the size of axis 1"),
        (lambda t: t.split([-1, 4], 1), "do not add up to 3"),
        (lambda t: t.split([1.5, 1.5], 1), "must be integers"),
        (lambda t: t.split(1, 5), "axis 5 is out of range for 2 axes"),
    ],
)
def test_impossible_views(use: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        use(Tensor.zeros((2, 3)))
    assert "\n" not in str(caught.value)
    assert "[2, 3]" in str(caught.value) or "must" in str(caught.value)


def test_split_by_sizes() -> None:
    tensor, array = numbered(4, 6)
    pieces = tensor.split([2, 0, 4], -1)
    assert [piece.shape for piece in pieces] == [(4, 2), (4, 0), (4, 4)]
    assert same(pieces[0], array[:, :2])
    assert same(pieces[2], array[:, 2:])


def test_tensors_compare_by_identity() -> None:
    tensor, other = Tensor.zeros(3), Tensor.zeros(3)
    assert tensor != other
    assert len({tensor, other}) == 2


def test_views_keep_the_wrapped_owner() -> None:
    freed: list[str] = []

    class Owner:
        def __del__(self) -> None:
            freed.append("owner")

    memory = np.arange(16, dtype=np.int8)
    buffer = Buffer.wrap(Owner(), memory.ctypes.data, 16, CPU, writable=True)
    row = Tensor(buffer, "int8", (4, 4))[1]
    del buffer
    assert (row.tolist(), freed) == ([4, 5, 6, 7], [])
    del row
    assert freed == ["owner"]
