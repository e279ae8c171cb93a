"""Copies between host and device that nobody waits for.

A copy from ordinary memory makes the host wait until the device has come to it; from pinned memory it is queued like a
kernel. On a CPU both functions are free.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the device, queued behind what is queued there. The caller may reuse the array."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Readback:
    """A tensor on its way to the host; `to`: pinned memory of its shape and dtype, new by default."""

    def __init__(self, tensor: Tensor, to: Tensor | None = None) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if to is None else to
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[Any]:
        """Its values, as nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._host.tolist()
        return values


class TokenReadbacks:
    """Readbacks of each step's tokens into memory that is pinned once.

    Three buffers: two steps may be in flight, and a third is launched before the oldest is waited for.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        """most: tokens of a step that have room; more take memory of their own."""
        self._buffers = (
            [torch.empty(most, dtype=torch.int64, pin_memory=True) for _ in range(3)] if device.type == "cuda" else []
        )

    def start(self, tokens: Tensor) -> Readback:
        """tokens: (N,) int64."""
        if not self._buffers or len(tokens) > len(self._buffers[0]):
            return Readback(tokens)
        self._buffers.append(self._buffers.pop(0))
        return Readback(tokens, self._buffers[-1][: len(tokens)])
