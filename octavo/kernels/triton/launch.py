"""Launching a kernel without the front end of Triton's JIT.

The front end binds, specialises and hashes every argument at every call, some 100 µs for a kernel with tensor
descriptors. Here the caller says what a compiled kernel depends on, in one hashable key; the first call with a key goes
through the front end, which compiles (or finds the kernel on disk), and later ones hand their arguments to the compiled
kernel's own launcher.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from triton import knobs

Constants = tuple[tuple[str, Any], ...]


class Compiled(NamedTuple):
    """A compiled kernel's launcher, and what it is called with: grid, stream, function, metadata, arguments, values."""

    run: Any
    function: Any
    metadata: Any
    values: tuple[Any, ...]  # of the constants


_compiled: dict[Hashable, Compiled] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    constants: Constants,
    key: Hashable,
    **options: Any,
) -> Compiled:
    """Run `kernel` on a grid of thread blocks; returns what it was compiled to.

    `arguments` stand in the order of the kernel's parameters, then come the `constants`, in that order too. `key` is
    whatever else decides what is compiled: dtypes, block shapes, `pointer_key`s, `integer_key`. Integer arguments
    outside of an `integer_key` fit into 32 bits.
    """
    device = torch.cuda.current_device()
    key = (kernel, device, constants, key)
    entry = _compiled.get(key)
    if entry is None or profiled():
        assert kernel.arg_names[len(arguments) :] == [name for name, _ in constants], "constants in the kernel's order"
        compiled = kernel[grid](*arguments, **dict(constants), **options, enable_fp_fusion=True)
        values = tuple(value for _, value in constants)
        _compiled[key] = entry = Compiled(compiled.run, compiled.function, compiled.packed_metadata, values)
        return entry
    stream = torch._C._cuda_getCurrentRawStream(device)
    entry.run(*grid, stream, entry.function, entry.metadata, None, None, None, *arguments, *entry.values)
    return entry


def launch_by_arguments(
    kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], constants: Constants, **options: Any
) -> None:
    """`launch` with a key of all that Triton may compile arguments and options by, for kernels with few arguments;
    interprets the kernel where its first argument is a CPU tensor."""
    if not arguments[0].is_cuda:
        kernel[grid](*arguments, **dict(constants), **options)
        return
    launch(kernel, grid, arguments, constants, (argument_key(arguments), *options.values()), **options)


def argument_key(arguments: Sequence[Any]) -> tuple[Hashable, ...]:
    """What Triton may compile each argument by: tensors by dtype and alignment, integers by their class, None apart."""
    return tuple(
        [
            (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor)
            else (1 if x == 1 else 2 * (x % 16 == 0) + 4 * (x >= 2**31)) if type(x) is int
            else x is None
            for x in arguments
        ]
    )  # fmt: skip


def next_power_of_2(n: int) -> int:
    """Of n >= 1; Triton's own takes some 3 µs a call from the host, as its `cdiv` does."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def pointer_key(x: torch.Tensor) -> tuple[torch.dtype, bool]:
    """What Triton compiles a pointer argument by."""
    return x.dtype, x.data_ptr() % 16 == 0


def integer_key(values: Sequence[int]) -> tuple[int, ...]:
    """What Triton compiles integer arguments by that it may specialise: 1, multiples of 16, others; 64 bits."""
    return tuple(1 if value == 1 else 2 * (value % 16 == 0) + 4 * (value >= 2**31) for value in values)


def profiled() -> bool:
    """Whether a profiler asks for what only the front end tells it."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
