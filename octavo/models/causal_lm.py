"""The decoder that all families share: embedding, layers of attention and MLP around a residual stream, norm, logits.

    x ← x + attn(norm(x));   x ← x + mlp(norm(x));   logits = lm_head(norm(x))

A family (llama.py, qwen3.py, gemma3.py, …) says what is its own: how a layer is wired, how its attention is built.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from octavo.models.config import ModelConfig, MoEConfig
from octavo.models.fused import fuse
from octavo.nn import (
    Experts,
    GatedMLP,
    LayerCache,
    LayerKVCache,
    Linear,
    MixtureOfExperts,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    RMSNorm,
    RotaryEmbedding,
    Rotation,
    Router,
)
from octavo.ops.decoder import DecoderStack
from octavo.ops.dispatch import forced_backend
from octavo.ops.linear import QuantizedWeight
from octavo.ops.metadata import AttentionMetadata


class TokenEmbedding(nn.Module):
    """Rows of a (vocab_size, dim) table; of a `QuantizedWeight`, only the rows asked for are unpacked.

    Not an `nn.Embedding`: its initialisation on the meta device imports torch._dynamo, 1.8 s of a cold start.
    """

    weight: Tensor | QuantizedWeight

    def __init__(
        self, vocab_size: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        table = nn.Parameter(torch.empty(vocab_size, dim, device=device, dtype=dtype))
        self.weight = table if table.is_meta else nn.init.normal_(table)

    def set_quantized_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        """Replace the Parameter; lookups give `dtype`. From then on it is no parameter."""
        del self.weight
        self.weight = weight
        self.out_dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.rows(token_ids, self.out_dtype)
        return nn.functional.embedding(token_ids, self.weight)


class FactoredRotaryEmbedding(RotaryEmbedding):
    """A rotary embedding whose frequencies are divided one by one: the form in which GGUF stores Llama 3's scaling."""

    factors: tuple[float, ...] = ()

    def inv_freq(self, device: torch.device | str = "cpu", seq_len: int | Tensor | None = None) -> Tensor:
        return super().inv_freq(device, seq_len) / torch.tensor(self.factors, device=device)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        attn: MultiHeadAttention | MultiHeadLatentAttention,
        mlp: GatedMLP | MixtureOfExperts,
        attn_norm: RMSNorm,
        mlp_norm: RMSNorm,
    ) -> None:
        super().__init__()
        self.attn_norm, self.attn = attn_norm, attn
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self, x: Tensor, rotation: Rotation, kv_cache: LayerCache | None, metadata: AttentionMetadata | None
    ) -> Tensor:
        x = self.attn(x, None, kv_cache, metadata, rotation=rotation, norm=self.attn_norm, residual=x)
        out: Tensor = self.mlp(x, norm=self.mlp_norm, residual=x)
        return out


class CausalLM(nn.Module):
    """A decoder-only language model built from a `ModelConfig`.

    Subclasses override what is theirs. Parameters are created on `device` in `dtype`; the loaders build on "meta" and
    assign.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._device, self._dtype = device, dtype
        self.rope = _make_rope(config, config.rope)
        self.local_rope = self.rope if config.local_rope is None else _make_rope(config, config.local_rope)
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(self.make_layer(index) for index in range(config.num_layers))
        self.norm = self.make_norm(config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    # ---- what a family may change -----------------------------------------------------------------------------------

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """A config.json of this family. Raises `KeyError` for a missing field, `ValueError` for a wrong one."""
        raise NotImplementedError

    def make_norm(self, dim: int) -> RMSNorm:
        return RMSNorm(dim, self.config.rms_norm_eps, device=self._device, dtype=self._dtype)

    def make_layer(self, index: int) -> DecoderLayer:
        d = self.config.hidden_size
        return DecoderLayer(self.make_attention(index), self.make_mlp(index), self.make_norm(d), self.make_norm(d))

    def make_attention(self, index: int) -> MultiHeadAttention | MultiHeadLatentAttention:
        config, window = self.config, self.config.layer_windows[index]
        return MultiHeadAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),  # a window of w tokens counts the token itself
            rope=self.local_rope if window else self.rope,
            qk_norm=self.make_norm if config.qk_norm else None,
            bias=config.qkv_bias,
            out_bias=config.o_bias,
            softmax_scale=config.softmax_scale,
            device=self._device,
            dtype=self._dtype,
        )

    def make_mlp(self, index: int) -> GatedMLP | MixtureOfExperts:
        config, moe = self.config, self.config.moe
        if moe is not None and moe.layers[index]:
            return _mixture(config, moe, self._device, self._dtype)
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            bias=config.mlp_bias,
            device=self._device,
            dtype=self._dtype,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(token_ids)
        return embedded

    # ---- the forward pass -------------------------------------------------------------------------------------------

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        kv_caches: Sequence[LayerCache] | None = None,
        metadata: AttentionMetadata | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        With `kv_caches` (one per layer) and `metadata`: token_ids (T,) int64 and positions (T,) int64 are a packed
        batch of new tokens; returns (T, d). Without: token_ids (B, S), positions default to 0, 1, …; returns (B, S, d).
        """
        if positions is None:
            if metadata is not None:
                raise ValueError(f"positions ({token_ids.shape[0]},) are missing: a packed batch needs them")
            positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
        rotation = self.rope(positions, metadata)
        stack = self._stack_for(kv_caches)
        if stack is not None and kv_caches is not None and metadata is not None:
            pages = [(cache.k, cache.v) for cache in kv_caches if isinstance(cache, LayerKVCache)]
            return stack(self.embed(token_ids), rotation.cos, rotation.sin, pages, metadata)
        caches = [None] * len(self.layers) if kv_caches is None else kv_caches
        local_rotation = rotation if self.local_rope is self.rope else self.local_rope(positions, metadata)
        x = self.embed(token_ids)
        for layer, window, cache in zip(self.layers, self.config.layer_windows, caches, strict=True):
            x = layer(x, local_rotation if window else rotation, cache, metadata)
        hidden: Tensor = self.norm(x)
        return hidden

    @cached_property
    def stack(self) -> DecoderStack | None:
        """All layers as one call, where they fit; made when first needed, with the weights of that moment."""
        return fuse(self)

    def _stack_for(self, kv_caches: Sequence[LayerCache] | None) -> DecoderStack | None:
        """The stack, when it can run over these caches and no other backend is forced."""
        if not kv_caches or forced_backend() not in (None, "cpu"):
            return None
        if self.stack is None or any(x.device.type != "cpu" for x in kv_caches[0].tensors):
            return None
        return self.stack if kv_caches[0].tensors[0].dtype in self.stack.cache_dtypes else None

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, d), or (B, S, d), to logits over the vocabulary, fp32."""
        logits: Tensor = self.lm_head(hidden, out_dtype=torch.float32)
        cap = self.config.final_logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: weights may be quantised, norms never are."""
        return self.norm.weight.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype for keys and values: that of activations, but fp16 where the layers run as one call on the CPU.

        Decode reads the whole cache at each step. fp16 moves margins between the default model's two best tokens
        by 0.002 (root mean square), a fifth of what fp16 for the whole model does.
        """
        return self.dtype if self.stack is None else self.stack.cache_dtypes[0]

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device


def _make_rope(config: ModelConfig, scaling: Mapping[str, Any]) -> RotaryEmbedding:
    turned = config.head_dim if config.mla is None else config.mla.rope_head_dim
    rotary_dim = int(turned * scaling.get("partial_rotary_factor", 1.0))
    rope_class = RotaryEmbedding if config.rope_freq_factors is None else FactoredRotaryEmbedding
    rope = rope_class(
        rotary_dim,
        scaling["rope_theta"],
        scaling=scaling,
        max_position_embeddings=config.max_position_embeddings,
        interleaved=config.rope_interleaved,
    )
    if isinstance(rope, FactoredRotaryEmbedding):
        rope.factors = config.rope_freq_factors or ()
    return rope


def _mixture(
    config: ModelConfig, moe: MoEConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> MixtureOfExperts:
    d, act = config.hidden_size, config.hidden_act
    router = Router(
        d,
        moe.num_experts,
        moe.top_k,
        scoring=moe.scoring,
        correction_bias=moe.correction_bias,
        num_groups=moe.num_groups,
        topk_groups=moe.topk_groups,
        norm_topk_prob=moe.norm_topk_prob,
        routed_scaling_factor=moe.routed_scaling_factor,
        device=device,
        dtype=dtype,
    )
    shared = GatedMLP(d, moe.shared_dim, act, device=device, dtype=dtype) if moe.shared_dim else None
    return MixtureOfExperts(
        router, Experts(moe.num_experts, d, moe.expert_dim, act, device=device, dtype=dtype), shared
    )
