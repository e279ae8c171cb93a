"""How a branch f joins the residual stream: four wirings that compose.

    PostNorm        norm(x + f(x))      Vaswani et al. 2017; normalises the stream itself, gradients shrink with depth
    PreNorm         x + f(norm(x))      GPT-2 on; an identity path from end to end
    BranchNorm      x + norm(f(x))      Swin-V2, OLMo-2; bounds what a branch may add
    ScaledResidual  x + α · f(x)        ReZero (one α, from 0) and LayerScale (α per channel, from a small value)

Each wraps f or another wiring. A wiring changes the branch or the sum, and the skip is added once, so that
`PreNorm(BranchNorm(f, norm), norm)` is x + norm(f(norm(x))), Gemma's sandwich.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + inner(x); `inner` is any module, or another wiring whose branch this one extends.

    Arguments after x go to the innermost module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def branch(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What is added to the stream."""
        out: Tensor = (self.inner.branch if isinstance(self.inner, Residual) else self.inner)(x, *args, **kwargs)
        return out

    def combine(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream after this block."""
        return self.inner.combine(x, branch) if isinstance(self.inner, Residual) else x + branch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.combine(x, self.branch(x, *args, **kwargs))


class PostNorm(Residual):
    """norm(x + f(x))."""

    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__(inner)
        self.norm = norm

    def combine(self, x: Tensor, branch: Tensor) -> Tensor:
        out: Tensor = self.norm(super().combine(x, branch))
        return out


class PreNorm(Residual):
    """x + f(norm(x))."""

    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__(inner)
        self.norm = norm

    def branch(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().branch(self.norm(x), *args, **kwargs)


class BranchNorm(Residual):
    """x + norm(f(x))."""

    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__(inner)
        self.norm = norm

    def branch(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.norm(super().branch(x, *args, **kwargs))
        return out


class ScaledResidual(Residual):
    """x + α · f(x), α learnable: one number (ReZero), or `dim` of them, one per channel (LayerScale), from `init`.

    `alpha` has shape (1,) or (dim,): FSDP cannot shard a scalar.
    """

    def __init__(
        self,
        inner: nn.Module,
        dim: int | None = None,
        init: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inner)
        self.init = init
        self.alpha = nn.Parameter(torch.empty(dim or 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.init)

    def branch(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.alpha * super().branch(x, *args, **kwargs)


# CaiT's LayerScale starts at 0.1 up to 18 layers (Touvron et al. 2021)
LAYERSCALE_INIT = 0.1

_WIRINGS: dict[str, Callable[[nn.Module, int, Callable[[int], nn.Module]], Residual]] = {
    "post": lambda f, dim, norm: PostNorm(f, norm(dim)),
    "pre": lambda f, dim, norm: PreNorm(f, norm(dim)),
    "branch": lambda f, dim, norm: BranchNorm(f, norm(dim)),
    "rezero": lambda f, dim, norm: ScaledResidual(f),
    "layerscale": lambda f, dim, norm: ScaledResidual(f, dim, LAYERSCALE_INIT),
    "none": lambda f, dim, norm: Residual(f),
}


def wire(wiring: str, f: nn.Module, dim: int, norm: Callable[[int], nn.Module]) -> Residual:
    """f wired by name: post, pre, branch, rezero, layerscale, none, or several joined by "+", outermost first.

    "pre+branch" is Gemma's sandwich, "layerscale+pre" CaiT's x + α · f(norm(x)). norm: builds one from its width.
    """
    module = f
    for name in reversed(wiring.split("+")):
        if name not in _WIRINGS:
            raise ValueError(f'wiring must be one of {", ".join(_WIRINGS)}, or several joined by "+", got {wiring!r}')
        module = _WIRINGS[name](module, dim, norm)
    assert isinstance(module, Residual)
    return module
