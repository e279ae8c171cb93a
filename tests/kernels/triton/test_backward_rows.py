"""What surrounds the Hopper backward kernels, in the interpreter: δ, zeroed sums, dQ out of the tensor cores' order."""

import pytest
import torch

from octavo.kernels.hopper.backward_rows import finish_kernel, prepare_kernel

BATCH, HEADS = 2, 3


def places():
    """Where a 64×64 block's element (row, column) stands: group of 8 columns, thread, and its two rows and columns."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None, :]
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    return (column // 8 * 128 + thread) * 4 + row % 16 // 8 * 2 + column % 2


def ordered_as_accumulators(x):
    """(…, rows, width), multiples of 64 → the same numbers as the kernels add them up."""
    *outer, rows, width = x.shape
    sums = torch.empty(*outer, rows // 64, width // 64, 64 * 64)
    for i in range(rows // 64):
        for j in range(width // 64):
            block = x[..., 64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
            sums[..., i, j, places().flatten()] = block.flatten(-2)
    return sums.reshape(x.shape)


@pytest.mark.parametrize(("width", "block_m", "head_dim"), [(64, 128, 40), (128, 64, 128), (256, 64, 192)])
def test_dq_comes_out_in_rows_scaled(width, block_m, head_dim):
    rows = 100
    tiles = -(-rows // block_m)
    want = torch.randn(BATCH, HEADS, tiles * block_m, width)
    sums = ordered_as_accumulators(want)
    dq = torch.full((BATCH, rows, HEADS, head_dim), torch.nan)
    finish_kernel[(-(-rows // 64), HEADS, BATCH)](
        sums, dq, sums, rows, HEADS * tiles, tiles, 0.5, *dq.stride()[:3],
        HEAD_DIM=head_dim, D=width, BLOCK_M=block_m, VARLEN=False,
    )  # fmt: skip
    assert torch.equal(dq, want[:, :, :rows, :head_dim].transpose(1, 2) * 0.5)


@pytest.mark.parametrize("block_m", [64, 128])
def test_ragged_sequences_have_tiles_of_their_own(block_m):
    cu = torch.tensor([0, 70, 71, 71, 270], dtype=torch.int32)
    total, sequences = 280, 4
    head_tiles = total // block_m + sequences
    sums = torch.full((HEADS, head_tiles * block_m, 64), torch.nan)
    want = torch.randn(HEADS, total, 64)
    for b in range(sequences):
        first, end = int(cu[b]), int(cu[b + 1])
        begin = (first // block_m + b) * block_m
        blocks = torch.zeros(HEADS, -(-(end - first) // block_m) * block_m, 64)
        blocks[:, : end - first] = want[:, first:end]
        assert sums[:, begin : begin + blocks.shape[1]].isnan().all(), "two sequences share a tile"
        sums[:, begin : begin + blocks.shape[1]] = ordered_as_accumulators(blocks)
    dq = torch.zeros(total, HEADS, 64)
    finish_kernel[(4, HEADS, sequences)](
        sums, dq, cu, 0, 0, head_tiles, 1.0, 0, *dq.stride()[:2], HEAD_DIM=64, D=64, BLOCK_M=block_m, VARLEN=True,
    )  # fmt: skip
    want[:, 270:] = 0
    assert torch.equal(dq, want.transpose(0, 1))


@pytest.mark.parametrize("with_dlse", [False, True])
def test_delta_and_zeroed_sums(with_dlse):
    rows, head_dim_v, block_m = 150, 72, 128
    out, dout = torch.randn(BATCH, rows, HEADS, head_dim_v), torch.randn(BATCH, rows, HEADS, head_dim_v)
    dlse = torch.randn(BATCH, HEADS, rows) if with_dlse else None
    delta, sums = torch.full((BATCH, HEADS, rows), torch.nan), torch.full((BATCH, HEADS, 256, 64), torch.nan)
    prepare_kernel[(4, HEADS, BATCH)](
        out, dout, dlse, delta, sums, out, rows, HEADS * 2, 2, delta.stride(0), delta.stride(1),
        *out.stride()[:3], *dout.stride()[:3], *(dlse.stride() if with_dlse else (0, 0, 0)),
        HEAD_DIM_V=head_dim_v, DV=128, D=64, BLOCK_M=block_m, VARLEN=False,
    )  # fmt: skip
    want = (out * dout).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta, want - dlse if with_dlse else want)
    assert not sums.any()
