"""Packed sequences of many tiles, each tensor in an allocation of its own, so that nothing is mapped just before it.

A TMA descriptor whose base lies before its tensor is an illegal access there now and then, even though nothing is read
at the base. A fault ends a process, and without its caching allocator torch asks the driver for each tensor: so every
case is this file, run as a program.
"""

import os
import subprocess
import sys

import pytest
import torch

from octavo.kernels.reference.flash_bwd import flash_bwd as reference_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
]
HEADS = 16
NO_TENSORS = AttentionTensors()


@pytest.mark.parametrize(
    "case",
    ["packed 17 377 128 128", "packed 17 377 192 128", "packed 5 1001 64 64", "paged 1 4000 128", "paged 5 733 64"],
)
def test_sequences_that_begin_their_allocation(case):
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sys.executable, __file__, *case.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(op, *arguments):
    """By the Hopper kernels where there are such, which must not refuse."""
    backend = "hopper" if torch.cuda.get_device_capability() == (9, 0) else None
    return dispatch.run(op, arguments[0].device, arguments, backend)


def randn(*shape):
    return torch.randn(shape, device="cuda").bfloat16()


def cumulative(lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


def relative_error(x, wanted):
    return ((x.float() - wanted).norm() / wanted.norm()).item()


def packed(sequences, length, head_dim, head_dim_v):
    """Forward and backward, each sequence against fp32 on its own."""
    lengths = [length + 10 * i for i in range(sequences)]
    cu = cumulative(lengths)
    q, k = (randn(sum(lengths), HEADS, head_dim) for _ in "qk")
    v, dout = (randn(sum(lengths), HEADS, head_dim_v) for _ in "vg")
    spec, t = AttentionSpec(head_dim**-0.5, window_right=0), AttentionTensors(cu, cu, max(lengths), max(lengths))
    out, lse = run("flash_fwd", q, k, v, spec, t)
    gradients = run("flash_bwd", dout, q, k, v, out, lse, spec, t)
    for b in range(sequences):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        one = [x[None, rows].float() for x in (q, k, v)]
        want, want_lse = reference_fwd(*one, spec, NO_TENSORS)
        wanted = reference_bwd(dout[None, rows].float(), *one, want, want_lse, spec, NO_TENSORS)
        # bf16 rounding of P, dS and the results gives 2e-3 and 3e-3
        assert relative_error(out[rows], want[0]) < 4e-3
        assert max(relative_error(a[rows], b[0]) for a, b in zip(gradients[:3], wanted[:3], strict=True)) < 6e-3


def paged(sequences, length, head_dim, page=16):
    """A prompt at once, over blocks of a cache in random order."""
    blocks = -(-length // page)
    caches = [randn(sequences * blocks, page, HEADS // 2, head_dim) for _ in "kv"]
    table = torch.randperm(sequences * blocks, device="cuda").int().view(sequences, blocks)
    q, cu = randn(sequences * length, HEADS, head_dim), cumulative([length] * sequences)
    used = torch.full((sequences,), length, device="cuda", dtype=torch.int32)
    spec = AttentionSpec(head_dim**-0.5, window_right=0)
    t = AttentionTensors(cu, max_seqlen_q=length, max_seqlen_k=length, seqused_k=used, block_table=table)
    out, _ = run("paged_attention", q, *caches, spec, t, 0)
    for b in range(sequences):
        keys, values = (x[table[b].long()].flatten(0, 1)[None, :length].float() for x in caches)
        rows = slice(b * length, (b + 1) * length)
        for head in range(0, HEADS, 2):  # one head's scores at a time: they are large
            pair = slice(head, head + 2)
            one = [x[:, :, head // 2 : head // 2 + 1] for x in (keys, values)]
            want, _ = reference_fwd(q[None, rows, pair].float(), *one, spec, NO_TENSORS)
            assert relative_error(out[rows, pair], want[0]) < 4e-3


if __name__ == "__main__":
    torch.manual_seed(0)
    {"packed": packed, "paged": paged}[sys.argv[1]](*map(int, sys.argv[2:]))
