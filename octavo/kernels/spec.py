"""What a backend is asked: the options of one attention call, and the signatures that every backend shares.

A backend module exposes any of these functions under these names; `octavo.ops.dispatch` picks one.

    flash_fwd.flash_fwd(q, k, v, spec, t) -> (out, softmax_lse)
    flash_bwd.flash_bwd(dout, q, k, v, out, softmax_lse, spec, t, dlse=None) -> Gradients
    paged_attention.paged_attention(q, k_cache, v_cache, spec, t, num_splits=0) -> (out, softmax_lse)
    mla_decode.mla_decode(q, kv_cache, head_dim_v, spec, t, num_splits=0) -> (out, softmax_lse)
    cache.store_kv_cache(k, v, k_cache, v_cache, slot_mapping, k_scale=None, v_scale=None) -> None
    cache.store_latent_cache(latent, kv_cache, slot_mapping) -> None
    merge.merge_attention_states(outs, lses) -> (out, softmax_lse)
    norm.rms_norm(x, weight, eps, unit_offset) -> out
    norm.add_rms_norm(x, residual, weight, eps, unit_offset) -> (out, x + residual)
    gated_activation.gated_activation(gate_up, activation) -> out
    rotary_cache.rotate_and_store(qkv, num_heads, rotary, norm, k_cache, v_cache, slot_mapping) -> q
    linear_small_batch.linear_small_batch(x, weight, bias, norm, activation, residual, out_dtype) -> out
    moe.route(logits, bias, routing) -> (weights, experts)
    moe.mix_experts(x, weights, experts, gate_up, down, activation, shared, shared_gate_up=None, shared_down=None)
        -> out
    sampling.sample_on_device(logits, temperature, top_k, top_p, min_p, seeds, positions, truncates) -> tokens
    mla_projection.absorb_and_store(latent, q, up_k, norm_weight, eps, rotary, kv_cache, slot_mapping) -> q_absorbed
    mla_projection.project_values(x, up_v) -> out

and, beside each, `refuses_<op>(...) -> str | None` with the same arguments: the reason why this backend cannot take the
call, or None when it can. A module may also have `plan_<op>(...) -> dict`, same arguments again: what it says of its
tile and splits, shown by `octavo.explain`. `merge_attention_states` takes sequences of tensors, one entry a part.

A dense cache reaches `paged_attention` as one whose pages are as long as its rows, so block_size is any number, not
only a power of two; `num_splits` is 0 where the kernel shall choose. The LSE of fp64 inputs is fp64.

Score of query i and key j, in this order:
    s = softmax_scale · q_i·k_j (+ qv_i·v_j inside the scale)  →  softcap · tanh(s / softcap)  →  + ALiBi + bias  →
    mask
ALiBi adds −slope · |i + Sk − Sq − j|. Masks align bottom-right: with p = i + Sk − Sq, key j is seen when
p − window_left <= j <= p + window_right (a negative bound is no bound; causal is window_right = 0). A sink adds
exp(sink_h) to the denominator and is part of the LSE. A row that sees nothing (and has no sink) gives output 0 and
LSE −inf. Dropout keeps probability (i, j) of batch b and head h where the Philox-4x32-10 stream `seed` at offset
((b·Hq + h)·max_seqlen_q + i)·max_seqlen_k + j is at least dropout_p, and scales it by 1/(1 − dropout_p). The stream is
Triton 3.9's `tl.rand` of an int64 offset: counter words (offset low, offset high, 0, 0), key (seed low, seed high).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The scalar options of one call; frozen and hashable."""

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    wants_dbias: bool = True  # of a backward: whether attn_bias's gradient, (Sq, Sk) numbers or so, is asked for

    @property
    def causal(self) -> bool:
        """True when the mask is exactly the causal one."""
        return self.window_left < 0 and self.window_right == 0


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """The optional tensors of one call.

    Dense calls have q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv). With `cu_seqlens_q` q is packed (Tq, Hq,
    D), with `cu_seqlens_k` k and v are packed too; with `block_table` k and v are (num_blocks, block_size, Hkv, D).
    """

    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_q: Tensor | None = None  # (B,) int32: rows in use of each sequence; the others give 0 and −inf
    seqused_k: Tensor | None = None  # (B,) int32: keys in use; the cache's `cache_seqlens`
    leftpad_k: Tensor | None = None  # (B,) int32: first key in use
    block_table: Tensor | None = None  # (B, max_blocks) int32
    qv: Tensor | None = None  # as q, with the last axis Dv
    alibi_slopes: Tensor | None = None  # (Hq,) or (B, Hq) fp32
    learnable_sink: Tensor | None = None  # (Hq,)
    attn_bias: Tensor | None = None  # broadcastable to (B, Hq, Sq, Sk)
    k_scale: Tensor | None = None  # (Hkv,) fp32: the cache is quantised and holds k / k_scale; v_scale likewise
    v_scale: Tensor | None = None
    dropout_seed: int = 0


class Rotary(NamedTuple):
    """The angles of each token's rotation, contiguous; the first 2·cos.shape[1] channels of a head turn."""

    cos: Tensor  # (T, rotary_dim / 2) fp32
    sin: Tensor  # as cos
    interleaved: bool  # pairs are channels 0 and 1, 2 and 3, …; otherwise the first half with the second


class HeadNorm(NamedTuple):
    """RMSNorm of each head's queries and keys before they turn; `unit_offset` multiplies by 1 + w (Gemma)."""

    q_weight: Tensor  # (D,)
    k_weight: Tensor  # (D,)
    eps: float
    unit_offset: bool


class InputNorm(NamedTuple):
    """RMSNorm of a linear layer's input; `unit_offset` multiplies by 1 + w (Gemma)."""

    weight: Tensor  # (K,)
    eps: float
    unit_offset: bool


class Routing(NamedTuple):
    """How tokens choose experts: see `octavo.nn.Router`."""

    top_k: int
    scoring: str  # "softmax" or "sigmoid"
    num_groups: int
    topk_groups: int
    norm_topk_prob: bool
    scaling_factor: float


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dqv: Tensor | None = None
    dsink: Tensor | None = None
    dbias: Tensor | None = None
