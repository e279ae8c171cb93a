"""Which calls the Hopper forward takes, and how it addresses them: all of it without a GPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the Hopper kernels are written in Triton's Gluon")

from octavo.kernels.hopper import flash_bwd, flash_fwd, paged_prefill
from octavo.kernels.hopper.descriptors import WRAP
from octavo.kernels.hopper.flash_fwd import _descriptor, _readable_by_tma, refuses_flash_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.kernels.triton.launch import integer_key

CAUSAL = AttentionSpec(0.125, window_right=0)
NO_TENSORS = AttentionTensors()
CU = torch.tensor([0, 100, 200], dtype=torch.int32)


def qkv(head_dim=128, head_dim_v=None, dtype=torch.bfloat16, rows=128):
    q = torch.zeros(2, rows, 8, head_dim, dtype=dtype)
    return q, torch.zeros(2, 64, 2, head_dim, dtype=dtype), torch.zeros(2, 64, 2, head_dim_v or head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_takes_the_head_sizes_of_models(dims, dtype):
    assert refuses_flash_fwd(*qkv(*dims, dtype), CAUSAL, NO_TENSORS) is None


def test_takes_windows_softcap_and_sinks():
    spec = AttentionSpec(0.125, window_left=127, window_right=0, softcap=30.0)
    assert refuses_flash_fwd(*qkv(), spec, AttentionTensors(learnable_sink=torch.zeros(8))) is None


@pytest.mark.parametrize(
    ("call", "spec", "t", "says"),
    [
        (qkv(dtype=torch.float32), CAUSAL, NO_TENSORS, "float32"),
        (qkv(59), CAUSAL, NO_TENSORS, "59/59"),
        (qkv(576, 512), CAUSAL, NO_TENSORS, "576/512"),
        (qkv(), AttentionSpec(0.125, dropout_p=0.1), NO_TENSORS, "dropout_p"),
        (qkv(), AttentionSpec(-0.125), NO_TENSORS, "softmax_scale"),
        (qkv(), CAUSAL, AttentionTensors(alibi_slopes=torch.zeros(8)), "alibi_slopes"),
        (qkv(), CAUSAL, AttentionTensors(block_table=torch.zeros(2, 4)), "block_table"),
        (qkv(), CAUSAL, AttentionTensors(cu_seqlens_q=CU, max_seqlen_q=100), "cu_seqlens_k"),
        (qkv(rows=1), CAUSAL, NO_TENSORS, "the call has 1"),
        ((qkv()[0], *(x[:, :0] for x in qkv()[1:])), CAUSAL, NO_TENSORS, "no keys"),
    ],
)
def test_refuses_the_rest_and_says_why(call, spec, t, says):
    assert says in refuses_flash_fwd(*call, spec, t)


def test_copies_only_what_tma_cannot_address():
    packed = torch.zeros(2, 128, 3, 8, 64, dtype=torch.bfloat16)
    assert _readable_by_tma(packed[:, :, 1]).data_ptr() == packed[:, :, 1].data_ptr()  # q out of a merged qkv
    transposed = torch.zeros(2, 8, 128, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert _readable_by_tma(transposed) is transposed
    one_head = torch.zeros(2, 128, 1, 64, dtype=torch.bfloat16).as_strided((2, 128, 1, 64), (8192, 64, 7, 1))
    assert _readable_by_tma(one_head) is one_head  # the stride of an axis of size 1 says nothing
    for bad in (
        torch.zeros(2, 128, 64, 8, dtype=torch.bfloat16).transpose(2, 3),  # last axis not contiguous
        torch.zeros(2, 1, 8, 64, dtype=torch.bfloat16).expand(2, 128, 8, 64),  # stride 0
        torch.zeros(2, 128, 8, 68, dtype=torch.bfloat16)[..., :64],  # rows of 136 bytes
        torch.zeros(2 * 128 * 8 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 128, 8, 64),  # address not on 16 bytes
    ):
        copy = _readable_by_tma(bad)
        assert copy.is_contiguous()
        assert torch.equal(copy, bad)


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_takes_packed_sequences(dims):
    q, k, v = (x.flatten(0, 1) for x in qkv(*dims))
    assert refuses_flash_fwd(q, k, v, CAUSAL, AttentionTensors(CU, CU, 100, 100)) is None
    assert backward_refusal(q, k, v, t=AttentionTensors(CU, CU, 100, 100)) is None


@pytest.mark.parametrize("row", [0, 64, 128])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 64), (5, 63), (100, 130), (300, 100)])
def test_ragged_boxes_end_with_their_sequence(start, length, row):
    """The arithmetic of `box_at`: box row j is row start + row + j, inside until the sequence ends.

    The descriptor's base must be the tensor's own address: one before it, in memory that is not mapped, was an illegal
    access now and then.
    """
    x = torch.zeros(400, 2, 64, dtype=torch.bfloat16)
    rows = 64
    descriptor = _descriptor(x, rows, varlen=True)
    assert descriptor.base is x
    wrap = WRAP.value
    for j in range(rows):
        place = (wrap, start + length, wrap - length + row + j)
        inside = all(0 <= at < size for at, size in zip(place, descriptor.shape, strict=False))
        assert inside == (row + j < length)
        offset = sum(at * stride for at, stride in zip(place, descriptor.strides, strict=False)) * x.element_size()
        if inside:
            assert (x.data_ptr() + offset) % 2**64 == x[start + row + j].data_ptr()


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_ragged_descriptors_keep_within_what_tma_takes(heads):
    x = torch.zeros(400, heads, 192, dtype=torch.bfloat16)
    descriptor = _descriptor(x, 64, varlen=True)
    assert len(descriptor.shape) <= 5
    assert all(0 < size <= 2**32 for size in descriptor.shape)
    assert all(0 < 2 * stride < 2**40 and 2 * stride % 16 == 0 for stride in descriptor.strides[:-1])


def backward_refusal(q, k, v, spec=CAUSAL, t=NO_TENSORS):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return flash_bwd.refuses_flash_bwd(out, q, k, v, out, torch.zeros(2, 8, q.shape[1]), spec, t)


@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_backward_takes_the_head_sizes_of_models_and_any_length(dims):
    assert backward_refusal(*qkv(*dims)) is None
    assert backward_refusal(*qkv(*dims, rows=1)) is None
    softcapped = AttentionSpec(0.125, window_left=127, window_right=0, softcap=30.0, deterministic=True)
    assert backward_refusal(*qkv(*dims), softcapped, AttentionTensors(learnable_sink=torch.zeros(8))) is None


@pytest.mark.parametrize(
    ("call", "spec", "t", "says"),
    [
        (qkv(dtype=torch.float32), CAUSAL, NO_TENSORS, "float32"),
        (qkv(128, 64), CAUSAL, NO_TENSORS, "128/64"),
        (qkv(), AttentionSpec(0.125, dropout_p=0.1), NO_TENSORS, "dropout_p"),
        (qkv(), CAUSAL, AttentionTensors(attn_bias=torch.zeros(128, 64)), "attn_bias"),
        (qkv(rows=0), CAUSAL, NO_TENSORS, "no queries"),
    ],
)
def test_backward_refuses_the_rest_and_says_why(call, spec, t, says):
    assert says in backward_refusal(*call, spec, t)


def paged_refusal(new=(200, 100), page=16, num_splits=0, dtype=torch.bfloat16, **tensors):
    q = torch.zeros(sum(new), 8, 128, dtype=torch.bfloat16)
    cache = torch.zeros(40, page, 2, 128, dtype=dtype)
    cu = torch.tensor([0, *new], dtype=torch.int32).cumsum(0).int()
    t = AttentionTensors(
        cu, max_seqlen_q=max(new), max_seqlen_k=300, seqused_k=torch.tensor([300] * len(new), dtype=torch.int32),
        block_table=torch.zeros(len(new), 20, dtype=torch.int32), **tensors,
    )  # fmt: skip
    return paged_prefill.refuses_paged_attention(q, cache, cache, CAUSAL, t, num_splits)


@pytest.mark.parametrize("page", [16, 32, 48, 64, 256])
def test_paged_prefill_takes_chunks_over_pages_of_any_size_that_tma_can_box(page):
    assert paged_refusal(page=page) is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"new": (1, 1, 1)}, "on average"),
        ({"new": (300, *[1] * 9)}, "on average"),
        ({"page": 8}, "block sizes"),
        ({"num_splits": 4}, "splits no keys"),
        ({"dtype": torch.float32}, "q's dtype"),
        ({"leftpad_k": torch.zeros(2, dtype=torch.int32)}, "leftpad_k"),
    ],
)
def test_paged_prefill_leaves_the_rest_to_others(call, says):
    assert says in paged_refusal(**call)


def test_integers_are_told_apart_as_triton_does():
    assert integer_key((1, 0, 16, 48, 17, 2**31)) == (1, 2, 2, 2, 0, 6)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_launches_name_every_parameter_in_order(dims, varlen, monkeypatch):
    """`launch` hands arguments over by position, as nothing checks later."""
    launched = []

    def check(kernel, grid, arguments, constants, key, **options):
        names = [parameter.name for parameter in kernel.params]
        assert len(names) == len(arguments) + len(constants)
        assert names[len(arguments) :] == [name for name, _ in constants]
        assert all(size > 0 for size in grid)
        hash((constants, key))
        launched.append(kernel.fn.__name__)

    monkeypatch.setattr(flash_fwd, "launch", check)
    monkeypatch.setattr(flash_bwd, "launch", check)
    monkeypatch.setattr(flash_fwd, "_processors", lambda device: 132)
    for name in ("_launch_delta", "_launch_dq"):
        monkeypatch.setattr(flash_bwd.portable, name, lambda *arguments, name=name: launched.append(name))
    q, k, v = qkv(*dims)
    t = NO_TENSORS
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        t = AttentionTensors(CU, CU, 100, 100)
    out, lse = flash_fwd.flash_fwd(q, k, v, CAUSAL, t)
    flash_bwd.flash_bwd(out, q, k, v, out, lse, CAUSAL, t, dlse=lse)
    flash_bwd.flash_bwd(out, q, k, v, out, lse, replace(CAUSAL, deterministic=True), t)
    narrow = ["prepare_kernel", "backward_kernel", "finish_kernel"]
    wide = ["prepare_kernel", "backward_wide_kernel", "finish_kernel"]
    two_passes = ["_launch_delta", "dkdv_kernel", "_launch_dq"]
    calls = {256: wide + two_passes, 192: 2 * two_passes}.get(dims[0], 2 * narrow)
    assert launched == ["flash_fwd_kernel", *calls]
