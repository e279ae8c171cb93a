"""The public functions: argument checks, dispatch to a kernel, accounting."""

from octavo.ops.metadata import AttentionMetadata as AttentionMetadata
from octavo.ops.mla import mla_attention as mla_attention
from octavo.ops.paged import paged_attention as paged_attention
from octavo.ops.paged import store_kv_cache as store_kv_cache
from octavo.ops.paged import store_latent_cache as store_latent_cache
