"""The paged cache itself: per layer, tensors of num_blocks blocks of block_size tokens, and how many blocks fit.

Which block belongs to whom is the block manager's business; here are only bytes. Memory is reserved once and never
grows: what the log line says fits, fits. On a CPU the operating system hands out the pages as they are first written.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from octavo.engine.step import BlockCopy
from octavo.models.causal_lm import CausalLM
from octavo.nn.cache import HasCache, LayerKVCache, LayerLatentCache

logger = logging.getLogger(__name__)

CPU_MEMORY_FRACTION = 0.25  # of what is available: a laptop has other programs
CUDA_MEMORY_FRACTION = 0.9  # of what is free after the weights


class PagedKVCache:
    """The cache of all layers of one model. Owned by the model runner; the block manager hands out its block numbers.

    layers: one cache per attention layer, in order; what `CausalLM.forward` takes as `kv_caches`.
    """

    def __init__(
        self, model: CausalLM, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [_materialise(cache, device) for cache in _layer_caches(model, num_blocks, block_size, dtype)]
        self.bytes_per_token = sum(layer.bytes_per_token for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_size * self.bytes_per_token

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Performs copy-on-write in every layer; all sources are read before any destination is written."""
        if not copies:
            return
        device = self.layers[0].tensors[0].device
        src, dst = torch.tensor(copies, device=device).unbind(1)
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor[dst] = tensor[src]


def _layer_caches(
    model: CausalLM, num_blocks: int, block_size: int, dtype: torch.dtype
) -> list[LayerKVCache | LayerLatentCache]:
    """Each attention layer's own kind of cache, without memory behind it."""
    attention = [cast(HasCache, module) for module in model.modules() if hasattr(module, "new_cache")]
    return [layer.new_cache(num_blocks, block_size, dtype=dtype, device="meta") for layer in attention]


def _materialise(cache: LayerKVCache | LayerLatentCache, device: torch.device | str) -> LayerKVCache | LayerLatentCache:
    """Memory that is not cleared: nothing is read before it is written, and clearing 5 GB takes 2 s of a start."""
    return type(cache)(*(torch.empty_like(tensor, device=device) for tensor in cache.tensors))


def kv_bytes_per_token(model: CausalLM, dtype: torch.dtype) -> int:
    """Bytes that one token takes, over all layers, keys and values or latents."""
    return sum(cache.bytes_per_token for cache in _layer_caches(model, 1, 1, dtype))


def num_blocks_for(kv_cache_memory: int, bytes_per_token: int, block_size: int, max_model_len: int) -> int:
    """Blocks that fit in `kv_cache_memory` bytes; logs what that means in tokens and requests.

    Raises ValueError when not one block fits.
    """
    block_bytes = block_size * bytes_per_token
    num_blocks = kv_cache_memory // block_bytes
    if num_blocks < 1:
        raise ValueError(
            f"kv_cache_memory: expected at least one block of {block_size} tokens, {block_bytes} bytes, "
            f"got {kv_cache_memory} bytes; give more, or a smaller block_size"
        )
    tokens = num_blocks * block_size
    full_length = num_blocks / math.ceil(max_model_len / block_size)
    logger.info(
        "KV cache: %.2f GiB, %d blocks of %d tokens: %s tokens, %.1f requests of full length (%d tokens)",
        num_blocks * block_bytes / 2**30,
        num_blocks,
        block_size,
        f"{tokens:,}",
        full_length,
        max_model_len,
    )
    return num_blocks


def default_kv_cache_memory(device: torch.device, fraction: float | None = None) -> int:
    """Bytes for the cache when the user names none: a fraction of what the device has free right now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (fraction or CUDA_MEMORY_FRACTION))
    return int(available_host_memory() * (fraction or CPU_MEMORY_FRACTION))


def available_host_memory() -> int:
    """Bytes this process may still take: the machine's, or its container's when that is less."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:  # no Linux: half of what is installed
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available
