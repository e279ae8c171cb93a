"""Paged attention that reads blocks in place, against the reference; whatever is not part of a sequence is poisoned.

Unused slots hold NaN and unused table entries lie far outside the cache, so reading one of either shows.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.cpu.paged_attention import paged_attention, refuses_paged_attention
from octavo.kernels.reference.paged_attention import paged_attention as reference
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

NOWHERE = 10**6  # a block number that no cache has
Call = tuple[Tensor, Tensor, Tensor, AttentionSpec, AttentionTensors]


def make_call(
    new: list[int],
    context: list[int],
    *,
    heads: tuple[int, int] = (9, 3),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sink: bool = False,
    seed: int = 0,
    **options: float,
) -> Call:
    """Sequences of `new` tokens behind `context` others, in shuffled blocks."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [n + c for n, c in zip(new, context, strict=True)]
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=rng)
    caches = [torch.full((len(order), block_size, heads[1], head_dim), torch.nan) for _ in range(2)]
    table = torch.full((len(new), max(counts) + 2), NOWHERE)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks, order = order[:count], order[count:]
        table[row, :count] = blocks
        for cache in caches:
            filled = torch.full((count * block_size, heads[1], head_dim), torch.nan)
            filled[:length] = torch.randn(length, heads[1], head_dim, generator=rng)
            cache[blocks] = filled.view(count, block_size, heads[1], head_dim)
    q = torch.randn(sum(new), heads[0], head_dim, generator=rng)
    tensors = AttentionTensors(
        cu_seqlens_q=torch.tensor([0, *new]).cumsum(0).int(),
        seqused_k=torch.tensor(lengths).int(),
        block_table=table.int(),
        max_seqlen_q=max(new),
        max_seqlen_k=max(lengths),
        learnable_sink=torch.randn(heads[0], generator=rng) if sink else None,
    )
    spec = AttentionSpec(**{"softmax_scale": head_dim**-0.5, "window_right": 0, **options})  # type: ignore[arg-type]
    return q.to(dtype), caches[0].to(dtype), caches[1].to(dtype), spec, tensors


def check(call: Call, factor: float = 2) -> None:
    """The error against fp64 is at most `factor` times that of plain torch in the same dtype, or 8 ulp of fp32."""
    q, k, v, spec, t = call
    assert refuses_paged_attention(*call) is None
    exact = reference(q.double(), k.double(), v.double(), spec, t)
    for ours, plain, right in zip(paged_attention(*call), reference(*call), exact, strict=True):
        assert torch.equal(ours.isinf(), right.isinf())
        errors = [(x.double() - right).nan_to_num(0, 0, 0).abs().max() for x in (ours, plain)]
        assert errors[0] <= factor * errors[1] + 8 * 2.0**-23 * right.nan_to_num(0, 0, 0).abs().max()


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_an_fp16_cache_under_fp32_queries(head_dim: int, threads: int) -> None:
    q, k, v, spec, t = make_call([1, 33, 1, 9], [200, 5, 0, 70], head_dim=head_dim)
    check((q, k.half(), v.half(), spec, t))


@pytest.mark.parametrize(
    ("new", "context"),
    [
        ([1], [4]),
        ([1, 1, 1], [4, 199, 63]),
        ([1], [2000]),
        ([40, 7, 100], [0, 73, 200]),
        ([1, 100, 1, 5], [999, 0, 2, 0]),
        ([1, 0, 2], [9, 5, 0]),
    ],
    ids=["one token", "decode", "long", "prefill", "mixed", "a sequence without new tokens"],
)
def test_rows_of_all_kinds_on_any_number_of_threads(new: list[int], context: list[int], threads: int) -> None:
    check(make_call(new, context))


@pytest.mark.parametrize(
    "options", [{"window_left": 20}, {"window_left": 0}, {"window_right": -1}, {"window_right": 3}]
)
def test_windows(options: dict[str, float]) -> None:
    check(make_call([1, 30, 1], [299, 170, 5], **options))


@pytest.mark.parametrize("new", [[1, 1], [30, 1]])
def test_softcap(new: list[int]) -> None:
    check(make_call(new, [299, 170], softcap=5.0, softmax_scale=1.0), factor=3)


def test_sinks_share_the_denominator(threads: int) -> None:
    check(make_call([1, 30, 1], [299, 170, 2000], sink=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((4, 4), 32), ((9, 3), 64), ((32, 8), 128), ((7, 1), 64), ((6, 2), 48), ((2, 2), 256)]
)
def test_half_precision_caches(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, threads: int) -> None:
    """bf16 by products of pairs where the CPU has them, whose last pair may be half empty."""
    check(make_call([1, 1, 30, 1], [299, 170, 40, 66], head_dim=head_dim, heads=heads, dtype=dtype))


@pytest.mark.parametrize("options", [{"window_left": 37}, {"softcap": 5.0}])
def test_options_of_bf16(options: dict[str, float]) -> None:
    check(make_call([1, 3, 1], [298, 171, 5], dtype=torch.bfloat16, sink=True, **options), factor=3)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size(block_size: int) -> None:
    check(make_call([1, 30], [299, 70], block_size=block_size))


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (48, 1)])
def test_any_grouping_of_heads(heads: tuple[int, int]) -> None:
    check(make_call([1, 3], [90, 70], heads=heads))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(-1, 80),
)
def test_random_batches(lengths: list[tuple[int, int]], block_size: int, window_left: int) -> None:
    new, context = zip(*lengths, strict=True)
    if sum(new) and all(n + c for n, c in lengths):
        check(make_call(list(new), list(context), block_size=block_size, window_left=window_left))


def test_what_it_cannot_do_is_refused_with_a_reason() -> None:
    q, k, v, spec, t = make_call([1], [4])
    assert "multiples of 16" in str(refuses_paged_attention(q[..., :8], k[..., :8], v[..., :8], spec, t))
    assert "an fp16 cache under fp32" in str(refuses_paged_attention(q.double(), k, v, spec, t))
    assert "dropout" in str(refuses_paged_attention(q, k, v, AttentionSpec(1.0, dropout_p=0.1), t))
    padded = AttentionTensors(leftpad_k=torch.zeros(1))
    assert "leftpad_k" in str(refuses_paged_attention(q, k, v, spec, padded))
