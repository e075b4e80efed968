"""The tensor types of GGUF files. Each module of this package states some in a tuple `FORMATS`.

To add a type, add a module: it is found by being there.
Source of numbers and layouts: ggml's `ggml.h` (enum ggml_type) and `ggml-common.h` (block structs).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

from kuiperllm.errors import UnsupportedError
from kuiperllm.quant.ggml.block import BlockFormat

__all__ = ["BlockFormat", "find_format", "formats"]

# The names of the types that may be met, so that a refusal can say more than a number.
_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@lru_cache(maxsize=1)
def formats() -> dict[int, BlockFormat]:
    """Every tensor type that can be read, by its number in the file."""
    found = [
        block_format
        for module in iter_modules(__path__)
        for block_format in getattr(import_module(f"{__name__}.{module.name}"), "FORMATS", ())
    ]
    return {block_format.number: block_format for block_format in found}


def find_format(number: int, where: str) -> BlockFormat:
    """The tensor type with this number; `where` names file and tensor in the message.

    Raises:
        UnsupportedError: it cannot be read; the message names it and lists those that can.
    """
    block_format = formats().get(number)
    if block_format is None:
        supported = ", ".join(known.name for _, known in sorted(formats().items()))
        raise UnsupportedError(
            f"{where} has the type {_NAMES.get(number, 'unknown')} (number {number}), which is not "
            f"supported; supported: {supported}"
        )
    return block_format
