"""A linear layer with its surroundings equals the same steps one by one, in its result and in its gradients."""

import pytest
import torch

from octavo import ops
from octavo.nn import Linear, RMSNorm


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_parts_are_applied_in_order(shape, bias, activation):
    torch.manual_seed(0)
    linear, norm = Linear(32, 48, bias), RMSNorm(32)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    residual = torch.randn(*shape[:-1], 24 if activation else 48, requires_grad=True)
    out = linear(x, norm=norm, activation=activation, residual=residual)
    y = torch.nn.functional.linear(norm(x), linear.weight, linear.bias)
    expected = residual + (y if activation is None else ops.gated_activation(y, activation))
    assert torch.equal(out, expected)
    leaves = [x, residual, *linear.parameters(), *norm.parameters()]
    for got, want in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(got, want)


def test_the_residual_is_left_alone_where_nothing_is_fused():
    residual = torch.randn(3, 8)
    before = residual.clone()
    with torch.inference_mode():
        Linear(4, 8)(torch.randn(3, 4), residual=residual)
    assert torch.equal(residual, before)


def test_the_result_may_have_another_dtype():
    linear = Linear(16, 8).bfloat16()
    x = torch.randn(2, 16).bfloat16()
    assert linear(x, out_dtype=torch.float32).dtype == torch.float32
    assert torch.equal(linear(x, out_dtype=torch.float32), linear(x).float())
