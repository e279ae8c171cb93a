"""flash-attn 2's top-level names, served by Octavo."""

from octavo.compat.flash_attn.flash_attn_interface import flash_attn_func as flash_attn_func
from octavo.compat.flash_attn.flash_attn_interface import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from octavo.compat.flash_attn.flash_attn_interface import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from octavo.compat.flash_attn.flash_attn_interface import flash_attn_varlen_func as flash_attn_varlen_func
from octavo.compat.flash_attn.flash_attn_interface import (
    flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func,
)
from octavo.compat.flash_attn.flash_attn_interface import (
    flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func,
)
from octavo.compat.flash_attn.flash_attn_interface import flash_attn_with_kvcache as flash_attn_with_kvcache

__version__ = "2.8.4"  # the flash-attn whose API this is: callers compare it
