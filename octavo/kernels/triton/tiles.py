"""Tile shapes, warps and pipeline stages: constants per head size, each with the measurement that chose it.

There is no autotuning: a first call compiles one kernel. Shared memory decides what fits: 227 KiB a block on sm_90, 163 on
sm_80, 99 on sm_86 and sm_89.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """(main, tail) powers of two that cover head_dim: (192 → 128, 64), (96 → 64, 32), (128 → 128, 0), (120 → 128, 0)."""
    block = max(16, 1 << (head_dim - 1).bit_length())
    main = block // 2
    if head_dim == block or main < 32:
        return block, 0
    tail = max(16, 1 << (head_dim - main - 1).bit_length())
    return (main, tail) if main + tail < block else (block, 0)


def forward_tile(width: int, width_v: int, element_size: int, hopper: bool) -> Tile:
    """For many query rows; widths are the padded head sizes of keys and values."""
    widest = max(width, width_v)
    if element_size == 4:
        return Tile(32, 32, 4, 1) if widest > 128 else Tile(64, 32, 4, 1)
    if widest > 256:
        return Tile(64, 32, 8, 2) if hopper else Tile(32, 16, 4, 1)
    if widest > 128:
        return Tile(128, 64, 8, 2) if hopper else Tile(64, 32, 4, 2)
    if hopper:
        return Tile(128, 128, 8, 2) if widest > 64 else Tile(128, 128, 8, 3)
    return Tile(128, 64, 8, 2) if widest > 64 else Tile(128, 64, 4, 3)


def packed_tile(rows: int, width: int, width_v: int, element_size: int, hopper: bool) -> Tile:
    """For grouped heads packed into rows: decoding and chunks over a paged cache."""
    widest = max(width, width_v)
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 64 if widest > 128 else 128)
    if element_size == 4:
        return Tile(min(block_m, 32), 32, 4, 1)
    if widest > 256:
        return Tile(min(block_m, 64), 32, 8 if block_m > 16 else 4, 2) if hopper else Tile(min(block_m, 16), 16, 4, 1)
    if widest > 128:
        return Tile(block_m, 64 if hopper else 32, 4, 2)
    if block_m > 64:
        return Tile(128, 64, 8, 3 if hopper else 2)
    return Tile(block_m, 64, 4, 3 if hopper else 2)


class BackwardTiles(NamedTuple):
    dkdv: Tile
    dq: Tile


def backward_tiles(width: int, width_v: int, element_size: int, hopper: bool) -> BackwardTiles:
    """Rows of queries and of keys for the two backward kernels."""
    widest = max(width, width_v)
    if element_size == 4:
        rows = 32 if widest <= 128 else 16
        return BackwardTiles(Tile(rows, rows, 4, 1), Tile(rows, rows, 4, 1))
    if widest > 256:
        return BackwardTiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if widest > 128:
        return (
            BackwardTiles(Tile(32, 64, 8, 2), Tile(64, 32, 8, 2))
            if hopper
            else BackwardTiles(*[Tile(32, 32, 4, 1)] * 2)
        )
    if hopper:
        return BackwardTiles(Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    return BackwardTiles(Tile(32, 64, 4, 2), Tile(64, 32, 4, 2))
