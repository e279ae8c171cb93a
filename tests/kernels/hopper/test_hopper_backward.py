"""What only the Hopper backward could get wrong, on such a GPU; `tests/gpu` has the matrix of all GPU kernels."""

from dataclasses import replace

import pytest
import torch

from octavo.kernels.reference.flash_bwd import flash_bwd as reference_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0: none here",
    ),
]
NO_TENSORS = AttentionTensors()


def randn(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


def backward(dout, q, k, v, out, lse, spec, t=NO_TENSORS):
    from octavo.kernels.hopper.flash_bwd import flash_bwd, refuses_flash_bwd

    arguments = (dout, q, k, v, out, lse, spec, t)
    assert refuses_flash_bwd(*arguments) is None
    return flash_bwd(*arguments)[:3]


def inputs(batch, rows, keys, heads, heads_k, head_dim):
    """dout, q, k, v."""
    q_shape, k_shape = (batch, rows, heads, head_dim), (batch, keys, heads_k, head_dim)
    return randn(*q_shape), randn(*q_shape, seed=1), randn(*k_shape, seed=2), randn(*k_shape, seed=3)


def relative_errors(ours, wanted):
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, wanted, strict=True)]


@pytest.mark.parametrize(("head_dim", "spec"), [
    (64, AttentionSpec(0.125, window_right=0)),
    (128, AttentionSpec(0.09)),
    (256, AttentionSpec(0.06, window_left=300, window_right=0)),
])  # fmt: skip
def test_many_thread_blocks_add_to_dq_in_a_fixed_order_if_asked(head_dim, spec):
    """More thread blocks than multiprocessors, grouped heads, lengths that fill no block: right, and the same bits."""
    dout, q, k, v = inputs(3, 1500, 1700, 8, 4, head_dim)
    out, lse = reference_fwd(q.float(), k.float(), v.float(), spec, NO_TENSORS)
    wanted = reference_bwd(dout.float(), q.float(), k.float(), v.float(), out, lse, spec, NO_TENSORS)[:3]
    arguments = (dout, q, k, v, out.bfloat16(), lse, replace(spec, deterministic=True))
    first = backward(*arguments)
    assert max(relative_errors(first, wanted)) < 5e-3  # bf16 rounding of P, dS and the gradients: 2.4e-3 to 3e-3
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, backward(*arguments), strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_neighbouring_sequences_do_not_leak(head_dim):
    """A sequence full of NaN between two others, and NaN behind the last one; rows of no sequence get zeros."""
    lengths = [(128, 128), (77, 90), (200, 150)]
    cu_q, cu_k = (torch.tensor([0, *x], device="cuda").cumsum(0).int() for x in zip(*lengths, strict=True))
    rows, keys = int(cu_q[-1]) + 50, int(cu_k[-1]) + 50
    dout, q, k, v = (x[0] for x in inputs(1, rows, keys, 2, 2, head_dim))
    spec = AttentionSpec(head_dim**-0.5, window_right=0)
    t = AttentionTensors(cu_q, cu_k, 200, 150)
    for x, cu in ((dout, cu_q), (q, cu_q), (k, cu_k), (v, cu_k)):
        x[cu[1] : cu[2]] = x[cu[3] :] = float("nan")
    out, lse = reference_fwd(q.float(), k.float(), v.float(), spec, t)
    ours = backward(dout, q, k, v, out.bfloat16(), lse, spec, t)
    for a in (0, 2):
        part_q, part_k = slice(int(cu_q[a]), int(cu_q[a + 1])), slice(int(cu_k[a]), int(cu_k[a + 1]))
        one = [x[None, s].float() for x, s in ((dout, part_q), (q, part_q), (k, part_k), (v, part_k))]
        out_one, lse_one = reference_fwd(*one[1:], spec, NO_TENSORS)
        wanted = reference_bwd(*one, out_one, lse_one, spec, NO_TENSORS)[:3]
        got = [x[None, s] for x, s in zip(ours, (part_q, part_k, part_k), strict=True)]
        assert max(relative_errors(got, wanted)) < 5e-3
    for x, cu in zip(ours, (cu_q, cu_k, cu_k), strict=True):
        assert not x[int(cu[-1]) :].any()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_that_see_nothing_give_no_gradient(head_dim):
    """More causal queries than keys: the first rows see none, and their LSE is -inf."""
    dout, q, k, v = inputs(2, 300, 100, 2, 1, head_dim)
    spec = AttentionSpec(head_dim**-0.5, window_right=0)
    out, lse = reference_fwd(q.float(), k.float(), v.float(), spec, NO_TENSORS)
    wanted = reference_bwd(dout.float(), q.float(), k.float(), v.float(), out, lse, spec, NO_TENSORS)[:3]
    ours = backward(dout, q, k, v, out.bfloat16(), lse, spec)
    assert not ours[0][:, :200].any()
    assert max(relative_errors(ours, wanted)) < 5e-3
