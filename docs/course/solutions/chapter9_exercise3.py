"""How much of the chip a way to cut up a product leaves unused."""

from math import ceil

TILES = ((128, 128), (128, 160), (128, 192), (128, 224), (128, 256), (256, 128))


def used(m: int, n: int, tile: tuple[int, int], multiprocessors: int = 132) -> float:
    """The share of all waves' work that goes into the product: 1 if there are whole waves of whole tiles."""
    tiles = ceil(m / tile[0]) * ceil(n / tile[1])
    waves = ceil(tiles / multiprocessors)
    return m * n / (waves * multiprocessors * tile[0] * tile[1])


def best_tile(m: int, n: int) -> tuple[int, int]:
    """Of `TILES`, the one that leaves least unused; of equals the larger."""
    return max(TILES, key=lambda tile: (used(m, n, tile), tile[0] * tile[1]))
