"""The public functions: argument checks, dispatch to a kernel, accounting."""

from octavo.ops.dispatch import use_backend as use_backend
from octavo.ops.explain import Explanation as Explanation
from octavo.ops.explain import explain as explain
from octavo.ops.flash_attn import flash_attn_func as flash_attn_func
from octavo.ops.flash_attn import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from octavo.ops.flash_attn import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from octavo.ops.flash_attn import flash_attn_varlen_func as flash_attn_varlen_func
from octavo.ops.flash_attn import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from octavo.ops.flash_attn import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from octavo.ops.gated_activation import gated_activation as gated_activation
from octavo.ops.inference import fuses as fuses
from octavo.ops.kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache
from octavo.ops.merge import merge_attention_states as merge_attention_states
from octavo.ops.metadata import AttentionMetadata as AttentionMetadata
from octavo.ops.mla import flash_mla_with_kvcache as flash_mla_with_kvcache
from octavo.ops.mla import get_mla_metadata as get_mla_metadata
from octavo.ops.mla import mla_attention as mla_attention
from octavo.ops.norm import add_rms_norm as add_rms_norm
from octavo.ops.norm import rms_norm as rms_norm
from octavo.ops.paged import paged_attention as paged_attention
from octavo.ops.paged import store_kv_cache as store_kv_cache
from octavo.ops.paged import store_latent_cache as store_latent_cache
from octavo.ops.rotary_cache import rotate_and_store as rotate_and_store
from octavo.ops.rotary_cache import rotate_and_store_latent as rotate_and_store_latent
