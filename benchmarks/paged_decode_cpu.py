"""Paged decode on the CPU: GB/s of keys and values, beside a copy of the same bytes and beside gather + SDPA.

    python benchmarks/paged_decode_cpu.py [--batch 32] [--context 1024] [--seconds 1]

Each sequence has one query token and its own blocks of 16, in random order. "copy" is torch's copy of one cache to the
other, bytes read and written both counted; "gather" indexes the caches by the block table and calls torch's
`scaled_dot_product_attention`. Runs of the three alternate, and the fastest of each counts. `--in-cache` gives one
core's rate without its memory instead: keys and values of a few hundred kilobytes, the slope over the batch.
"""

import argparse
import platform

import torch
from attention_cpu import fastest

import octavo

SHAPES = [(9, 3, 64), (32, 8, 128), (8, 8, 64)]  # query heads, key/value heads, head_dim
BLOCK_SIZE = 16


def decode_call(
    shape: tuple[int, int, int], dtype: torch.dtype, batch: int, context: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, octavo.AttentionMetadata]:
    """q, k_cache, v_cache and metadata of one query token a sequence."""
    heads, kv_heads, head_dim = shape
    blocks = context // BLOCK_SIZE
    table = torch.randperm(batch * blocks, dtype=torch.int32).view(batch, blocks)
    k_cache, v_cache = torch.randn(2, batch * blocks, BLOCK_SIZE, kv_heads, head_dim).to(dtype)
    q = torch.randn(batch, heads, head_dim).to(dtype)
    metadata = octavo.AttentionMetadata(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32),
        cache_seqlens=torch.full((batch,), context, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.empty(0, dtype=torch.int64),
        max_seqlen_q=1,
        max_seqlen_k=context,
    )
    return q, k_cache, v_cache, metadata


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, options: argparse.Namespace
) -> tuple[float, float, float, int]:
    """Seconds of ours, of the copy and of gather + SDPA, and the bytes of keys and values."""
    q, k_cache, v_cache, metadata = decode_call(shape, dtype, options.batch, options.context)
    table = metadata.block_table
    target = torch.empty_like(k_cache)

    def ours() -> torch.Tensor:
        return octavo.paged_attention(q, k_cache, v_cache, metadata)

    def gather() -> torch.Tensor:
        k, v = (cache[table].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
        out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=shape[0] != shape[1])
        return out[:, :, 0]

    difference = (ours() - gather()).abs().max().item()
    assert difference < (1e-5 if dtype == torch.float32 else 1e-2), difference
    seconds = fastest([ours, lambda: target.copy_(k_cache), gather], options.seconds)
    return *seconds, 2 * k_cache.nbytes


def core_rate(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> float:
    """GB/s of keys and values that lie in the core's own cache, without what a call costs anyway."""
    torch.set_num_threads(1)
    calls = [decode_call(shape, dtype, batch, 256 * max(1, 8 // shape[1])) for batch in (1, 3)]
    one, three = fastest([lambda call=call: octavo.paged_attention(*call) for call in calls], seconds)
    return 2 * (calls[1][1].nbytes - calls[0][1].nbytes) / (three - one) / 1e9


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and contender")
    parser.add_argument("--in-cache", action="store_true")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.in_cache:
        for shape in SHAPES:
            rates = [core_rate(shape, dtype, options.seconds) for dtype in (torch.float32, torch.bfloat16)]
            print("{}/{} heads of {}".format(*shape), "fp32 {:.1f}, bf16 {:.1f} GB/s a core".format(*rates), flush=True)
        return
    print("dtype  Hq/Hkv  D    | ours GB/s | copy GB/s, ours of it | gather + SDPA GB/s, ours over it")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            ours, copy, gather, size = measure(shape, dtype, options)
            speeds = [size / seconds / 1e9 for seconds in (ours, copy, gather)]  # a copy reads and writes half of it
            print(
                f"{'fp32' if dtype == torch.float32 else 'bf16'}   {f'{shape[0]}/{shape[1]}':7} {shape[2]:<4} | "
                f"{speeds[0]:9.1f} | {speeds[1]:9.1f} {speeds[0] / speeds[1]:10.2f}  | {speeds[2]:9.1f} "
                f"{speeds[0] / speeds[2]:14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
