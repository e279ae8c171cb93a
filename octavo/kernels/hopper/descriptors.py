"""Tensor descriptors for TMA, made on the host without Triton's own checks."""

from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.spec import Tensor


class MovedBack(NamedTuple):
    """Address and dtype of a tensor some bytes earlier, in the shape that Triton's descriptors ask for."""

    tensor: Tensor
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() - self.offset


def make_descriptor(
    base: Tensor | MovedBack, shape: list[int], strides: list[int], box: list[int], layout: gl.NVMMASharedLayout
) -> TensorDescriptor:
    """Boxes of shape `box` over `base`, of which what lies outside reads as zeros; shape and strides in elements."""
    descriptor: Any = TensorDescriptor.__new__(TensorDescriptor)  # its own checks cost 25 µs, up to seven times a call
    descriptor.base, descriptor.shape, descriptor.strides = base, shape, strides
    descriptor.block_shape, descriptor.layout, descriptor.padding = box, layout, "zero"
    return descriptor
