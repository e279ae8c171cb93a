"""Tile shapes, warps and pipeline stages: constants per head size, each with the measurement that chose it.

There is no autotuning: a first call compiles one kernel. Shared memory decides what fits: 227 KiB a block on sm_90,
163 on sm_80, 99 on sm_86 and sm_89.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """(main, tail) powers of two that cover head_dim: 192 → (128, 64), 96 → (64, 32), 128 and 120 → (128, 0)."""
    block = max(16, 1 << (head_dim - 1).bit_length())
    main = block // 2
    if head_dim == block or main < 32:
        return block, 0
    tail = max(16, 1 << (head_dim - main - 1).bit_length())
    return (main, tail) if main + tail < block else (block, 0)


def forward_tile(width: int, width_v: int, element_size: int, hopper: bool, more_inputs: bool = False) -> Tile:
    """For many query rows; widths are the padded head sizes of keys and values.

    `more_inputs`: a bias or qv takes its share of shared memory.

    TFLOP/s of the candidates on an H100, S = 16k, full / causal (2026-11-24, Triton 3.6):
    64: 128×64×4 warps 449/429, 128×128×8 370/369, 64×64×4 401/445. 128: 128×128×8 with 3 stages 528/535, with 2
    454/447, 128×64×8 507/511, 128×64×4 543/500, 64×64×4 516/421.
    256: 128×64×8 573/558, 128×32×8 484/491, 64×64×4 397/419.
    """
    widest = max(width, width_v)
    if element_size == 4:
        return Tile(32, 32, 4, 1) if widest > 128 else Tile(64, 32, 4, 1)
    if widest > 256:
        return Tile(64, 32, 8, 2) if hopper else Tile(32, 16, 4, 1)
    if more_inputs and not hopper:
        return Tile(32, 32, 4, 1) if widest > 128 else Tile(64, 32, 4, 1)
    if widest > 128:
        return Tile(128, 64, 8, 2) if hopper and not more_inputs else Tile(64, 32, 4, 2)
    if widest > 64:
        return Tile(128, 128, 8, 3) if hopper and not more_inputs else Tile(128, 64, 8, 2)
    return Tile(128, 64, 4, 2 if more_inputs else 3)


def packed_tile(rows: int, width: int, width_v: int, element_size: int, hopper: bool, page_size: int = 0) -> Tile:
    """For grouped heads packed into rows: decoding and chunks over a paged cache.

    GB/s on an H100, batch 128, context 4096, 32/8 heads of 128, pages of 16 / 256 (2026-11-24, Triton 3.6): 64 keys by
    3 stages 2880/2953, 4 stages 2889/2952, 5 stages 2902/2792; 128 keys by 3 stages 2924/2802; 32 keys by 5 stages
    2918/2721. A tile inside one page looks up one block, hence the difference. Latent of 576, 16 heads: 32 keys 2465.
    """
    widest = max(width, width_v)
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 64 if widest > 128 else 128)
    if element_size == 4:
        return Tile(min(block_m, 32), 32, 4, 1)
    if widest > 256:
        return Tile(min(block_m, 64), 32, 8 if block_m > 16 else 4, 2) if hopper else Tile(min(block_m, 16), 16, 4, 3)
    if widest > 128:
        return Tile(block_m, 64 if hopper else 32, 8 if block_m > 32 else 4, 2 if hopper else 3)
    if block_m > 64:
        return Tile(128, 64, 8, 3)
    one_page = page_size % 64 == 0
    return Tile(block_m, 64 if one_page or not hopper else 128, 4, 3)


class BackwardTiles(NamedTuple):
    dkdv: Tile
    dq: Tile


def backward_tiles(
    width: int, width_v: int, element_size: int, hopper: bool, causal: bool, more_inputs: bool
) -> BackwardTiles:
    """Rows of queries and of keys for the two backward kernels; `more_inputs`: there is a bias or a qv.

    TFLOP/s of the products that each really computes on an H100, S = 16k, full / causal (2026-11-24, Triton 3.6):
    dkdv 64: 64×64×4 warps 480/466, 64×128×8 391/393, 32×128×4 448/408. 128: 64×64×4 601/432, 32×64×4 518/535, 64×128×8
    547/464, 32×128×8 466/363. 256: 64×64×8 323/219, 32×64×8 246/186. dq 64: 128×64×4 649/681, 128×64×8 618/639. 128:
    128×64×8 with 3 stages 669/685, with 2 519/526, 128×128×8 622/600. 256: 128×32×8 with 3 stages 667/570, with 2
    456/468, 128×64×8 429, 64×64×8 263.
    """
    widest = max(width, width_v)
    if element_size == 4:
        rows = 32 if widest <= 128 else 16
        return BackwardTiles(Tile(rows, rows, 4, 1), Tile(rows, rows, 4, 1))
    if widest > 128 and (widest > 256 or not hopper):
        rows = 16 if widest > 256 and not hopper else 32
        return BackwardTiles(Tile(rows, rows, 4, 1), Tile(rows, rows, 4, 1))
    if more_inputs:
        return BackwardTiles(Tile(32, 64, 4, 1), Tile(64, 32, 4, 1))
    if widest > 128:
        return BackwardTiles(Tile(64, 64, 8, 2), Tile(128, 32, 8, 3))
    if not hopper:
        return BackwardTiles(Tile(32, 64, 4, 2), Tile(64, 32, 4, 2))
    if widest > 64:
        return BackwardTiles(Tile(32, 64, 4, 3) if causal else Tile(64, 64, 4, 2), Tile(128, 64, 8, 3))
    return BackwardTiles(Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))
