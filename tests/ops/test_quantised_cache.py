"""A KV cache in fp8 or int8 through the public functions, on the CPU: stored, read, refused when it does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import ops
from octavo.kernels.reference.cache import dequantise, quantise

FP8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FP8: 448.0, INT8: 127.0}
SCALES = torch.tensor([0.02, 0.05])


def metadata_of(length):
    return ops.AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32), cache_seqlens=torch.tensor([length], dtype=torch.int32),
        block_table=torch.tensor([[2, 0, 1]], dtype=torch.int32), slot_mapping=torch.tensor([0]),
        max_seqlen_q=1, max_seqlen_k=length,
    )  # fmt: skip


def caches(dtype):
    return [torch.zeros(4, 16, 2, 32).to(dtype) for _ in "kv"]


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_what_was_stored_is_attended_to(dtype):
    """The output is that of attention over the rounded keys and values, and as near that over the true ones as the
    rounding allows: a logit that moves by d changes a probability by a factor of at most e^2d."""
    k, v = torch.randn(2, 40, 2, 32)
    k_cache, v_cache = caches(dtype)
    slots = torch.cat([torch.arange(32, 48), torch.arange(24)])
    ops.store_kv_cache(k, v, k_cache, v_cache, slots, k_scale=SCALES, v_scale=SCALES)
    q = torch.randn(1, 4, 32)
    out = ops.paged_attention(q, k_cache, v_cache, metadata_of(40), k_scale=SCALES, v_scale=SCALES)
    plain = [torch.zeros(4, 16, 2, 32) for _ in "kv"]
    rounded = [dequantise(quantise(x, SCALES, dtype), SCALES, torch.float32) for x in (k, v)]
    ops.store_kv_cache(*rounded, *plain, slots)
    torch.testing.assert_close(out, ops.paged_attention(q, *plain, metadata_of(40)))
    ops.store_kv_cache(k, v, *plain, slots)
    exact = ops.paged_attention(q, *plain, metadata_of(40))
    k_error, v_error = (rounded[0] - k).repeat_interleave(2, 1), (rounded[1] - v).abs().max()
    moved = torch.einsum("qhd,khd->hk", q, k_error).abs().max() / 32**0.5
    assert 0 < (out - exact).abs().max() <= v_error + torch.expm1(2 * moved) * v.abs().max()


@pytest.mark.parametrize("dtype", [FP8, INT8])
@given(number=st.floats(-1e4, 1e4, width=32), scale=st.floats(2**-10, 10, width=32))
def test_a_number_is_off_by_no_more_than_documented(dtype, number, scale):
    """1/16 of itself in fp8 (2^-10 scales near 0), half a scale in int8; what is too large becomes the largest."""
    x, scales = torch.tensor([[[number]]]), torch.tensor([scale])
    back = dequantise(quantise(x, scales, dtype), scales, torch.float32)
    inside = x.clamp(-LARGEST[dtype] * scale, LARGEST[dtype] * scale)
    bound = scale / 2 if dtype == INT8 else max(abs(inside.item()) / 16, 2**-10 * scale)
    assert abs((back - inside).item()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v_scale": None}, "v_scale"),
        ({"k_scale": torch.ones(3)}, "k_scale"),
        ({"k_scale": torch.ones(2, dtype=torch.float64)}, "float32"),
        ({"dtype": torch.float32}, "float8_e4m3fn or int8"),
        ({"k_scale": None, "v_scale": None}, "k_cache"),
    ],
)
def test_scales_and_caches_that_do_not_fit_are_refused_by_name(change, says):
    settings = {"k_scale": SCALES, "v_scale": SCALES, "dtype": INT8, **change}
    k_cache, v_cache = caches(settings.pop("dtype"))
    with pytest.raises(ValueError, match=says):
        ops.paged_attention(torch.randn(1, 4, 32), k_cache, v_cache, metadata_of(40), **settings)


def test_storing_into_a_quantised_cache_needs_its_scales():
    k = torch.randn(1, 2, 32)
    with pytest.raises(ValueError, match="k_scale"):
        ops.store_kv_cache(k, k, *caches(FP8), torch.tensor([0]))
