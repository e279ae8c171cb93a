"""The score of a query and a key, its mask and its dropout: one piece of code for forward and backward kernels.

Every function takes the query index `i` and the key index `j` already shaped to broadcast, so that a kernel may hold
its tile either way round. An option that is off is `None`, a constant to Triton: its branch is not compiled.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh by exp2; its Taylor series near 0, where 1 − e would cancel (both are good to 1e-7 at 0.2)."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    x2 = x * x
    near = x * (1 + x2 * (-0.3333333333 + x2 * (0.1333333333 + x2 * -0.0539682540)))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -far, far))


@triton.jit
def add_position_terms(s, i, j, shift, slope, bias, in_range, stride_bias_q, stride_bias_k):
    """s − slope · |i + shift − j| + bias[i, j]; `bias` points to the (batch, head) of each row."""
    if slope is not None:
        s -= slope * tl.abs(i + shift - j).to(tl.float32)
    if bias is not None:
        pointers = bias + i.to(tl.int64) * stride_bias_q + j.to(tl.int64) * stride_bias_k
        s += tl.load(pointers, mask=in_range, other=0.0).to(tl.float32)
    return s


@triton.jit
def visible(i, j, first_key, end_key, shift, window_left, window_right):
    """Key j is in use and in the window of row i."""
    seen = (j >= first_key) & (j < end_key)
    if window_left is not None:
        seen = seen & (j >= i + shift - window_left)
    if window_right is not None:
        seen = seen & (j <= i + shift + window_right)
    return seen


@triton.jit
def dropout_keep(seed, dropout_p, batch_head, i, j, max_seqlen_q, max_seqlen_k):
    """Which probabilities stay: Philox-4x32-10 at the 64-bit offset of (batch · Hq + head, i, j), in words c0, c1."""
    row = batch_head.to(tl.int64) * max_seqlen_q + i
    offset = row * max_seqlen_k + j
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    random, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def sequence(b, cu_seqlens, seqused, seqlen):
    """Start in the packed axis (int64, 0 when not packed) and rows in use of sequence b."""
    start = tl.zeros((), tl.int64)
    length = seqlen
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        length = tl.load(cu_seqlens + b + 1) - start.to(tl.int32)
    if seqused is not None:
        length = tl.load(seqused + b)
    return start, length
