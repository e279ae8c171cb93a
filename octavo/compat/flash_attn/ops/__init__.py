"""`flash_attn.ops`: of it only what attention needs."""
