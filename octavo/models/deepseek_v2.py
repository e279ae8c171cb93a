"""DeepSeek-V2: latent attention (MLA), a few dense layers, then experts chosen by softmax, all or within groups."""

from collections.abc import Mapping
from typing import Any

from octavo.models.causal_lm import CausalLM
from octavo.models.config import MLAConfig, ModelConfig, MoEConfig, hf_common, hf_rope
from octavo.nn import MultiHeadLatentAttention


class DeepseekV2ForCausalLM(CausalLM):
    """The shared decoder with MLA and experts; V3 differs in its routing only."""

    def make_attention(self, index: int) -> MultiHeadLatentAttention:
        config, mla = self.config, self.config.mla
        assert mla is not None
        return MultiHeadLatentAttention(
            config.hidden_size,
            config.num_heads,
            mla.q_rank,
            mla.kv_rank,
            nope_head_dim=mla.nope_head_dim,
            rope_head_dim=mla.rope_head_dim,
            v_head_dim=mla.v_head_dim,
            rope=self.rope,
            softmax_scale=config.softmax_scale,
            bias=config.o_bias,
            device=self._device,
            dtype=self._dtype,
        )

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        mla = MLAConfig(
            q_rank=hf.get("q_lora_rank"),
            kv_rank=hf["kv_lora_rank"],
            nope_head_dim=hf["qk_nope_head_dim"],
            rope_head_dim=hf["qk_rope_head_dim"],
            v_head_dim=hf["v_head_dim"],
        )
        common = hf_common(hf, cls.__name__)
        common["num_kv_heads"] = common["num_heads"]
        common["head_dim"] = mla.nope_head_dim + mla.rope_head_dim  # Hugging Face's is the rotary part
        return ModelConfig(
            **common,
            rope=hf_rope(hf),
            rope_interleaved=hf.get("rope_interleave", True),
            o_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            mla=mla,
            moe=cls.read_moe(hf),
        )

    @classmethod
    def read_moe(cls, hf: Mapping[str, Any]) -> MoEConfig | None:
        method = hf.get("topk_method") or "greedy"
        grouped = method == "group_limited_greedy"
        if method not in ("greedy", "group_limited_greedy") or hf.get("scoring_func", "softmax") != "softmax":
            raise ValueError(
                f"topk_method={method!r}, scoring_func={hf.get('scoring_func')!r} of the model config: DeepSeek-V2 "
                "routes by softmax, greedy or group_limited_greedy"
            )
        if hf.get("norm_topk_prob"):  # DeepSeek's own code and transformers disagree on what it means here
            raise ValueError("norm_topk_prob=True of the model config is not supported for DeepSeek-V2")
        return deepseek_moe(
            hf, num_groups=hf["n_group"] if grouped else 1, topk_groups=hf["topk_group"] if grouped else 1
        )


def deepseek_moe(hf: Mapping[str, Any], **routing: Any) -> MoEConfig | None:
    """What V2 and V3 name alike; None when every layer is dense."""
    num_layers, dense = hf["num_hidden_layers"], hf.get("first_k_dense_replace") or 0
    if hf.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"moe_layer_freq of the model config must be 1, got {hf['moe_layer_freq']!r:.80}")
    if dense >= num_layers or not hf.get("n_routed_experts"):
        return None
    return MoEConfig(
        layers=tuple(index >= dense for index in range(num_layers)),
        num_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        expert_dim=hf["moe_intermediate_size"],
        shared_dim=hf["moe_intermediate_size"] * (hf.get("n_shared_experts") or 0),
        routed_scaling_factor=hf.get("routed_scaling_factor", 1.0),
        **routing,
    )
