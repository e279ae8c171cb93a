"""Octavo: attention that fits.

Names load on first use, so that `import octavo` costs milliseconds and `octavo.nn` brings neither the engine nor
Triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "octavo.llm": ["LLM"],
    "octavo.engine.sampling_params": ["SamplingParams", "BeamSearchParams"],
    "octavo.engine.structured_output": ["StructuredOutputsParams"],
    "octavo.engine.outputs": ["RequestOutput", "CompletionOutput"],
    "octavo.engine.async_engine": ["AsyncLLM"],
    "octavo.nn": ["MultiHeadAttention", "MultiHeadLatentAttention"],
    "octavo.ops": [
        "Explanation",
        "explain",
        "flash_attn_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_kvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_with_kvcache",
        "flash_mla_with_kvcache",
        "get_mla_metadata",
        "merge_attention_states",
        "mla_attention",
        "paged_attention",
        "store_kv_cache",
        "store_latent_cache",
        "use_backend",
        "AttentionMetadata",
    ],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncLLM as AsyncLLM
    from octavo.engine.outputs import CompletionOutput as CompletionOutput
    from octavo.engine.outputs import RequestOutput as RequestOutput
    from octavo.engine.sampling_params import BeamSearchParams as BeamSearchParams
    from octavo.engine.sampling_params import SamplingParams as SamplingParams
    from octavo.engine.structured_output import StructuredOutputsParams as StructuredOutputsParams
    from octavo.llm import LLM as LLM
    from octavo.nn import MultiHeadAttention as MultiHeadAttention
    from octavo.nn import MultiHeadLatentAttention as MultiHeadLatentAttention
    from octavo.ops import AttentionMetadata as AttentionMetadata
    from octavo.ops import Explanation as Explanation
    from octavo.ops import explain as explain
    from octavo.ops import flash_attn_func as flash_attn_func
    from octavo.ops import flash_attn_kvpacked_func as flash_attn_kvpacked_func
    from octavo.ops import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
    from octavo.ops import flash_attn_varlen_func as flash_attn_varlen_func
    from octavo.ops import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
    from octavo.ops import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
    from octavo.ops import flash_attn_with_kvcache as flash_attn_with_kvcache
    from octavo.ops import flash_mla_with_kvcache as flash_mla_with_kvcache
    from octavo.ops import get_mla_metadata as get_mla_metadata
    from octavo.ops import merge_attention_states as merge_attention_states
    from octavo.ops import mla_attention as mla_attention
    from octavo.ops import paged_attention as paged_attention
    from octavo.ops import store_kv_cache as store_kv_cache
    from octavo.ops import store_latent_cache as store_latent_cache
    from octavo.ops import use_backend as use_backend


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
