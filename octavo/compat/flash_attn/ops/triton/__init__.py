"""`flash_attn.ops.triton`: of it only the rotary embedding."""
