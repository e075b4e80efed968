"""The counter-based random numbers that draws are made with, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: four words of 32 bits, [..., 4].
        key: two words of 32 bits, [..., 2].

    Returns:
        Four random words, uint32 [..., 4].
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    for turn in range(10):
        r0, r1 = (
            k + np.uint64(turn * weyl & 0xFFFFFFFF) & _LOW for k, weyl in zip((k0, k1), _WEYL, strict=True)
        )
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = second >> _32 ^ c1 ^ r0, second & _LOW, first >> _32 ^ c3 ^ r1, first & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(seeds: NDArray[np.int64], positions: NDArray[np.int32]) -> NDArray[np.float64]:
    """Numbers from 0 up to but not including 1, multiples of 2**-53, one for each seed and position.

    The key is the seed, the counter the position; the first two words of the result make the number.
    """
    seed, position = seeds.astype(np.uint64), positions.astype(np.uint32)
    none = np.zeros_like(position)
    words = philox(
        np.stack([position, none, none, none], axis=-1), np.stack([seed & _LOW, seed >> _32], axis=-1)
    ).astype(np.uint64)
    bits = (words[..., 0] << _32 | words[..., 1]) >> np.uint64(11)
    result: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return result
