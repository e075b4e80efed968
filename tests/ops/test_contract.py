"""Contracts: what they accept, and the one line with which they refuse."""

from __future__ import annotations

import re
import types

import numpy as np
import pytest

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError, DTypeError, KernelError, KuiperError, ShapeError, UsageError
from kuiperllm.ops import dispatch
from kuiperllm.ops.add import add
from kuiperllm.ops.argmax import argmax
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.logprobs import logprobs
from kuiperllm.ops.rms_norm import add_rms_norm, rms_norm
from kuiperllm.ops.rope import rope
from kuiperllm.ops.sample import sample
from kuiperllm.ops.silu_mul import silu_mul
from kuiperllm.ops.softmax import softmax


def zeros(*shape: int, dtype: DType = DType.float32) -> Tensor:
    return Tensor.zeros(shape, dtype)


def read_only(*shape: int) -> Tensor:
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return Tensor.from_numpy(array)


I32 = DType.int32

REFUSED = [
    (
        lambda: add(zeros(2, 3), zeros(2, 4)),
        ShapeError,
        "add: y has shape [2, 4], not [T, D]; T = 2 from x; D = 3 from x (contract: x [T, D], y [T, D], "
        "out [T, D])",
    ),
    (
        lambda: add(zeros(2, 3), zeros(2, 3), out=zeros(3, 3)),
        ShapeError,
        "add: out has shape [3, 3], not [T, D]; T = 2 from x; D = 3 from x (contract: x [T, D], y [T, D], "
        "out [T, D])",
    ),
    (
        lambda: add(zeros(3), zeros(3)),
        ShapeError,
        "add: x has shape [3], not [T, D] (contract: x [T, D], y [T, D], out [T, D])",
    ),
    (
        lambda: rms_norm(zeros(2, 3, 8), zeros(9), 1e-6),
        ShapeError,
        "rms_norm: weight has shape [9], not [D]; D = 8 from x (contract: x [..., D], weight [D], "
        "out [..., D])",
    ),
    (
        lambda: rms_norm(zeros(2, 3, 8), zeros(8), 1e-6, out=zeros(3, 2, 8)),
        ShapeError,
        "rms_norm: out has shape [3, 2, 8], not [..., D]; D = 8 from x; ... = [2, 3] from x (contract: "
        "x [..., D], weight [D], out [..., D])",
    ),
    (
        lambda: rms_norm(zeros(1, 1, 1, 8), zeros(8), 1e-6),
        ShapeError,
        "shape [1, 1, 1, 8]: rows lie along one to three axes; reshape() it first",
    ),
    (
        lambda: rope(zeros(2, 3, 7), zeros(2, dtype=I32), zeros(5, 6)),
        ShapeError,
        "rope: x has shape [2, 3, 7], not [T, H, 2h] (contract: x [T, H, 2h], positions [T], "
        "cos_sin [P, 2h])",
    ),
    (
        lambda: rope(zeros(2, 3, 8), zeros(2, dtype=I32), zeros(5, 6)),
        ShapeError,
        "rope: cos_sin has shape [5, 6], not [P, 2h]; h = 4 from x (contract: x [T, H, 2h], positions [T], "
        "cos_sin [P, 2h])",
    ),
    (
        lambda: rope(zeros(2, 3, 8), zeros(2), zeros(5, 8)),
        DTypeError,
        "rope: positions is float32; the contract is int32",
    ),
    (
        lambda: silu_mul(zeros(2, 7)),
        ShapeError,
        "silu_mul: gate_up has shape [2, 7], not [T, 2F] (contract: gate_up [T, 2F], out [T, F])",
    ),
    (
        lambda: softmax(zeros(2, 7, dtype=DType.float16)),
        DTypeError,
        "softmax: x is float16; the contract is float32",
    ),
    (
        lambda: softmax(np.zeros((2, 7), np.float32)),  # type: ignore[arg-type]
        DTypeError,
        "softmax: x must be a Tensor, not ndarray",
    ),
    (
        lambda: softmax(zeros(7, 2).transpose(0, 1)),
        ShapeError,
        "softmax: x [T, V] has shape [2, 7] and strides [1, 2]: elements along the last axis must be "
        "adjacent; call contiguous() first",
    ),
    (
        lambda: add_rms_norm(read_only(2, 4), zeros(2, 4), zeros(4), 1e-6),
        UsageError,
        "add_rms_norm: residual is written to but read-only; clone() it first",
    ),
    (
        lambda: argmax(zeros(3, 0)),
        ShapeError,
        "argmax: x has shape [3, 0]: there is no largest of no elements",
    ),
    (
        lambda: logprobs(zeros(2, 5), zeros(2, dtype=I32), 6),
        UsageError,
        "logprobs: k=6 is not possible; allowed: 0 to 5, the vocabulary",
    ),
    (
        lambda: sample(
            zeros(1, 0), zeros(1), zeros(1, dtype=I32), zeros(1), zeros(1), zeros(1, dtype=DType.int64),
            zeros(1, dtype=I32),
        ),
        ShapeError,
        "sample: logits has shape [1, 0]: there is no token to draw",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_message(call: object, error: type[KuiperError], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()  # type: ignore[operator]


def test_letters_numbers_and_types() -> None:
    contract = Contract("op", x="T 2F 3", y="F : float16 bfloat16", out="T")
    assert contract.text == "x [T, 2F, 3], y [F], out [T]"
    sizes = contract.check(zeros(5, 8, 3), zeros(4, dtype=DType.bfloat16), None)
    assert sizes["T"] == 5
    assert sizes["F"] == 4
    for x in (zeros(5, 7, 3), zeros(5, 8, 4), zeros(5, 8), zeros(5, 8, 3, 1)):
        with pytest.raises(ShapeError):
            contract.check(x, None, None)
    with pytest.raises(DTypeError, match=r"^op: y is float32; the contract is float16 or bfloat16$"):
        contract.check(zeros(5, 8, 3), zeros(4), None)
    assert contract.check(zeros(0, 0, 3), None, None)["F"] == 0
    with pytest.raises(ShapeError):
        contract.check(zeros(0, 0, 3), zeros(1, dtype=DType.float16), None)


def test_rows_of_one_element_may_have_any_stride() -> None:
    assert softmax(zeros(4, 9)[:, ::9]).tolist() == [[1.0]] * 4


class Elsewhere:
    """Stands in for a device that this host lacks."""

    type = "cuda"

    def __str__(self) -> str:
        return "cuda:0"


ELSEWHERE = Elsewhere()


def moved(tensor: Tensor) -> Tensor:
    tensor.buffer.device = ELSEWHERE  # type: ignore[assignment]
    return tensor


def test_operands_on_different_devices() -> None:
    with pytest.raises(
        DeviceError,
        match=r"^add: operands must live on one device: x on cpu, y on cuda:0; move them with to\(\)$",
    ):
        add(zeros(2, 2), moved(zeros(2, 2)))


def test_no_kernel_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_candidates", lambda op: ["cpu"])
    with pytest.raises(
        KernelError,
        match=r"^add on cuda:0: no kernel; candidates: cpu \(operands are on cuda:0\)$",
    ):
        add(moved(zeros(2, 2)), moved(zeros(2, 2)), out=moved(zeros(2, 2)))


def test_implementation_is_the_module_of_the_device() -> None:
    module = implementation("add", Device("cpu"))
    assert isinstance(module, types.ModuleType)
    assert module.__name__ == "kuiperllm.ops.add.cpu"
    assert implementation("add", Device("cpu")) is module
