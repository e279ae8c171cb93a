"""Dense and packed calls on the compiled paged kernel, against the reference; only large calls may come there."""

import pytest
import torch

from octavo.kernels.cpu import dense_in_place, flash_fwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors

OPTIONS = [{"window_right": 0}, {"window_left": 9, "window_right": 2}, {"softcap": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window", "softcap"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sink", [False, True])
def test_against_the_reference(monkeypatch, options, packed, sink):
    monkeypatch.setattr(dense_in_place, "WORTH_COMPILING", 0)
    torch.manual_seed(0)
    spec = AttentionSpec(0.2, **options)
    t = AttentionTensors(max_seqlen_q=31, max_seqlen_k=37, learnable_sink=torch.randn(6) if sink else None)
    leading_q, leading_k = (3, 31), (3, 37)
    if packed:
        leading_q, leading_k = (60,), (70,)
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 31, 31, 57], [0, 37, 41, 66]))
        t = AttentionTensors(cu_q, cu_k, 31, 37, learnable_sink=t.learnable_sink)
    q, k, v = torch.randn(*leading_q, 6, 64), torch.randn(*leading_k, 2, 64), torch.randn(*leading_k, 2, 64)
    assert dense_in_place.takes(q, k, v, spec, t)
    torch.testing.assert_close(flash_fwd.flash_fwd(q, k, v, spec, t), reference_fwd(q, k, v, spec, t))


def test_small_and_plain_calls_stay_away():
    q = torch.zeros(1, 1024, 16, 64)
    t = AttentionTensors(max_seqlen_q=1024, max_seqlen_k=1024)
    assert dense_in_place.takes(q, q, q, AttentionSpec(0.2, window_right=0), t)
    assert not dense_in_place.takes(q, q, q, AttentionSpec(0.2), t)
    small = AttentionTensors(max_seqlen_q=512, max_seqlen_k=512)
    assert not dense_in_place.takes(*[q[:, :512]] * 3, AttentionSpec(0.2, window_right=0), small)
