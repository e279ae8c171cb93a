"""One decode or append step over a KV cache, paged or not: flash-attn's `flash_attn_with_kvcache`.

New keys and values are rotated and written into the cache in place, then the queries attend to all of it. A cache
that is not paged is one whose pages are as long as its rows, so a single kernel serves both.
"""

import torch

from octavo.kernels.spec import AttentionTensors, Tensor
from octavo.ops import custom_ops
from octavo.ops.checks import (
    check_capacity,
    check_floating,
    check_heads,
    check_index,
    check_like,
    check_score_options,
    check_shape,
    make_spec,
)
from octavo.ops.rotary import apply_rotary


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    qv: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v to the cache, in place, and attend to it with q. No gradient.

    q: (B, Sq, Hq, D). k_cache: (B_cache, S_cache, Hkv, D); with block_table (num_blocks, page_size, Hkv, D), any page
        size.
    v_cache: as k_cache, with Dv. k: (B, S_new, Hkv, D), v: (B, S_new, Hkv, Dv): written at positions cache_seqlens, +
        1, …
    rotary_cos, rotary_sin: (max_position, rotary_dim / 2), with k: k is rotated by its positions in the cache; q too
        if causal or windowed, else all of q by position cache_seqlens. rotary_interleaved: channels 0 and 1, 2 and 3,
        … are the pairs; otherwise the first half with the second.
    cache_seqlens: int or (B,) int32, keys in the cache before k is appended; default all of S_cache, not possible
        with k.
    cache_batch_idx: (B,) int32, the cache row of each batch row; default its own index. Not with block_table.
    cache_leftpad: (B,) int32, the first position in use of each row, default 0.
    block_table: (B, max_blocks) int32, the pages of each row in order.
    num_splits: parts that the keys are split in to fill the device; 0 lets the kernel choose.
    softmax_scale, causal, window_size, softcap, alibi_slopes, qv, learnable_sink, backend: as in `flash_attn_func`.

    Returns out (B, Sq, Hq, Dv), with return_softmax_lse also the LSE (B, Hq, Sq). Raises `ValueError` for what does
    not fit; on CPU also when cache_seqlens or k do not fit into the cache (on a GPU that would wait for the device:
    such tokens are not written, and keys behind the last page not read).
    """
    _check_caches(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin)
    batch, sq, num_heads, head_dim = q.shape
    seqlens = _cache_seqlens(cache_seqlens, q, k_cache, k, block_table)
    if block_table is None:
        block_table = _rows_as_pages(cache_batch_idx, batch, k_cache, q.device)
    elif cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: expected None with block_table, which already names each row's pages")
    check_index("block_table", block_table, (batch, "max_blocks"), q.device)
    if cache_leftpad is not None:
        check_index("cache_leftpad", cache_leftpad, (batch,), q.device)
    check_score_options(q, batch, alibi_slopes, learnable_sink)
    if qv is not None:
        check_shape("qv", qv, (batch, sq, num_heads, v_cache.shape[-1]))
        check_like("qv", qv, q)
    spec = make_spec(head_dim, softmax_scale, causal, window_size, softcap)
    check_capacity(
        "cache_seqlens, k", seqlens + (0 if k is None else k.shape[1]), block_table.shape[1] * k_cache.shape[1]
    )
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            steps = torch.arange(max(sq, k.shape[1]), device=q.device)
            positions = seqlens[:, None] + steps
            together = spec.window_left < 0 and spec.window_right < 0
            q_positions = seqlens[:, None].expand(batch, sq) if together else positions[:, :sq]
            q = apply_rotary(q, rotary_cos, rotary_sin, q_positions, rotary_interleaved)
            k = apply_rotary(k, rotary_cos, rotary_sin, positions[:, : k.shape[1]], rotary_interleaved)
        _append(k, v, k_cache, v_cache, seqlens, block_table)
        seqlens = seqlens + k.shape[1]
    tensors = AttentionTensors(
        cu_seqlens_q=uniform_cu_seqlens(batch, sq, q.device),
        max_seqlen_q=sq,
        max_seqlen_k=block_table.shape[1] * k_cache.shape[1],
        seqused_k=seqlens,
        leftpad_k=cache_leftpad,
        block_table=block_table,
        qv=None if qv is None else qv.flatten(0, 1),
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
    )
    out, lse = custom_ops.paged_attention(q.flatten(0, 1), k_cache, v_cache, spec, tensors, num_splits, backend)
    out = out.reshape(batch, sq, num_heads, -1)
    if not return_softmax_lse:
        return out
    return out, lse.reshape(num_heads, batch, sq).transpose(0, 1).contiguous()


def uniform_cu_seqlens(batch: int, length: int, device: torch.device) -> Tensor:
    """(batch + 1,) int32: where sequences of one length begin and end in a packed batch."""
    if length == 0:
        return torch.zeros(batch + 1, dtype=torch.int32, device=device)
    return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)


def _check_caches(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
) -> None:
    check_shape("q", q, ("B", "Sq", "Hq", "D"))
    check_floating("q", q)
    check_shape("k_cache", k_cache, ("B_cache", "S_cache", "Hkv", q.shape[3]))
    check_shape("v_cache", v_cache, (*k_cache.shape[:3], "Dv"))
    check_like("k_cache", k_cache, q)
    check_like("v_cache", v_cache, q)
    check_heads(q.shape[2], k_cache.shape[2])
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither")
    if k is not None and v is not None:
        check_shape("k", k, (q.shape[0], "S_new", *k_cache.shape[2:]))
        check_shape("v", v, (*k.shape[:2], *v_cache.shape[2:]))
        check_like("k", k, q)
        check_like("v", v, q)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos, rotary_sin: expected both or neither")
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos: expected k and v with it; rotate q yourself where nothing is appended")
        check_shape("rotary_sin", rotary_sin, tuple(rotary_cos.shape))
        if rotary_cos.dim() != 2 or 2 * rotary_cos.shape[1] > q.shape[3]:
            raise ValueError(
                f"rotary_cos: expected (max_position, at most {q.shape[3] // 2}), got {tuple(rotary_cos.shape)}"
            )


def _cache_seqlens(
    cache_seqlens: int | Tensor | None, q: Tensor, k_cache: Tensor, k: Tensor | None, block_table: Tensor | None
) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        check_index("cache_seqlens", cache_seqlens, (q.shape[0],), q.device)
        return cache_seqlens
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ValueError("cache_seqlens: expected the keys in use of each row, with k or block_table; got None")
        cache_seqlens = k_cache.shape[1]
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _rows_as_pages(cache_batch_idx: Tensor | None, batch: int, k_cache: Tensor, device: torch.device) -> Tensor:
    """The block table of a cache whose one page per row is the row."""
    if cache_batch_idx is not None:
        check_index("cache_batch_idx", cache_batch_idx, (batch,), device)
        return cache_batch_idx[:, None]
    if k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: expected at least {batch} rows, one for each of q's, got {k_cache.shape[0]}")
    return torch.arange(batch, dtype=torch.int32, device=device)[:, None]


def _append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor) -> None:
    """Write the new tokens behind each row's `seqlens` keys."""
    page_size = k_cache.shape[1]
    positions = seqlens[:, None].to(torch.int64) + torch.arange(k.shape[1], device=k.device)
    capacity = block_table.shape[1] * page_size
    pages = torch.gather(block_table.to(torch.int64), 1, (positions // page_size).clamp(max=block_table.shape[1] - 1))
    slots = torch.where(positions < capacity, pages * page_size + positions % page_size, -1)
    custom_ops.store_kv_cache(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots.flatten())
