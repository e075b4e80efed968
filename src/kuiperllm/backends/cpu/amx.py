"""AMX for kernels: eight tile registers of 16 rows x 64 bytes, numbered by literals.

Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kuiperllm.backends.cpu.vectors import I8, I64, address_of, call


def _tile_number(literal: Any) -> Any:
    return ir.Constant(I8, literal.literal_value)


def _tile_memory(name: str) -> Any:
    @intrinsic(prefer_literal=True)
    def operation(context: Any, tile: Any, pointer: Any, index: Any, stride_bytes: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            address = address_of(builder, values[1], values[2], I8)
            call(builder, name, ir.VoidType(), _tile_number(tile), address, values[3])
            return context.get_dummy_value()

        return types.void(tile, pointer, types.intp, types.intp), codegen

    return operation


tile_load = _tile_memory("llvm.x86.tileloadd64")
tile_store = _tile_memory("llvm.x86.tilestored64")


@intrinsic(prefer_literal=True)
def tile_dot_bf16(context: Any, accumulator: Any, x: Any, w: Any) -> Any:
    """accumulator (16x16 float32) += x (16x32 bfloat16) times w (16 pairs of rows x 16 columns)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        numbers = (_tile_number(t) for t in (accumulator, x, w))
        call(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), *numbers)
        return context.get_dummy_value()

    return types.void(accumulator, x, w), codegen


@intrinsic(prefer_literal=True)
def tile_zero(context: Any, tile: Any) -> Any:
    """Clear a tile register."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        call(builder, "llvm.x86.tilezero", ir.VoidType(), _tile_number(tile))
        return context.get_dummy_value()

    return types.void(tile), codegen


@intrinsic
def tile_configure(context: Any, pointer: Any) -> Any:
    """Set the shapes of this thread's tile registers from 64 bytes of memory."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = address_of(builder, values[0], ir.Constant(I64, 0), I8)
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), address)
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def tile_release(context: Any) -> Any:
    """Give the tile registers back, so that the operating system need not save them."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen
