"""Tensor descriptors for TMA, made on the host without Triton's own checks."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.spec import Tensor

WRAP = gl.constexpr(1 << 30)  # where the row axis of a ragged descriptor ends
_UNBOUNDED = 0x7FFF0000


def make_descriptor(
    base: Tensor, shape: list[int], strides: list[int], box: list[int], layout: gl.NVMMASharedLayout
) -> TensorDescriptor:
    """Boxes of shape `box` over `base`, of which what lies outside reads as zeros; shape and strides in elements."""
    descriptor: Any = TensorDescriptor.__new__(TensorDescriptor)  # its own checks cost 25 µs, up to seven times a call
    descriptor.base, descriptor.shape, descriptor.strides = base, shape, strides
    descriptor.block_shape, descriptor.layout, descriptor.padding = box, layout, "zero"
    return descriptor


def ragged_descriptor(
    base: Tensor, shape: list[int], strides: list[int], box: list[int], layout: gl.NVMMASharedLayout
) -> TensorDescriptor:
    """`make_descriptor` with two axes more before the rows (axis 0), so that a box may be cut off at any row.

    Coordinates (WRAP, end, WRAP - n, …) give a box whose first n rows are those before row `end`, and its others lie
    outside. WRAP times the first stride is a multiple of 2^64 bytes less WRAP rows: hardware adds addresses mod 2^64.
    """
    axes = [_UNBOUNDED, _UNBOUNDED, WRAP.value, *shape[1:]]
    return make_descriptor(base, axes, [(1 << 34) - strides[0], strides[0], *strides], [1, 1, *box], layout)
