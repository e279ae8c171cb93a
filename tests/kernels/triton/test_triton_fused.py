"""Fused inference kernels, interpreted, against their plain references."""

import pytest
import torch

from octavo.kernels.reference import gated_activation as reference_activation
from octavo.kernels.reference import norm as reference_norm
from octavo.kernels.reference import rotary_cache as reference_rotary
from octavo.kernels.spec import HeadNorm, Rotary
from octavo.kernels.triton import gated_activation, norm, rotary_cache

CLOSE = {"atol": 2e-6, "rtol": 2e-6}


def angles(tokens, rotary_dim, interleaved):
    turns = torch.rand(tokens, rotary_dim // 2) * 6
    return Rotary(turns.cos(), turns.sin(), interleaved)


@pytest.mark.parametrize("width", [1, 48, 128, 1000])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_takes_rows_of_any_stride(width, unit_offset):
    x, weight = torch.randn(3, 5, width + 7)[..., :width] * 3, torch.randn(width)
    expected = reference_norm.rms_norm(x, weight, 1e-5, unit_offset)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5, unit_offset), expected, **CLOSE)


# not bf16, which the interpreter truncates where hardware rounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_rms_norm_is_of_the_rounded_sum(dtype):
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((6, 96), (6, 96), (96,)))
    out, total = norm.add_rms_norm(x, residual, weight, 1e-6, False)
    expected, expected_total = reference_norm.add_rms_norm(x, residual, weight, 1e-6, False)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("activation", list(reference_activation.ACTIVATIONS))
@pytest.mark.parametrize("width", [5, 1025])
def test_gated_activation(activation, width):
    gate_up = torch.randn(4000 // width, 2 * width) * 4
    exact = reference_activation.gated_activation(gate_up.double(), activation)
    plain = reference_activation.gated_activation(gate_up, activation)
    ours = gated_activation.gated_activation(gate_up, activation)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def caches(tokens, heads, width, block_size=5):
    blocks = -(-tokens // block_size) + 2
    return [torch.full((blocks, block_size, heads, width), torch.nan) for _ in range(2)]


def slots(tokens, block_size=5):
    """Random different slots; one token has none."""
    result = torch.randperm((-(-tokens // block_size) + 2) * block_size)[:tokens]
    result[tokens // 2] = -1
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_dim"), [(32, 32), (24, 24), (40, 16), (16, 0)])
@pytest.mark.parametrize("norm_kind", [None, "plain", "unit_offset"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (8, 1)])
def test_rotate_and_store(interleaved, width, rotary_dim, norm_kind, heads, kv_heads):
    tokens = 7
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width + 3)[:, 1:-2]
    rotary = angles(tokens, rotary_dim, interleaved) if rotary_dim else None
    head_norm = None
    if norm_kind:
        head_norm = HeadNorm(torch.randn(width), torch.randn(width), 1e-5, norm_kind == "unit_offset")
    where = slots(tokens)
    got, expected = caches(tokens, kv_heads, width), caches(tokens, kv_heads, width)
    q = rotary_cache.rotate_and_store(qkv, heads, rotary, head_norm, *got, where)
    want = reference_rotary.rotate_and_store(qkv, heads, rotary, head_norm, *expected, where)
    torch.testing.assert_close(q, want, **CLOSE)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rank", "nope", "rope", "heads"), [(32, 16, 8, 3), (24, 12, 12, 5)])
def test_rotate_and_store_latent(interleaved, rank, nope, rope, heads):
    tokens = 6
    latent, q = torch.randn(tokens, rank + rope), torch.randn(tokens, heads, nope + rope)
    rotary, weight, where = angles(tokens, rope, interleaved), torch.randn(rank), slots(tokens)
    results = []
    for module in (rotary_cache, reference_rotary):
        absorbed = torch.full((tokens, heads, rank + rope), torch.nan)
        cache = torch.full((4, 5, rank + rope), torch.nan)
        module.rotate_and_store_latent(latent, q, absorbed, weight, 1e-6, rotary, cache, where)
        results.append((absorbed, cache))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **CLOSE)


def test_empty_batches():
    assert norm.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6, False).shape == (0, 8)
    assert gated_activation.gated_activation(torch.empty(0, 8), "silu").shape == (0, 4)
    k, v = caches(0, 1, 8)
    nothing = torch.empty(0, dtype=torch.int64)
    assert rotary_cache.rotate_and_store(torch.empty(0, 32), 2, None, None, k, v, nothing).shape == (0, 2, 8)
