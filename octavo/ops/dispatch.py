"""Which kernel serves a call: the first of the device's backends that does not refuse it, and why the others were
passed over.

A backend is a package under `octavo.kernels`; each of its kernels stands beside a `refuses_<op>` that gives the
reason why it cannot take a call. Backends are imported on first use, the GPU's only for GPU tensors. Nothing is
hidden: a forced backend that cannot serve raises, and `octavo.explain` lists every refusal.
"""

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("hopper", "triton", "cpu", "reference")
_PREFERENCE = {"cuda": ("hopper", "triton", "reference"), "cpu": ("cpu", "reference")}

# the modules of a backend that may hold an op, best first
_MODULES = {
    "flash_fwd": ("flash_fwd",),
    "flash_bwd": ("flash_bwd",),
    "paged_attention": ("paged_prefill", "paged_decode", "paged_attention", "paged_gather"),
    "mla_decode": ("mla_decode",),
    "store_kv_cache": ("cache",),
    "store_latent_cache": ("cache",),
    "merge_attention_states": ("merge",),
    "rms_norm": ("norm",),
    "add_rms_norm": ("norm",),
    "gated_activation": ("gated_activation",),
    "rotate_and_store": ("rotary_cache",),
    "absorb_and_store": ("mla_projection",),
    "project_values": ("mla_projection",),
    "linear_small_batch": ("linear_small_batch",),
    "route": ("moe",),
    "mix_experts": ("moe",),
    "sample_on_device": ("sampling",),
}


class _Override(threading.local):
    """What `use_backend` and `intercept` set on this thread; not ContextVars, which torch.compile cannot read."""

    backend: str | None = None
    interceptor: "Callable[[str, Choice, tuple[Any, ...]], None] | None" = None


_override = _Override()

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves a call, where it lives, and why each better one does not."""

    kernel: Kernel
    backend: str
    module: str
    passed_over: dict[str, str]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every octavo call of this thread inside to one backend: "hopper", "triton", "cpu" or "reference".

    None lets octavo choose again. A call that the backend cannot take raises `ValueError`. "triton" takes CPU tensors
    when TRITON_INTERPRET=1 is set.
    """
    check_backend(name)
    previous, _override.backend = _override.backend, name
    try:
        yield
    finally:
        _override.backend = previous


def check_backend(name: str | None) -> None:
    """Raise `ValueError` unless `name` is a backend or None."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")


def forced_backend(backend: str | None = None) -> str | None:
    """The backend that a call must use: its own argument, else the one of `use_backend`."""
    check_backend(backend)
    return _override.backend if backend is None else backend


def choose(op: str, device: torch.device, arguments: tuple[Any, ...], backend: str | None = None) -> Choice:
    """The first kernel of `op` that takes `arguments`; only that of `backend` (or of `use_backend`) when one is
    named.
    """
    backend = forced_backend(backend)
    passed_over: dict[str, str] = {}
    for candidate, name, loaded in _candidates(op, device, backend, _interpreted(device)):
        if isinstance(loaded, str):
            passed_over[name] = loaded
            continue
        kernel, refuses = loaded
        reason = refuses(*arguments)
        if reason is None:
            return Choice(kernel, candidate, name, passed_over)
        passed_over[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise ValueError(
        f"backend {backend!r} cannot serve this {op} call ({reasons}); leave backend unset to let octavo choose"
    )


def run(op: str, device: torch.device, arguments: tuple[Any, ...], backend: str | None = None) -> Any:
    """Choose a kernel for the call and call it."""
    choice = choose(op, device, arguments, backend)
    if _override.interceptor is not None:
        return _override.interceptor(op, choice, arguments)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return choice.kernel(*arguments)
    with torch.cuda.device(device):  # Triton launches on the current device, whichever holds the tensors
        return choice.kernel(*arguments)


@contextmanager
def intercept(interceptor: Callable[[str, Choice, tuple[Any, ...]], None]) -> Iterator[None]:
    """Hand each chosen kernel and its arguments to `interceptor` instead of running it, on this thread."""
    previous, _override.interceptor = _override.interceptor, interceptor
    try:
        yield
    finally:
        _override.interceptor = previous


def beside(choice: Choice, prefix: str) -> Kernel | None:
    """The function `<prefix>_<kernel>` of the chosen kernel's module, if it has one."""
    module = importlib.import_module(f"octavo.kernels.{choice.module}")
    return getattr(module, f"{prefix}_{choice.kernel.__name__}", None)


@functools.cache
def _candidates(
    op: str, device: torch.device, backend: str | None, interpreted: bool
) -> tuple[tuple[str, str, tuple[Kernel, Kernel] | str], ...]:
    """(backend, name, kernel and `refuses_<op>` or why there is none) of all that may serve, best first."""
    found: list[tuple[str, str, tuple[Kernel, Kernel] | str]] = []
    for candidate in (backend,) if backend else _PREFERENCE.get(device.type, ("reference",)):
        reason = _wrong_device(candidate, device, interpreted)
        if reason is not None:
            found.append((candidate, candidate, reason))
        else:
            found += [(candidate, f"{candidate}.{module}", _load(candidate, module, op)) for module in _MODULES[op]]
    return tuple(found)


def _interpreted(device: torch.device) -> bool:
    """Whether Triton's kernels take tensors of this device although it is no GPU."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _wrong_device(backend: str, device: torch.device, interpreted: bool) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device.type == "cpu" else f"it serves CPU tensors, these are on {device}"
    if backend == "triton" and device.type == "cpu":
        return None if interpreted else "it serves GPU tensors (CPU tensors with TRITON_INTERPRET=1 in the environment)"
    if device.type != "cuda":
        return f"it serves CUDA tensors, these are on {device}"
    if backend == "hopper" and _capability(device) != (9, 0):
        return f"it needs compute capability 9.0, {device} has {'.'.join(map(str, _capability(device)))}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def only_kernel(backend: str, op: str) -> tuple[Kernel, Kernel] | str:
    """The one kernel that a backend has of `op` and its `refuses_<op>`, or why it has none."""
    (module,) = _MODULES[op]
    return _load(backend, module, op)


@functools.cache
def _load(backend: str, module: str, op: str) -> tuple[Kernel, Kernel] | str:
    """The kernel and its `refuses_<op>`, or why there is none."""
    name = f"octavo.kernels.{backend}.{module}"
    try:
        loaded = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return f"it has no {op} kernel"
        if error.name is not None and error.name.partition(".")[0] == "triton":
            return "the triton package is not installed"
        raise
    kernel, refuses = getattr(loaded, op, None), getattr(loaded, f"refuses_{op}", None)
    if kernel is None or refuses is None:
        return f"it has no {op} kernel"
    return kernel, refuses
