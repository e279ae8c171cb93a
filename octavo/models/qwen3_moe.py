"""Qwen3-MoE: Qwen3 with experts chosen by softmax in place of the MLP, in all layers or in some."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models.config import ModelConfig, MoEConfig
from octavo.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Qwen3's attention; layers of `mlp_only_layers`, and all but every decoder_sparse_step-th, stay dense."""

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        config = super().read_hf_config(hf)
        step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(config.num_layers))
        moe = MoEConfig(
            layers=sparse,
            num_experts=hf.get("num_experts") or hf["num_local_experts"],
            top_k=hf["num_experts_per_tok"],
            expert_dim=hf["moe_intermediate_size"],
            norm_topk_prob=hf.get("norm_topk_prob", False),
        )
        return replace(config, moe=moe)
