"""The cache holds what was written where, copies blocks whole, and its size is what it says."""

import pytest
import torch

from octavo.engine.kv_cache import (
    PagedKVCache,
    available_host_memory,
    default_kv_cache_memory,
    kv_bytes_per_token,
    num_blocks_for,
)
from octavo.engine.step import BlockCopy


@pytest.fixture
def cache(tiny_loaded):
    return PagedKVCache(tiny_loaded.model, num_blocks=7, block_size=5, dtype=torch.float32, device="cpu")


def test_bytes_are_exact(cache, tiny_loaded):
    held = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in layer.tensors)
    assert cache.nbytes == held == 7 * 5 * cache.bytes_per_token
    assert cache.bytes_per_token == tiny_loaded.config.kv_bytes_per_token(torch.float32)
    assert kv_bytes_per_token(tiny_loaded.model, torch.bfloat16) * 2 == cache.bytes_per_token
    assert len(cache.layers) == tiny_loaded.config.num_layers


def test_copies_read_all_sources_before_they_write(cache):
    """Chained and crossing copies: block 1 is both a source and a destination."""
    for layer in cache.layers:
        for tensor in layer.tensors:
            tensor.copy_(torch.arange(7.0).view(7, 1, 1, 1).expand_as(tensor))
    cache.copy_blocks([BlockCopy(1, 2), BlockCopy(0, 1), BlockCopy(6, 3)])
    for layer in cache.layers:
        for tensor in layer.tensors:
            assert tensor[:, 0, 0, 0].tolist() == [0, 0, 1, 6, 4, 5, 6]
            assert torch.equal(tensor, tensor[:, :1, :1, :1].expand_as(tensor))


def test_no_copies_touch_nothing(cache):
    cache.copy_blocks([])


def test_blocks_that_fit_and_what_the_log_says(caplog):
    caplog.set_level("INFO", logger="octavo")
    assert num_blocks_for(1000, bytes_per_token=10, block_size=4, max_model_len=9) == 25
    assert "25 blocks of 4 tokens: 100 tokens, 8.3 requests of full length (9 tokens)" in caplog.text


def test_memory_for_less_than_one_block_is_refused():
    with pytest.raises(ValueError, match="kv_cache_memory: expected at least one block of 4 tokens, 40 bytes, got 39"):
        num_blocks_for(39, bytes_per_token=10, block_size=4, max_model_len=9)


def test_the_default_is_a_share_of_what_is_free():
    available = available_host_memory()
    assert 1 << 26 < available < 1 << 44
    half = default_kv_cache_memory(torch.device("cpu"), 0.5)
    assert half == pytest.approx(available / 2, rel=0.2)
    assert default_kv_cache_memory(torch.device("cpu")) < half
