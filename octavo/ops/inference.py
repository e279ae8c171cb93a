"""When a layer's small ops run as fused kernels: on a GPU, without gradient, outside of a traced graph.

Everywhere else they are plain torch, which differentiates and compiles. `use_backend("reference")` asks for plain torch
too; a forced backend that has no such kernel (they are Triton's) leaves the choice open, since it was meant for
attention.
"""

from collections.abc import Callable
from typing import Any

import torch

from octavo.kernels.spec import Tensor
from octavo.ops import dispatch


def fuses(x: Tensor, *others: Tensor | None) -> bool:
    """Whether fused kernels serve x here, given all tensors that may want a gradient."""
    backend = dispatch.forced_backend()
    if backend == "reference" or not (x.is_cuda or backend == "triton"):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return False
    return not torch.compiler.is_compiling() and type(x) in (torch.Tensor, torch.nn.Parameter)


def run(op: str, reference: Callable[..., Any], arguments: tuple[Any, ...], *others: Tensor | None) -> Any:
    """The fused kernel of `op` where `fuses(arguments[0], *others)`, else its reference."""
    if not fuses(arguments[0], *others):
        return reference(*arguments)
    if dispatch.forced_backend() in (None, "triton"):
        return dispatch.run(op, arguments[0].device, arguments)
    with dispatch.use_backend(None):
        return dispatch.run(op, arguments[0].device, arguments)
