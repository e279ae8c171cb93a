"""flash_attn_with_kvcache: append, rotate, attend, over dense and paged caches."""

import pytest
import torch

from octavo import ops
from octavo.ops.rotary import apply_rotary

BATCH, SEQLEN_CACHE, HEADS, KV_HEADS, DIM = 3, 17, 4, 2, 16
ROW = torch.zeros(5, dtype=torch.int32)


def rotate_by_complex_numbers(x, cos, sin, positions, interleaved):
    """x (B, S, H, D) as complex numbers times e^{iθ}, in the layout asked for."""
    half = cos.shape[1]
    turn = torch.complex(cos, sin)[positions.long()][:, :, None]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = rotated.unflatten(-1, (half, 2)) if interleaved else rotated.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), rest], dim=-1)


@pytest.fixture
def caches():
    torch.manual_seed(0)
    return torch.randn(2, 5, SEQLEN_CACHE, KV_HEADS, DIM).unbind(0)  # two rows more than the batch


@pytest.fixture
def angles():
    return tuple(torch.randn(2, 40, DIM // 4).mul(3).unbind(0))


def paged(cache, page_size):
    """The same keys in scattered pages: `(pages, block_table)`; what is in no page is NaN."""
    per_row = -(-cache.shape[1] // page_size)
    table = torch.randperm(cache.shape[0] * per_row + 4)[: cache.shape[0] * per_row].view(cache.shape[0], per_row)
    pages = torch.full((cache.shape[0] * per_row + 4, page_size, *cache.shape[2:]), torch.nan)
    for b, row in enumerate(cache):
        for j, key in enumerate(row):
            pages[table[b, j // page_size], j % page_size] = key
    return pages, table.int()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_is_a_turn_of_complex_numbers(interleaved):
    angle = torch.randn(9, 3)
    cos, sin = angle.cos(), angle.sin()
    x, positions = torch.randn(2, 4, 3, 8), torch.randint(0, 9, (2, 4))
    expected = rotate_by_complex_numbers(x, cos, sin, positions, interleaved)
    torch.testing.assert_close(apply_rotary(x, cos, sin, positions, interleaved), expected)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"window_size": (4, 0)}])
@pytest.mark.parametrize("page_size", [None, 1, 3, 16])
def test_append_rotate_attend(caches, angles, options, page_size, interleaved):
    angle, _ = angles
    cos, sin = angle.cos(), angle.sin()
    seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    q = torch.randn(BATCH, 4, HEADS, DIM)
    k, v = torch.randn(2, BATCH, 3, KV_HEADS, DIM).unbind(0)
    k_dense, v_dense = (cache[:BATCH].clone() for cache in caches)

    steps = torch.arange(4)
    together = not options
    q_positions = seqlens[:, None].expand(-1, 4) if together else seqlens[:, None] + steps
    q_turned = rotate_by_complex_numbers(q, cos, sin, q_positions, interleaved)
    k_turned = rotate_by_complex_numbers(k, cos, sin, seqlens[:, None] + steps[:3], interleaved)
    for b, length in enumerate(seqlens.tolist()):
        k_dense[b, length : length + 3], v_dense[b, length : length + 3] = k_turned[b], v[b]
    expected = ops.flash_attn_func(q_turned, k_dense, v_dense, seqused_k=seqlens + 3, return_lse=True, **options)

    table = None
    k_cache, v_cache = (cache.clone() for cache in caches)
    if page_size is not None:
        torch.manual_seed(1)
        k_cache, table = paged(caches[0][:BATCH], page_size)
        torch.manual_seed(1)
        v_cache, _ = paged(caches[1][:BATCH], page_size)
    out = ops.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v, cos, sin, seqlens),
        block_table=table,
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **options,
    )
    torch.testing.assert_close(out, expected)
    if page_size is None:
        torch.testing.assert_close(k_cache[:BATCH], k_dense)
        torch.testing.assert_close(k_cache[BATCH:], caches[0][BATCH:])


def test_rows_of_the_cache_by_index_and_from_leftpad_on(caches):
    q = torch.randn(BATCH, 1, HEADS, DIM)
    rows, leftpad = torch.tensor([4, 0, 4], dtype=torch.int32), torch.tensor([0, 3, 9], dtype=torch.int32)
    out = ops.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=11, cache_batch_idx=rows, cache_leftpad=leftpad, causal=True
    )
    for b in range(BATCH):
        k, v = (cache[None, rows[b], leftpad[b] : 11] for cache in caches)
        torch.testing.assert_close(out[b], ops.flash_attn_func(q[None, b], k, v, causal=True)[0])


def test_whole_cache_by_default_and_every_score_option(caches):
    k_cache, v_cache = (cache[:BATCH] for cache in caches)
    q, qv = torch.randn(2, BATCH, 2, HEADS, DIM).unbind(0)
    options = {"softcap": 2.0, "softmax_scale": 0.3, "alibi_slopes": torch.rand(HEADS), "qv": qv}
    options |= {"learnable_sink": torch.randn(HEADS), "causal": True}
    out = ops.flash_attn_with_kvcache(q, k_cache, v_cache, num_splits=3, **options)
    torch.testing.assert_close(out, ops.flash_attn_func(q, k_cache, v_cache, **options))


def test_backward_is_refused(caches):
    q = torch.randn(5, 1, HEADS, DIM, requires_grad=True)
    out = ops.flash_attn_with_kvcache(q, *caches)
    with pytest.raises(NotImplementedError, match="no backward"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("k, v: expected both", {"k": torch.zeros(5, 1, KV_HEADS, DIM), "cache_seqlens": 3}),
        ("cache_seqlens: expected the keys in use", {"append": 1}),
        ("cache_seqlens, k: expected at most 17 keys", {"append": 3, "cache_seqlens": 15}),
        ("cache_seqlens, k: expected at most 17 keys", {"cache_seqlens": 18}),
        ("rotary_cos: expected k and v", {"rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 4)}),
        ("cache_batch_idx: expected None", {"cache_batch_idx": ROW, "block_table": ROW[:, None], "cache_seqlens": 1}),
    ],
)
def test_mistakes_name_the_argument(caches, message, change):
    change = dict(change)
    appended = change.pop("append", 0)
    if appended:
        change |= dict.fromkeys(("k", "v"), torch.zeros(5, appended, KV_HEADS, DIM))
    with pytest.raises(ValueError, match=message):
        ops.flash_attn_with_kvcache(torch.zeros(5, 1, HEADS, DIM), *caches, **change)
