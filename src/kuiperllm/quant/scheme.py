"""What a quantized matrix is: how many bits a code has, who shares a scale, and what a code stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kuiperllm.core.dtype import DType
from kuiperllm.errors import ShapeError, UnsupportedError

SUPER_BLOCK = 256
"""Columns that share a float16 scale of scales, in the schemes that have such (GGUF's K-quants)."""

Coding = Literal["middle", "zeros", "minimum", "e4m3"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How codes stand for weights.

    Raises:
        UnsupportedError: there is no such scheme.
    """

    bits: int
    """Of a code: 2, 3, 4, 5, 6 or 8. Codes are unsigned."""
    group_size: int
    """Neighbouring columns that share a scale (and a zero point or minimum)."""
    scale: DType = DType.float16
    """float16 or float32; or int8: a multiplier of a float16 scale that `SUPER_BLOCK` columns share, which
    are at least four groups where there are minimums."""
    coding: Coding = "middle"
    """What a code c of a group with the scale s stands for:

    middle: s (c - 2^(bits - 1));
    zeros: s (c - z), with a whole number z from 0 to 255 for each group;
    minimum: s c - m, with a minimum m for each group, of the scale's type (int8: times a float16 as well);
    e4m3: s times the 8-bit floating-point number c (OCP FP8, 4 bits of exponent, 3 of mantissa).
    """

    def __post_init__(self) -> None:
        if (
            self.bits not in (2, 3, 4, 5, 6, 8)
            or self.group_size < 1
            or self.scale not in (DType.float16, DType.float32, DType.int8)
            or (self.scale is DType.int8 and (SUPER_BLOCK % self.group_size or self.coding == "zeros"))
            or (self.scale is DType.int8 and self.coding == "minimum" and self.group_size > SUPER_BLOCK // 4)
            or (self.coding == "e4m3" and (self.bits != 8 or self.scale is DType.int8))
        ):
            raise UnsupportedError(f"there is no such way of quantizing: {self!r}")

    @property
    def name(self) -> str:
        """Short, for messages: `q4` for 4 bits, `f8` for e4m3."""
        return f"{'f' if self.coding == 'e4m3' else 'q'}{self.bits}"

    @property
    def middle(self) -> int:
        """The code of zero where the coding says `middle`."""
        return 1 << (self.bits - 1)

    @property
    def has_zeros(self) -> bool:
        """Whether each group has a zero point or a minimum beside its scale."""
        return self.coding in ("zeros", "minimum")

    @property
    def has_super_blocks(self) -> bool:
        """Whether scales are multipliers of a scale that 256 columns share."""
        return self.scale is DType.int8

    @property
    def multipliers(self) -> tuple[int, int]:
        """The least and the largest scale of type int8, as GGUF packs them; minimums go from 0 on."""
        if self.coding == "minimum":
            return 0, 15 if self.bits == 2 else 63
        return (-32, 31) if self.bits == 3 else (-128, 127)

    @property
    def columns_unit(self) -> int:
        """What the number of columns must be a multiple of."""
        return SUPER_BLOCK if self.has_super_blocks else self.group_size

    def check_columns(self, columns: int) -> None:
        """Refuse rows that are not made of whole groups.

        Raises:
            ShapeError: `columns` is not a multiple of `columns_unit`.
        """
        if columns % self.columns_unit:
            raise ShapeError(
                f"{self.name}: groups of {self.columns_unit} do not divide rows of {columns} weights"
            )

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix: codes without gaps, and for each group a scale and a zero as wide as it."""
        groups = columns // self.group_size
        per_group = self.scale.itemsize * (2 if self.has_zeros else 1)
        per_super_block = (4 if self.has_zeros else 2) if self.has_super_blocks else 0
        of_row = columns * self.bits // 8 + groups * per_group + columns // SUPER_BLOCK * per_super_block
        return rows * of_row

    def __str__(self) -> str:
        return f"{self.name}, groups of {self.group_size}"


def q8(group_size: int, scale: DType = DType.float16) -> Scheme:
    """Symmetric int8 groups: weights from -127 to 127 scales."""
    return Scheme(8, group_size, scale)


def q4(group_size: int, *, symmetric: bool = True) -> Scheme:
    """int4 groups: weights from -8 to 7 scales, or 16 codes from a zero point on."""
    return Scheme(4, group_size, DType.float16, "middle" if symmetric else "zeros")


AT_LOAD: dict[str, Callable[[int], Scheme]] = {"q8": q8, "q4": q4}
"""What weights can be rounded to while a model is loaded: by name, the scheme for a group size."""
