"""Multi-head latent attention (MLA, DeepSeek-V2 2024): keys and values of all heads come from one latent per token.

    c = kv_norm(x·W_kv)           the latent, (R,)            the only thing cached, with
    r = RoPE(x·W_r)               one rotary key, (rope,)     shared by all heads
    head h:  k = [c·UKᵀ_h, r],  v = c·UVᵀ_h,  q = [q_h, RoPE(q'_h)]

Positions cannot ride on c: a rotation between q_h and UK_h would depend on the distance, and UK_h could no longer be
absorbed into the query. So a few rotary channels stand beside it.

The naive form expands k and v: for training, and for prompts that begin with an empty cache, since with DeepSeek's
sizes a pair of tokens costs it 640 FLOP a head, the absorbed form 2176. The absorbed form uses q·(UK c) = (UKᵀ q)·c
and Σ p UV c = UV (Σ p c): decode reads the latents only. Both give the same numbers (tests/nn/test_mla.py).
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.nn.attention import positions_or_default
from octavo.nn.cache import LayerLatentCache
from octavo.nn.linear import Linear
from octavo.nn.norm import RMSNorm
from octavo.nn.rotary import RotaryEmbedding, Rotation
from octavo.ops.linear_small_batch import MOST_ROWS
from octavo.ops.metadata import AttentionMetadata
from octavo.ops.rotary_cache import Rotary

# DeepSeek-V2/V3 checkpoints' names, of the layer's `self_attn`
_DEEPSEEK_NAMES = {
    "q_a_proj": "q_proj_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_proj_up",
    "q_proj": "q_proj",
    "kv_a_proj_with_mqa": "kv_proj",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_proj_up",
    "o_proj": "o_proj",
}


class MultiHeadLatentAttention(nn.Module):
    """Causal MLA; caches kv_rank + rope_head_dim numbers per token, whatever the number of heads.

    dim: width of x. q_rank: rank of the compressed query, None for no compression. kv_rank: R. nope_head_dim,
    rope_head_dim, v_head_dim: channels per head without position, with, and of the value; defaults are DeepSeek's.
    rope: a `RotaryEmbedding(rope_head_dim)`; default base 10000, interleaved as in DeepSeek's checkpoints.
    softmax_scale: default 1/√(nope_head_dim + rope_head_dim), times YaRN's mscale² where the rope asks for it. bias: of
    the down- and output projections. norm_eps: of both latent norms (DeepSeek: 1e-6 whatever the model's).

    Parameters: q_proj_down (q_rank, dim), q_norm, q_proj_up (H·(nope + rope), q_rank), or q_proj for all three;
    kv_proj (R + rope, dim), kv_norm, kv_proj_up (H·(nope + v), R), per head nope rows, then v rows; o_proj (dim, H·v).
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        q_rank: int | None,
        kv_rank: int,
        *,
        nope_head_dim: int = 128,
        rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope: RotaryEmbedding | None = None,
        softmax_scale: float | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_heads, self.kv_rank = n_heads, kv_rank
        self.nope_head_dim, self.rope_head_dim, self.v_head_dim = nope_head_dim, rope_head_dim, v_head_dim
        self.rope = RotaryEmbedding(rope_head_dim, interleaved=True) if rope is None else rope
        if self.rope.rotary_dim != rope_head_dim:
            raise ValueError(f"rope must turn rope_head_dim = {rope_head_dim} channels, got {self.rope.rotary_dim}")
        q_head_dim = nope_head_dim + rope_head_dim
        self.softmax_scale = (
            q_head_dim**-0.5 * self.rope.softmax_scale_factor if softmax_scale is None else softmax_scale
        )
        self.backend = backend
        self.compresses_q = q_rank is not None
        if q_rank is None:
            self.q_proj = Linear(dim, n_heads * q_head_dim, device=device, dtype=dtype)
        else:
            self.q_proj_down = Linear(dim, q_rank, bias, device=device, dtype=dtype)
            self.q_norm = RMSNorm(q_rank, norm_eps, device=device, dtype=dtype)
            self.q_proj_up = Linear(q_rank, n_heads * q_head_dim, device=device, dtype=dtype)
        self.kv_proj = Linear(dim, kv_rank + rope_head_dim, bias, device=device, dtype=dtype)
        self.kv_norm = RMSNorm(kv_rank, norm_eps, device=device, dtype=dtype)
        self.kv_proj_up = Linear(kv_rank, n_heads * (nope_head_dim + v_head_dim), device=device, dtype=dtype)
        self.o_proj = Linear(n_heads * v_head_dim, dim, bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        kv_cache: LayerLatentCache | None = None,
        metadata: AttentionMetadata | None = None,
        *,
        rotation: Rotation | None = None,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Without a cache x (B, S, dim), naive form; with one x (T, dim), a packed batch of new tokens, absorbed form,
        but naive where `metadata.starts_empty` says that these tokens are all there are.

        positions, rotation, norm and residual as in `MultiHeadAttention`. Returns the shape of x.
        """
        absorbs = metadata is not None and not (metadata.starts_empty and metadata.max_seqlen_q > 1)
        if norm is not None and not (absorbs and x.shape[0] <= MOST_ROWS):  # else in the projections of few rows
            x, norm = norm(x), None
        if (kv_cache is None) != (metadata is None):
            raise ValueError("kv_cache and metadata go together: give both (generation) or neither (training)")
        if rotation is None:
            rotation = self.rope(positions_or_default(x, positions, metadata), metadata)
        if kv_cache is not None and metadata is not None and absorbs:
            out = self._attend_cached(x, norm, rotation, kv_cache, metadata)
        else:
            latent, k_rope = self._latent(x, rotation)
            if kv_cache is not None and metadata is not None:
                kv_cache.store(torch.cat((latent, k_rope), dim=-1), metadata)
            out = self._naive(*self._queries(x, rotation), latent, k_rope, metadata)
        projected: Tensor = self.o_proj(out.flatten(-2), residual=residual)
        return projected

    def _queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """(…, H, nope) and, turned, (…, H, rope)."""
        q = self._query_heads(x)
        return q[..., : self.nope_head_dim], self.rope.rotate(q[..., self.nope_head_dim :], rotation)

    def _query_heads(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """(…, H, nope + rope) of norm(x), not yet turned."""
        if self.compresses_q:
            q = self.q_proj_up(self.q_proj_down(x, norm=norm), norm=self.q_norm)
        else:
            q = self.q_proj(x, norm=norm)
        heads: Tensor = q.unflatten(-1, (self.n_heads, -1))
        return heads

    def _latent(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What the cache keeps of each token: the latent (…, R) and the rotary key (…, rope)."""
        latent, k_rope = self.kv_proj(x).split([self.kv_rank, self.rope_head_dim], dim=-1)
        return self.kv_norm(latent), self.rope.rotate(k_rope.unsqueeze(-2), rotation).squeeze(-2)

    def _naive(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, metadata: AttentionMetadata | None
    ) -> Tensor:
        """Every head's own keys and values, (B, S, H, v), or (T, H, v) packed as `metadata` says."""
        kv = self.kv_proj_up(latent).unflatten(-1, (self.n_heads, -1))
        k_nope, v = kv.split([self.nope_head_dim, self.v_head_dim], dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        options: dict[str, Any] = {"softmax_scale": self.softmax_scale, "causal": True, "backend": self.backend}
        if metadata is None:
            return cast(Tensor, ops.flash_attn_func(q, k, v, **options))
        cu_seqlens, longest = metadata.cu_seqlens_q, metadata.max_seqlen_q
        return cast(Tensor, ops.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options))

    def _attend_cached(
        self,
        x: Tensor,
        norm: RMSNorm | None,
        rotation: Rotation,
        kv_cache: LayerLatentCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """The absorbed form: all heads read one latent per token; the up-projections act on queries and outputs,
        (T, H, v)."""
        weight = self.kv_proj_up.weight
        assert isinstance(weight, Tensor), "kv_proj_up is split by head, so loaders leave it unquantised"
        up = weight.view(self.n_heads, -1, self.kv_rank)
        up_k, up_v = up[:, : self.nope_head_dim], up[:, self.nope_head_dim :]
        if ops.fuses(x, *(self.parameters() if torch.is_grad_enabled() else ())):  # walking them takes its time
            rotary = Rotary(*rotation, self.rope.interleaved)
            kv_norm, latent = self.kv_norm, self.kv_proj(x, norm=norm)
            q = self._query_heads(x, norm)
            q = kv_cache.absorb_and_store(latent, q, up_k, kv_norm.weight, kv_norm.eps, rotary, metadata)
        else:
            x = x if norm is None else norm(x)
            q_nope, q_rope = self._queries(x, rotation)
            kv_cache.store(torch.cat(self._latent(x, rotation), dim=-1), metadata)
            q = torch.cat((torch.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1), q_rope), dim=-1)
        out = kv_cache.attend(
            q, metadata, head_dim_v=self.kv_rank, softmax_scale=self.softmax_scale, backend=self.backend
        )
        return ops.project_values(out, up_v)

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LayerLatentCache:
        """An empty cache for this layer; dtype and device default to those of its output projection."""
        dtype, device = dtype or self.o_proj.activation_dtype, device or self.o_proj.device
        shape = (num_blocks, block_size, self.kv_rank + self.rope_head_dim)
        return LayerLatentCache(torch.zeros(shape, dtype=dtype, device=device))

    def load_deepseek(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the weights of one `self_attn` of a DeepSeek-V2 or -V3 checkpoint, by its names without their prefix.

        The rope must be interleaved, as theirs. Raises ValueError for a name that is unknown or missing.
        """
        renamed = {}
        for name, tensor in state_dict.items():
            module, _, parameter = name.rpartition(".")
            if module not in _DEEPSEEK_NAMES:
                raise ValueError(f"state_dict: {name!r} is no weight of a DeepSeek attention; strip the layer's prefix")
            renamed[f"{_DEEPSEEK_NAMES[module]}.{parameter}"] = tensor
        missing = self.state_dict().keys() - renamed.keys()
        if missing:
            raise ValueError(f"state_dict: {', '.join(sorted(missing))} missing (our names); got {sorted(state_dict)}")
        self.load_state_dict(renamed)

    def extra_repr(self) -> str:
        return f"heads={self.n_heads}, kv_rank={self.kv_rank}, rope_head_dim={self.rope_head_dim}"
