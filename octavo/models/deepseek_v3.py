"""DeepSeek-V3 (R1, Moonlight, …): V2 with experts chosen by sigmoid, a correction bias and the best groups.

A checkpoint's layers for multi-token prediction are left out, as is usual for plain decoding.
"""

from collections.abc import Mapping
from typing import Any

from octavo.models.config import MoEConfig
from octavo.models.deepseek_v2 import DeepseekV2ForCausalLM, deepseek_moe


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V2 with V3's router."""

    @classmethod
    def read_moe(cls, hf: Mapping[str, Any]) -> MoEConfig | None:
        method, scoring = hf.get("topk_method", "noaux_tc"), hf.get("scoring_func", "sigmoid")
        if (method, scoring) != ("noaux_tc", "sigmoid"):
            raise ValueError(
                f"topk_method={method!r}, scoring_func={scoring!r} of the model config: DeepSeek-V3 routes by "
                "noaux_tc, sigmoid"
            )
        return deepseek_moe(
            hf,
            scoring="sigmoid",
            correction_bias=True,
            num_groups=hf.get("n_group") or 1,
            topk_groups=hf.get("topk_group") or 1,
            norm_topk_prob=hf.get("norm_topk_prob", True),
        )
