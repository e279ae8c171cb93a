"""Attention over a paged KV cache that reads the blocks where they lie: decode rows and prefill chunks in one call.

Work is cut into items: one sequence, one KV head, up to 48 rows (the query heads of that KV head × a few tokens), so
that a key is read once for all of them. An item runs over tiles of 64 keys with an online softmax in fp32. The tiles
of all items are dealt to the threads in equal, contiguous shares, whatever the lengths; an item that two threads
share leaves partial results, merged after a barrier.

Few rows (decode) multiply each key where it lies and add up lanes by a butterfly; many rows (prefill) first transpose
the tile's keys, so that lanes are keys and nothing is added across lanes.
"""

import functools

import torch

from octavo.kernels.cpu.jit import Kernel, lacks, pack
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

MAX_ROWS = 48  # of an item
TILE = 64  # keys
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this kernel cannot take the call, or None."""
    halved = q.dtype == torch.float32 and k_cache.dtype == torch.float16
    if q.dtype not in TYPES or not (halved or k_cache.dtype == q.dtype) or v_cache.dtype != k_cache.dtype:
        return f"it takes one of fp32, fp16, bf16, or an fp16 cache under fp32, not {k_cache.dtype} under {q.dtype}"
    if k_cache.dtype == torch.float16 and lacks("f16c"):
        return "this CPU has no instructions for fp16"
    if q.shape[-1] % 16 or v_cache.shape[-1] % 16 or max(q.shape[-1], v_cache.shape[-1]) > 256:
        return f"it takes head_dims that are multiples of 16 up to 256, not {q.shape[-1]} and {v_cache.shape[-1]}"
    if q.shape[1] // k_cache.shape[2] > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} query heads per KV head, not {q.shape[1] // k_cache.shape[2]}"
    for name in ("seqused_q", "leftpad_k", "qv", "alibi_slopes", "attn_bias"):
        if getattr(t, name) is not None:
            return f"it has no {name}"
    if spec.dropout_p:
        return "it has no dropout"
    if any(x.stride(-1) != 1 for x in (q, k_cache, v_cache)):
        return "it needs the last axis contiguous"
    return None


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q` → `(out (T, Hq, Dv), softmax_lse (Hq, T))`; splits are the kernel's."""
    tokens, heads, head_dim = q.shape
    head_dim_v = v_cache.shape[-1]
    out = q.new_zeros(tokens, heads, head_dim_v)
    maxima_and_totals = q.new_zeros(2, heads, tokens, dtype=torch.float32)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, scratch_bytes(head_dim, head_dim_v), dtype=torch.uint8)
    arguments, keep = attention_arguments(q, k_cache, v_cache, spec, t, out, maxima_and_totals, scratch)
    _kernel(head_dim, head_dim_v, TYPES[q.dtype], TYPES[k_cache.dtype]).run(arguments, threads)
    del keep
    maxima, totals = maxima_and_totals
    return out, maxima + totals.log()


def attention_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    maxima_and_totals: Tensor | None,
    scratch: Tensor,
) -> tuple[bytes, list[Tensor]]:
    """The kernel's arguments, and the tensors that must live until it has run. `scratch` has a row for each thread."""
    assert t.cu_seqlens_q is not None
    assert t.seqused_k is not None
    assert t.block_table is not None
    cu_seqlens, seqused = (x.to(torch.int32).contiguous() for x in (t.cu_seqlens_q, t.seqused_k))
    table = t.block_table if t.block_table.stride(1) == 1 else t.block_table.contiguous()
    sink = None if t.learnable_sink is None else t.learnable_sink.float().contiguous()
    size = k_cache.element_size()
    arguments = pack(
        *(q.data_ptr(), q.stride(0) * q.element_size(), q.stride(1) * q.element_size()),
        *(out.data_ptr(), out.stride(0) * out.element_size()),
        *(0 if maxima_and_totals is None else maxima_and_totals.data_ptr(), q.shape[0]),
        *(len(seqused), q.shape[1], k_cache.shape[2]),
        *(k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[1]),
        *(stride * size for cache in (k_cache, v_cache) for stride in cache.stride()[:3]),
        *(cu_seqlens.data_ptr(), seqused.data_ptr(), table.data_ptr(), table.stride(0)),
        *(spec.window_left, spec.window_right, 0 if sink is None else sink.data_ptr()),
        *(float(spec.softmax_scale), float(spec.softcap)),
        *(scratch.data_ptr(), scratch.stride(0), q.shape[2]),
    )
    return arguments, [cu_seqlens, seqused, table, *([] if sink is None else [sink])]


def scratch_bytes(head_dim: int, head_dim_v: int) -> int:
    """Of one thread: queries, transposed keys, scores, sums, maxima and totals, addresses, two partial results."""
    partial = MAX_ROWS * (head_dim_v + 2)
    floats = MAX_ROWS * head_dim + TILE * head_dim + MAX_ROWS * TILE + 3 * partial + 16
    return -(-(4 * floats + 8 * 4 * TILE) // 64) * 64


@functools.cache
def _kernel(head_dim: int, head_dim_v: int, io_type: str, kv_type: str) -> Kernel:
    def build():
        from octavo.kernels.cpu.paged_attention_code import make_kernel

        return make_kernel(head_dim, head_dim_v, io_type, kv_type)

    types = io_type if io_type == kv_type else f"{io_type}-{kv_type}"
    return Kernel(f"paged-attention-{head_dim}-{head_dim_v}-{types}", build)
