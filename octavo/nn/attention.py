"""Multi-head attention: self and cross, MHA/GQA/MQA, for training without a cache and generation with one.

Why the scores are divided by √d_k: entries of q and k with variance σ² give q·k the variance d_k·σ⁴, so without the
division the softmax of wide heads saturates and its gradient dies (`examples/why_scale.py` shows it).
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.nn.cache import LayerKVCache
from octavo.nn.linear import Linear
from octavo.nn.norm import RMSNorm
from octavo.nn.rotary import RotaryEmbedding, Rotation
from octavo.ops.metadata import AttentionMetadata
from octavo.ops.rotary_cache import HeadNorm, Rotary


class MultiHeadAttention(nn.Module):
    """softmax(q·kᵀ · softmax_scale)·v over heads, then an output projection.

    dim: width of x. num_kv_heads: num_heads is MHA (the default), 1 is MQA, between is GQA. head_dim: default
    dim / num_heads. causal: token i sees keys up to i. window_size (left, right): and at most `left` keys back; −1 is
    no bound. rope: shared by the model's layers. qk_norm: builds a norm of size head_dim for q and another for k, such
    as `RMSNorm`. bias: of the q, k, v projections; out_bias: of the output's. softmax_scale: default 1/√head_dim.
    softcap: scores become softcap·tanh(s / softcap); 0 is off. sinks: one learnable logit per head that takes attention
    away from all keys. context_dim: makes it cross-attention, with keys and values from `context` of that width.
    backend: forces one of `octavo.ops`.

    Parameters: qkv_proj.weight ((num_heads + 2·num_kv_heads)·head_dim, dim), rows q, then k, then v, head by head (or
    q_proj and kv_proj in cross-attention); o_proj.weight (dim, num_heads·head_dim); q_norm, k_norm; sinks (num_heads,).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        rope: RotaryEmbedding | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        bias: bool = False,
        out_bias: bool = False,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        dropout_p: float = 0.0,
        context_dim: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(dim, num_heads, num_kv_heads, head_dim)
        if context_dim is not None and (causal or rope is not None):
            raise ValueError("context_dim: cross-attention has neither order nor positions; drop causal and rope")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or dim // num_heads
        self.causal, self.window_size = causal, window_size
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.softcap, self.dropout_p, self.backend = softcap, dropout_p, backend
        self.rope = rope
        q_dim, kv_dim = num_heads * self.head_dim, 2 * num_kv_heads * self.head_dim
        if context_dim is None:
            self.qkv_proj = Linear(dim, q_dim + kv_dim, bias, device=device, dtype=dtype)
        else:
            self.q_proj = Linear(dim, q_dim, bias, device=device, dtype=dtype)
            self.kv_proj = Linear(context_dim, kv_dim, bias, device=device, dtype=dtype)
        self.context_dim = context_dim
        self.o_proj = Linear(q_dim, dim, out_bias, device=device, dtype=dtype)
        self.q_norm = None if qk_norm is None else qk_norm(self.head_dim).to(device=device, dtype=dtype)
        self.k_norm = None if qk_norm is None else qk_norm(self.head_dim).to(device=device, dtype=dtype)
        self.sinks = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        kv_cache: LayerKVCache | None = None,
        metadata: AttentionMetadata | None = None,
        *,
        rotation: Rotation | None = None,
        context: Tensor | None = None,
        context_lens: Tensor | None = None,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Without a cache x (B, S, dim) attends to itself, or to `context` (B, Sk, context_dim); returns (B, S, dim).

        With `kv_cache` and `metadata` x (T, dim) is a packed batch of new tokens: stored, then attended causally over
        each sequence's whole cache; returns (T, dim). positions: (S,), (B, S) or (T,) int64; without a cache default
        0, 1, …. rotation: `rope(positions)`, when the model computed it for all layers. context_lens (B,) int32: rows
        of `context` in use, default all. norm: of x, before the projections; residual: joins the result, and may be
        overwritten by it, as in `Linear`.
        """
        if (kv_cache is None) != (metadata is None):
            raise ValueError("kv_cache and metadata go together: give both (generation) or neither (training)")
        if self.rope is not None and rotation is None:
            rotation = self.rope(positions_or_default(x, positions, metadata), metadata)
        if kv_cache is not None and metadata is not None:
            out = self._attend_cached(x, norm, rotation, kv_cache, metadata)
        else:
            q, k, v = self._self_heads(x, norm, rotation) if context is None else self._cross_heads(x, norm, context)
            out = self._attend(q, k, v, context_lens)
        projected: Tensor = self.o_proj(out.flatten(-2), residual=residual)
        return projected

    def _self_heads(self, x: Tensor, norm: RMSNorm | None, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (…, Hq, D), k and v (…, Hkv, D) of x, normalised and turned."""
        if self.context_dim is not None:
            raise ValueError(f"context (B, Sk, {self.context_dim}) is missing: this is cross-attention")
        heads = [self.num_heads, self.num_kv_heads]
        qkv = self.qkv_proj(x, norm=norm).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([sum(heads), self.num_kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split(heads, dim=-2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=-2)
        if self.rope is not None and rotation is not None:
            qk = self.rope.rotate(qk, rotation)  # q and k at once: half the small ops of a decode step
        q, k = qk.split(heads, dim=-2)
        return q, k, v

    def _cross_heads(self, x: Tensor, norm: RMSNorm | None, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (…, Hq, D) of x, k and v (…, Hkv, D) of context, normalised."""
        if self.context_dim is None:
            raise ValueError("context given to self-attention: build the module with context_dim")
        q = self.q_proj(x, norm=norm).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv_proj(context).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seqused_k: Tensor | None) -> Tensor:
        out = ops.flash_attn_func(
            q,
            k,
            v,
            dropout_p=self.dropout_p if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
            softcap=self.softcap,
            learnable_sink=self.sinks,
            seqused_k=seqused_k,
            backend=self.backend,
        )
        return cast(Tensor, out)

    def _attend_cached(
        self,
        x: Tensor,
        norm: RMSNorm | None,
        rotation: Rotation | None,
        kv_cache: LayerKVCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        if not self.causal:
            raise ValueError("kv_cache needs causal attention: build the module with causal=True")
        if self._fuses(x):
            q = self._rotate_and_store(self.qkv_proj(x, norm=norm), rotation, kv_cache, metadata)
        else:
            q, k, v = self._self_heads(x, norm, rotation)
            kv_cache.store(k, v, metadata)
        return kv_cache.attend(
            q,
            metadata,
            softmax_scale=self.softmax_scale,
            window_size=self.window_size,
            softcap=self.softcap,
            learnable_sink=self.sinks,
            backend=self.backend,
        )

    def _fuses(self, x: Tensor) -> bool:
        """Whether norms, rotation and the cache's writes are one kernel here."""
        norms = (self.q_norm, self.k_norm)
        plain = norms == (None, None) or all(isinstance(norm, RMSNorm) for norm in norms)
        # walking the parameters takes longer than a kernel's launch
        leaves = self.parameters() if torch.is_grad_enabled() else ()
        return self.context_dim is None and plain and ops.fuses(x, *leaves)

    def _rotate_and_store(
        self, qkv: Tensor, rotation: Rotation | None, kv_cache: LayerKVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """q (T, Hq, D), normalised and turned; k, likewise, and v are in the cache."""
        rotary = norm = None
        if self.rope is not None and rotation is not None:
            rotary = Rotary(*rotation, self.rope.interleaved)
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            norm = HeadNorm(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.unit_offset)
        return kv_cache.rotate_and_store(qkv, self.num_heads, rotary, norm, metadata)

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LayerKVCache:
        """An empty cache for this layer; dtype and device default to those of its output projection."""
        dtype, device = dtype or self.o_proj.activation_dtype, device or self.o_proj.device
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return LayerKVCache(k, v)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}"


def positions_or_default(x: Tensor, positions: Tensor | None, metadata: AttentionMetadata | None) -> Tensor:
    """The caller's positions, or 0, 1, … of x (B, S, dim); a packed batch has no default."""
    if positions is not None:
        return positions
    if metadata is not None:
        raise ValueError(f"positions ({x.shape[0]},) are missing: a packed batch needs them for its rotary embedding")
    return torch.arange(x.shape[-2], device=x.device)


def _check_heads(dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> None:
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads when head_dim is not given, got {dim} and {num_heads}")
