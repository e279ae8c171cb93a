"""RMSNorm in both forms, against its equation and `transformers`."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from octavo.nn import LayerNorm, RMSNorm


def equation(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def test_fp32_equals_the_equation_and_both_families() -> None:
    x, weight = torch.randn(3, 5, 64), torch.randn(64)
    for ours, theirs, scale in (
        (RMSNorm(64, 1e-5), LlamaRMSNorm(64, 1e-5), weight),
        (RMSNorm(64, 1e-5, unit_offset=True), Gemma3RMSNorm(64, 1e-5), 1 + weight),
    ):
        ours.load_state_dict({"weight": weight})
        theirs.load_state_dict({"weight": weight})
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours(x).double(), equation(x, scale, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_low_precision_is_as_good_as_one_rounding(dtype: torch.dtype, unit_offset: bool) -> None:
    norm = RMSNorm(256, unit_offset=unit_offset, dtype=dtype)
    torch.nn.init.normal_(norm.weight, std=0.1)
    x = torch.randn(64, 256, dtype=dtype)
    exact = equation(x, norm.weight.double() + unit_offset, norm.eps)
    one_rounding = (exact.to(dtype).double() - exact).abs().max()
    assert norm(x).dtype == dtype
    assert (norm(x).double() - exact).abs().max() <= 2 * one_rounding


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradcheck(unit_offset: bool) -> None:
    norm = RMSNorm(8, unit_offset=unit_offset, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_fresh_norms_do_not_scale() -> None:
    x = torch.randn(4, 16)
    for norm in (RMSNorm(16), RMSNorm(16, unit_offset=True)):
        torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(LayerNorm(16)(x).mean(-1), torch.zeros(4), rtol=0, atol=1e-6)
