"""Codes packed into 32-bit words along columns or rows, as AWQ and GPTQ store them, as rows of codes.

Both keep a matrix [N, K] with its input dimension K first, which has to be transposed. That is done a tile at
a time: beside the result there are only some hundred kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours a word of AWQ holds at bits 0, 4, 8 and so on."""
_TILE = 128  # words in each direction: a tile and its copy stay in the first-level cache
_ROWS_BYTES = 1 << 18


def unpack_words(
    words: NDArray[np.int32], bits: int, order: tuple[int, ...] | None = None
) -> NDArray[np.uint8]:
    """Codes of words [..., n], [..., n * 32 / bits].

    Args:
        words: each holds 32 / `bits` neighbours.
        bits: 4 or 8.
        order: which of them is at the lowest bits, and so on; None: one after the other.
    """
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        stored = np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1)
    codes = stored.reshape(*words.shape, WORD_BITS // bits)
    if order is not None:
        codes = codes[..., np.argsort(order)]
    return codes.reshape(*words.shape[:-1], -1)


def rows_of_awq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """4-bit codes of AWQ [K, N / 8], each word of eight rows in `AWQ_ORDER`, as rows: uint8 [N, K / 2].

    Of two neighbouring columns the first is in the low half of a byte.
    """
    columns, eighths = words.shape
    rows = np.empty((eighths, 8, columns // 2), np.uint8)
    for down, across in _tiles(columns, eighths):
        stored = np.ascontiguousarray(words[down, across]).view(np.uint8)
        even, odd = stored[::2], stored[1::2]  # of columns
        of_low_halves = (even & np.uint8(15)) | (odd << np.uint8(4))
        of_high_halves = (even >> np.uint8(4)) | (odd & np.uint8(0xF0))
        pairs = slice(down.start // 2, down.stop // 2)
        for byte in range(4):
            rows[across, AWQ_ORDER[2 * byte], pairs] = of_low_halves[:, byte::4].T
            rows[across, AWQ_ORDER[2 * byte + 1], pairs] = of_high_halves[:, byte::4].T
    return rows.reshape(8 * eighths, columns // 2)


def rows_of_gptq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Codes of GPTQ [K * bits / 32, N], each word of neighbouring columns, as rows: uint8 [N, K * bits / 8].

    Of two neighbouring 4-bit columns the first is in the low half of a byte.
    """
    height, width = words.shape
    rows = np.empty((width, height), np.int32)
    for down, across in _tiles(height, width):
        rows[across, down] = words[down, across].T
    return rows.view(np.uint8)


def reordered(rows: NDArray[np.uint8], bits: int, order: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Rows of 4- or 8-bit codes with their columns in another order: column j from column `order[j]`."""
    made = np.empty(rows.shape, np.uint8)
    step = max(1, _ROWS_BYTES // len(order))
    for first in range(0, len(rows), step):
        codes = rows[first : first + step]
        if bits == 4:
            codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1).reshape(len(codes), -1)
        codes = np.take(codes, order, axis=1, mode="clip")  # which is the fastest; all are in range
        made[first : first + step] = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
    return made


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of pieces of a matrix; pieces begin at even rows."""
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            yield slice(top, min(top + _TILE, height)), slice(left, min(left + _TILE, width))
