"""What only the Hopper forward could get wrong, on such a GPU; `tests/gpu` has the matrix that all GPU kernels pass."""

import pytest
import torch

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


def forward(q, k, v, spec, t=NO_TENSORS):
    from octavo.kernels.hopper.flash_fwd import flash_fwd, refuses_flash_fwd

    assert refuses_flash_fwd(q, k, v, spec, t) is None
    return flash_fwd(q, k, v, spec, t)


def assert_right(ours, q, k, v, spec, t=NO_TENSORS):
    """Within twice the error that rounding P and the output to bf16 gives."""
    out, lse = ours
    want, want_lse = reference_fwd(q.float(), k.float(), v.float(), spec, t)
    allowed = 2 * 2.0**-8 * v.float().abs().amax().item()
    assert (out.float() - want).abs().max().item() <= allowed
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_maxima_that_keep_outgrowing_their_reference(head_dim):
    """Keys are walked from the last to the first: scores that grow that way move the reference at every block."""
    q, k, v = randn(1, 192, 2, head_dim), randn(1, 1000, 2, head_dim, seed=1), randn(1, 1000, 2, head_dim, seed=2)
    q[..., 0], k[..., 0] = 4.0, torch.linspace(200, 0, 1000, device="cuda").bfloat16()[None, :, None]
    spec = AttentionSpec(1.0 / 8)
    assert_right(forward(q, k, v, spec), q, k, v, spec)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_neighbouring_sequences_do_not_leak(head_dim):
    """A sequence full of NaN between two others, and NaN behind the last one."""
    lengths = [(128, 128), (77, 90), (200, 150)]
    cu_q, cu_k = (torch.tensor([0, *x], device="cuda").cumsum(0).int() for x in zip(*lengths, strict=True))
    q, k, v = (randn(n + 50, 2, head_dim, seed=s) for s, n in enumerate((int(cu_q[-1]), int(cu_k[-1]), int(cu_k[-1]))))
    k[cu_k[1] : cu_k[2]] = v[cu_k[1] : cu_k[2]] = k[cu_k[3] :] = v[cu_k[3] :] = float("nan")
    spec = AttentionSpec(head_dim**-0.5, window_right=0)
    out, lse = forward(q, k, v, spec, AttentionTensors(cu_q, cu_k, 200, 150))
    for a in (0, 2):
        rows, keys = slice(int(cu_q[a]), int(cu_q[a + 1])), slice(int(cu_k[a]), int(cu_k[a + 1]))
        one = tuple(x[None, y] for x, y in ((q, rows), (k, keys), (v, keys)))
        assert_right((out[None, rows], lse[None, :, rows]), *one, spec)
    assert not out[int(cu_q[-1]) :].any()
    assert lse[:, int(cu_q[-1]) :].isneginf().all()


def test_many_tiles_and_two_hundred_repeats_are_the_same_bits():
    """More tiles than multiprocessors: the counter hands them out in an order that differs between runs."""
    q, k, v = (randn(4, 1000, 8, 128, seed=s) for s in range(3))
    spec = AttentionSpec(128**-0.5, window_right=0)
    first = forward(q, k, v, spec)
    assert_right(first, q, k, v, spec)
    for _ in range(200):
        again = forward(q, k, v, spec)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
