"""Where an element of an operand or of the sums of mma.m16n8k16 is held."""


def holder_in_a(row: int, column: int) -> tuple[int, int, int]:
    """Lane, register and half of it (0: the lower 16 bits) of an element of a [16, 16]."""
    lane = row % 8 * 4 + column % 8 // 2
    return lane, row // 8 + column // 8 * 2, column % 2


def holder_in_b(row: int, column: int) -> tuple[int, int, int]:
    """The same of b [16, 8]."""
    return column * 4 + row % 8 // 2, row // 8, row % 2


def holder_in_c(row: int, column: int) -> tuple[int, int]:
    """Lane and register of an element of the sums [16, 8]."""
    return row % 8 * 4 + column // 2, row // 8 * 2 + column % 2
