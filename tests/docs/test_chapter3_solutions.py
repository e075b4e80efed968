"""The solutions of chapter 3: windows, capsules, copies in pieces."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError, UsageError
from site_pages import DOCS

Load = Callable[[str], ModuleType]
COPY = DOCS / "course" / "solutions" / "chapter3_exercise3.py"


@pytest.mark.parametrize(
    ("shape", "size", "step"), [((10,), 3, 1), ((10,), 4, 3), ((7, 5), 2, 2), ((4,), 4, 9)]
)
def test_exercise1_windows(shape: tuple[int, ...], size: int, step: int, solution: Load) -> None:
    windows = solution("chapter3_exercise1").windows
    x = Tensor.from_numpy(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), copy=True)
    view = windows(x, size, step)
    expected = np.moveaxis(sliding_window_view(x.numpy(), size, axis=0)[::step], -1, 1)
    np.testing.assert_array_equal(view.numpy(), expected)
    assert view.buffer is x.buffer


def test_exercise1_of_a_view_and_backwards(solution: Load) -> None:
    windows = solution("chapter3_exercise1").windows
    x = Tensor.from_numpy(np.arange(20, dtype=np.int32))
    assert windows(x[3::2], 2).tolist()[0] == [3, 5]
    assert windows(x[::-1], 3, 5).tolist() == [[19, 18, 17], [14, 13, 12], [9, 8, 7], [4, 3, 2]]
    for size, step in ((0, 1), (21, 1), (3, 0)):
        with pytest.raises(ShapeError, match="no windows"):
            windows(x, size, step)


def _capsule(array: Any, **options: Any) -> object:
    return array.__dlpack__(**options)


def test_exercise2_capsules_of_both_libraries(solution: Load) -> None:
    describe = solution("chapter3_exercise2").describe
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours = Tensor.from_numpy(array)
    for maker in (array, ours):
        told = describe(_capsule(maker, max_version=(1, 0)))
        assert (told.version or (0, 0))[0] == 1
        assert (told.device, told.dtype, told.shape, told.read_only) == ((1, 0), "float32", (2, 3), False)
        assert told.strides in (None, (3, 1))
        assert told.address == array.ctypes.data
        assert describe(_capsule(maker)).version is None
    assert describe(_capsule(ours.T)).strides == describe(_capsule(array.T)).strides == (1, 3)
    assert describe(_capsule(Tensor.zeros((1,), "bfloat16"))).dtype == "bfloat16"


def test_exercise2_read_only_and_consumed(solution: Load) -> None:
    describe = solution("chapter3_exercise2").describe
    array = np.arange(6, dtype=np.int8)
    array.flags.writeable = False
    assert describe(_capsule(Tensor.from_numpy(array), max_version=(1, 0))).read_only

    class Once:
        """Hands out one capsule that the test keeps."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.capsule = tensor.__dlpack__()

        def __dlpack__(self, **_: object) -> object:
            return self.capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.tensor.__dlpack_device__()

    once = Once(Tensor.full((3,), 2.0))
    before = describe(once.capsule)
    assert before == describe(once.capsule)  # reading leaves it as it is
    assert np.from_dlpack(once).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="used_dltensor"):
        describe(once.capsule)


def test_exercise3_number_of_pieces(solution: Load) -> None:
    copy_pieces = solution("chapter3_exercise3").copy_pieces
    fused = Tensor.from_numpy(np.arange(4 * 24, dtype=np.float32).reshape(4, 24))
    head = fused[:, 8:16]
    for src, pieces in (
        (fused, 1),
        (head, 4),
        (fused.T, 4 * 24),
        (head.reshape(4, 2, 4), 4),
        (fused[1:1], 0),
    ):
        dst = Tensor.zeros(src.shape)
        assert copy_pieces(dst, src) == pieces
        np.testing.assert_array_equal(dst.numpy(), src.numpy())


@given(st.data())
def test_exercise3_random_views(data: st.DataObject) -> None:
    copy_pieces = runpy.run_path(str(COPY))["copy_pieces"]
    base = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    order = data.draw(st.permutations(range(4)))
    slices = tuple(data.draw(st.slices(n)) for n in (2, 3, 4, 5))
    array = base[slices].transpose(order).astype(np.int32)
    src = Tensor.from_numpy(base.astype(np.int32))[slices].permute(order)
    dst = Tensor.zeros((*array.shape, 2), "int32")[..., 0]
    pieces = copy_pieces(dst, src)
    np.testing.assert_array_equal(dst.numpy(), array)
    assert pieces <= array.size


def test_exercise3_refuses(solution: Load) -> None:
    copy_pieces = solution("chapter3_exercise3").copy_pieces
    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(UsageError, match="read-only"):
        copy_pieces(Tensor.from_numpy(frozen), Tensor.zeros((3,)))
    with pytest.raises(ShapeError):
        copy_pieces(Tensor.zeros((3,)), Tensor.zeros((4,)))
