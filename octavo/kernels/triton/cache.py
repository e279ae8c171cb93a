"""Writes of new keys, values and latents into a paged cache, in place, one launch for keys and values together."""

import triton
import triton.language as tl

from octavo.kernels.spec import Tensor
from octavo.kernels.triton.flash_fwd import lacks_fp8


@triton.jit
def quantise(value, scale, h, heads, dtype: tl.constexpr):
    """value in `dtype`; with a scale, value / scale[h] to the nearest, what lies outside the range at its end."""
    if scale is not None:
        value = value.to(tl.float32) / tl.load(scale + h, mask=h < heads, other=1.0)
        if dtype == tl.int8:
            value = tl.minimum(tl.maximum(tl.floor(value + 0.5), -127.0), 127.0)
        else:
            value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    return value.to(dtype)


@triton.jit(do_not_specialize=["block_size"])
def store_kernel(
    x, y, x_cache, y_cache, x_scale, y_scale, slot_mapping, block_size, heads,
    stride_xt, stride_xh, stride_yt, stride_yh, stride_xcb, stride_xcs, stride_xch, stride_ycb, stride_ycs, stride_ych,
    WIDTH: tl.constexpr, WIDTH_Y: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Token `pid` of x (T, H, WIDTH), and of y where there is one, to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        block = slot // block_size
        offset = slot % block_size
        d = tl.arange(0, BLOCK_D)[None, :]
        for h0 in range(0, heads, BLOCK_H):
            h = (h0 + tl.arange(0, BLOCK_H))[:, None]
            mask = (h < heads) & (d < WIDTH)
            value = tl.load(x + token * stride_xt + h * stride_xh + d, mask=mask)
            to = x_cache + block * stride_xcb + offset * stride_xcs + h * stride_xch + d
            tl.store(to, quantise(value, x_scale, h, heads, x_cache.dtype.element_ty), mask=mask)
            if y is not None:
                mask = (h < heads) & (d < WIDTH_Y)
                value = tl.load(y + token * stride_yt + h * stride_yh + d, mask=mask)
                to = y_cache + block * stride_ycb + offset * stride_ycs + h * stride_ych + d
                tl.store(to, quantise(value, y_scale, h, heads, y_cache.dtype.element_ty), mask=mask)


def refuses_store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> str | None:
    """Why this backend cannot take the call, or None."""
    quantised = k_scale is not None
    return _refuses(k_cache, quantised) or _refuses(v_cache, quantised)


def store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """k (T, Hkv, D) and v (T, Hkv, Dv) to slot `block · block_size + offset` (T,) int64; a negative slot is skipped.

    With scales (Hkv,) the caches are fp8 or int8 and hold k / k_scale and v / v_scale.
    """
    _launch(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def refuses_store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> str | None:
    """Why this backend cannot take the call, or None."""
    return _refuses(kv_cache)


def store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """latent (T, R + rope) into kv_cache (num_blocks, block_size, R + rope)."""
    _launch(latent[:, None, :], None, kv_cache[:, :, None, :], None, slot_mapping)


def _refuses(cache: Tensor, quantised: bool = False) -> str | None:
    if cache.stride(-1) != 1:
        return "it writes caches whose last axis is contiguous"
    if quantised:
        return lacks_fp8(cache)
    return None if cache.dtype.is_floating_point else f"it writes floating-point caches, not {cache.dtype}"


def _launch(
    x: Tensor,
    y: Tensor | None,
    x_cache: Tensor,
    y_cache: Tensor | None,
    slot_mapping: Tensor,
    x_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> None:
    if x.shape[0] == 0:
        return
    tokens, heads, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    if y is not None and y.stride(-1) != 1:
        y = y.contiguous()
    width_y = width if y is None else y.shape[2]
    block_d = triton.next_power_of_2(max(width, width_y))
    block_h = min(triton.next_power_of_2(heads), max(1, 2048 // block_d))
    store_kernel[(tokens,)](
        x, y, x_cache, y_cache, x_scale, y_scale, slot_mapping.contiguous(), x_cache.shape[1], heads,
        *x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]),
        *x_cache.stride()[:3], *((0, 0, 0) if y_cache is None else y_cache.stride()[:3]),
        WIDTH=width, WIDTH_Y=width_y, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
