"""Residual wirings against their equations, alone and composed, and the block that takes them by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from octavo.nn import (
    BranchNorm,
    GatedMLP,
    MultiHeadAttention,
    PostNorm,
    PreNorm,
    Residual,
    RMSNorm,
    ScaledResidual,
    TransformerBlock,
    make_caches,
    wire,
)

DIM = 8


@pytest.fixture
def f() -> nn.Module:
    return nn.Linear(DIM, DIM)


@pytest.fixture
def norm() -> RMSNorm:
    norm = RMSNorm(DIM)
    nn.init.normal_(norm.weight)
    return norm


def test_each_wiring_is_its_equation(f: nn.Module, norm: RMSNorm) -> None:
    x = torch.randn(3, DIM)
    alpha = torch.randn(DIM)
    scaled = ScaledResidual(f, DIM)
    scaled.load_state_dict({"alpha": alpha}, strict=False)
    assert torch.equal(Residual(f)(x), x + f(x))
    assert torch.equal(PostNorm(f, norm)(x), norm(x + f(x)))
    assert torch.equal(PreNorm(f, norm)(x), x + f(norm(x)))
    assert torch.equal(BranchNorm(f, norm)(x), x + norm(f(x)))
    assert torch.equal(scaled(x), x + alpha * f(x))


def test_compositions_add_the_skip_once(f: nn.Module, norm: RMSNorm) -> None:
    x = torch.randn(3, DIM)
    assert torch.equal(PreNorm(BranchNorm(f, norm), norm)(x), x + norm(f(norm(x))))
    assert torch.equal(PostNorm(PreNorm(f, norm), norm)(x), norm(x + f(norm(x))))
    scaled = ScaledResidual(PreNorm(f, norm), init=0.3)
    assert torch.equal(scaled(x), x + scaled.alpha * f(norm(x)))
    assert torch.equal(PostNorm(ScaledResidual(f, init=0.3), norm)(x), norm(x + scaled.alpha * f(x)))


def test_rezero_starts_as_the_identity_and_learns(f: nn.Module) -> None:
    block = wire("rezero", f, DIM, RMSNorm)
    x = torch.randn(3, DIM)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.alpha.shape == (1,)
    assert block.alpha.grad is not None
    assert block.alpha.grad.abs() > 0


@pytest.mark.parametrize(
    ("name", "equation"),
    [
        ("pre", lambda x, f, n: x + f(n(x))),
        ("post", lambda x, f, n: n(x + f(x))),
        ("branch", lambda x, f, n: x + n(f(x))),
        ("none", lambda x, f, n: x + f(x)),
        ("pre+branch", lambda x, f, n: x + n(f(n(x)))),
        ("layerscale+pre", lambda x, f, n: x + 0.1 * f(n(x))),
    ],
)
def test_wirings_by_name(name: str, equation: Callable[..., Tensor], f: nn.Module) -> None:
    x = torch.randn(3, DIM)
    torch.testing.assert_close(wire(name, f, DIM, RMSNorm)(x), equation(x, f, RMSNorm(DIM)))


def test_unknown_wiring_lists_the_known(f: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"wiring must be one of post, pre, .* got 'pre\+nrom'"):
        wire("pre+nrom", f, DIM, RMSNorm)


@pytest.mark.parametrize("name", ["pre", "post", "branch", "rezero", "layerscale", "pre+branch"])
def test_gradcheck(name: str) -> None:
    block = wire(name, nn.Linear(4, 4), 4, RMSNorm).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*block.named_parameters(), strict=True)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize("wiring", ["pre", "post", "branch", "layerscale", "pre+branch"])
def test_block_gives_the_same_with_and_without_a_cache(wiring: str) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, MultiHeadAttention(16, 4, 2, causal=True), GatedMLP(16, 24), wiring=wiring)
    x = torch.randn(2, 6, 16)
    rows, caches = make_caches(block, 2, 6, block_size=4)
    with torch.no_grad():
        whole = block(x)
        step = rows.append(6)
        cached = block(x.flatten(0, 1), step.positions, caches[0], step.metadata)
    torch.testing.assert_close(cached, whole.flatten(0, 1), rtol=1e-5, atol=1e-5)
