"""`flash_attn.flash_attn_interface`: the same functions under their module's name."""

from octavo.ops import flash_attn_func as flash_attn_func
from octavo.ops import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from octavo.ops import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from octavo.ops import flash_attn_varlen_func as flash_attn_varlen_func
from octavo.ops import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from octavo.ops import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from octavo.ops import flash_attn_with_kvcache as flash_attn_with_kvcache
