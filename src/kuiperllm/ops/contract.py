"""Declared shapes, types and devices of an operator's operands, checked whenever it is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError, DTypeError, ShapeError, UsageError

_AXIS = re.compile(r"(\d*)([A-Za-z]*)")
ACTIVATIONS = (DType.float32, DType.float16, DType.bfloat16)
"""The types that activations may have; which of them a device's kernels take is the kernels' matter."""


class _Argument:
    """One operand of a contract: "T 2F", "... D", "S : int32", "T D : activation"."""

    __slots__ = ("axes", "dtypes", "is_activation", "leading", "name", "text", "written")

    def __init__(self, name: str, text: str, written: bool) -> None:
        axes, _, dtypes = text.partition(":")
        words = axes.split()
        self.name = name
        self.text = f"[{', '.join(words)}]"
        self.written = written
        self.leading = words[:1] == ["..."]
        self.axes = [_axis(word) for word in words[self.leading :]]
        self.is_activation = dtypes.strip() == "activation"
        named = ACTIVATIONS if self.is_activation else tuple(DType.of(word) for word in dtypes.split())
        self.dtypes: tuple[DType, ...] = named or (DType.float32,)

    def binds(self, shape: Sequence[int], sizes: dict[str, Any], origin: dict[str, str]) -> bool:
        """Whether the shape fits, given the sizes that letters have; letters without a size get one."""
        if self.leading:
            rest = max(0, len(shape) - len(self.axes))
            if sizes.setdefault("...", shape[:rest]) != shape[:rest]:
                return False
            origin.setdefault("...", self.name)
            shape = shape[rest:]
        if len(shape) != len(self.axes):
            return False
        for (factor, letter), size in zip(self.axes, shape, strict=True):
            if size != factor * sizes.get(letter, -1):
                if letter in sizes or size % factor:
                    return False
                sizes[letter] = size // factor
                origin[letter] = self.name
        return True


def _axis(word: str) -> tuple[int, str]:
    match = _AXIS.fullmatch(word)
    assert match is not None, word
    return int(match[1] or 1), match[2]


class Contract:
    """What an operator demands of its tensors.

    `Contract("silu_mul", gate_up="T 2F", out="T F")`: letters stand for sizes and mean the same in every
    operand, `2F` is twice F, a number is itself, `...` any leading axes, the same in every operand. Types
    follow a colon (default: float32); all operands marked `activation` have one of `ACTIVATIONS`, the same
    for all. All tensors live on one device. The elements along the last axis must
    be adjacent; other axes may have any strides.

    Args:
        op: the operator's name, quoted in messages.
        writes: the operands that the operator writes to.
        operands: the shape of each operand, in the order that `check` takes them.
    """

    __slots__ = ("arguments", "op", "text")

    def __init__(self, op: str, *, writes: Sequence[str] = ("out",), **operands: str) -> None:
        self.op = op
        self.arguments = [_Argument(name, text, name in writes) for name, text in operands.items()]
        self.text = ", ".join(f"{a.name} {a.text}" for a in self.arguments)

    def check(self, *tensors: Tensor | None) -> dict[str, Any]:
        """The size that each letter stands for (`...`: a tuple of them); operands that are None are left out.

        Raises:
            ShapeError: a shape contradicts the contract, or the last axis is strided.
            DTypeError: an operand is no tensor, or of another type than declared.
            DeviceError: the operands live on different devices.
            UsageError: an operand that is written to is read-only.
        """
        sizes: dict[str, Any] = {"": 1}
        origin: dict[str, str] = {}
        first: Device | None = None
        activation: DType | None = None
        for argument, tensor in zip(self.arguments, tensors, strict=True):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise DTypeError(f"{self.op}: {argument.name} must be a Tensor, not {type(tensor).__name__}")
            if tensor.dtype not in argument.dtypes:
                raise self._wrong_dtype(argument, tensor)
            if argument.is_activation:
                if activation is None:
                    activation = tensor.dtype
                elif tensor.dtype is not activation:
                    raise self._mixed_dtypes(tensors)
            buffer, shape = tensor.buffer, tensor.shape
            if first is None:
                first = buffer.device
            elif buffer.device is not first:
                raise self._wrong_device(tensors)
            if not argument.binds(shape, sizes, origin):
                raise self._wrong_shape(argument, tensor, sizes, origin)
            if shape and tensor.strides[-1] != 1 and shape[-1] > 1 and 0 not in shape:
                raise self._wrong_strides(argument, tensor)
            if argument.written and not buffer.writable:
                raise UsageError(f"{self.op}: {argument.name} is written to but read-only; clone() it first")
        return sizes

    def _wrong_dtype(self, argument: _Argument, tensor: Tensor) -> DTypeError:
        allowed = " or ".join(str(dtype) for dtype in argument.dtypes)
        return DTypeError(f"{self.op}: {argument.name} is {tensor.dtype}; the contract is {allowed}")

    def _mixed_dtypes(self, tensors: Sequence[Tensor | None]) -> DTypeError:
        kinds = ", ".join(
            f"{a.name} is {t.dtype}"
            for a, t in zip(self.arguments, tensors, strict=True)
            if t is not None and a.is_activation
        )
        return DTypeError(f"{self.op}: activations must be of one type: {kinds}")

    def _wrong_device(self, tensors: Sequence[Tensor | None]) -> DeviceError:
        places = ", ".join(
            f"{a.name} on {t.device}" for a, t in zip(self.arguments, tensors, strict=True) if t is not None
        )
        return DeviceError(f"{self.op}: operands must live on one device: {places}; move them with to()")

    def _wrong_shape(
        self, argument: _Argument, tensor: Tensor, sizes: dict[str, Any], origin: dict[str, str]
    ) -> ShapeError:
        letters = [letter for _, letter in argument.axes] + ["..."] * argument.leading
        bound = "".join(
            f"; {letter} = {sizes[letter] if letter != '...' else list(sizes[letter])} from {origin[letter]}"
            for letter in dict.fromkeys(letters)
            if origin.get(letter, argument.name) != argument.name
        )
        return ShapeError(
            f"{self.op}: {argument.name} has shape {list(tensor.shape)}, not {argument.text}{bound} "
            f"(contract: {self.text})"
        )

    def _wrong_strides(self, argument: _Argument, tensor: Tensor) -> ShapeError:
        return ShapeError(
            f"{self.op}: {argument.name} {argument.text} has shape {list(tensor.shape)} and strides "
            f"{list(tensor.strides)}: elements along the last axis must be adjacent; call contiguous() first"
        )
