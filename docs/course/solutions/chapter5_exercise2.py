"""How many blocks of a kernel a multiprocessor of the H200 holds."""

REGISTERS, PIECE = 65_536, 256
WARPS, BLOCKS = 64, 32
SHARED, OF_EACH_BLOCK = 228 << 10, 1 << 10


def blocks_that_fit(registers: int, threads: int, shared: int = 0) -> int:
    """Blocks on a multiprocessor at a time.

    Args:
        registers: of a thread.
        threads: of a block.
        shared: bytes of shared memory of a block.
    """
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // PIECE) * PIECE
    by_registers = REGISTERS // of_a_warp // warps
    by_shared = SHARED // (shared + OF_EACH_BLOCK)
    return min(by_registers, WARPS // warps, by_shared, BLOCKS)
