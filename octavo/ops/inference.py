"""When a layer's small ops run as fused kernels: on a GPU, without gradient, outside of a traced graph.

Everywhere else they are plain torch, which differentiates and compiles. `use_backend("reference")` asks for plain torch
too; a forced backend that has no such kernel (they are Triton's) leaves the choice open, since it was meant for
attention.
"""

import functools
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
    """The fused kernel of `op` where `fuses(arguments[0], *others)` and it takes the call, else the reference."""
    x = arguments[0]
    if not fuses(x, *others):
        return reference(*arguments)
    if dispatch.forced_backend() == "triton":
        return dispatch.run(op, x.device, arguments)
    # as dispatch would choose, in a fifth of its time: a prefill step makes hundreds of these calls from the host
    kernel, refuses = _fused_kernel(op)
    if kernel is None or refuses is None or refuses(*arguments) is not None:
        return reference(*arguments)
    if x.device.index == torch.cuda.current_device():
        return kernel(*arguments)
    with torch.cuda.device(x.device):
        return kernel(*arguments)


@functools.cache
def _fused_kernel(op: str) -> tuple[dispatch.Kernel | None, dispatch.Kernel | None]:
    """Triton's kernel of `op` and its `refuses_<op>`, or None where Triton is not installed."""
    loaded = dispatch.only_kernel("triton", op)
    return (None, None) if isinstance(loaded, str) else loaded
