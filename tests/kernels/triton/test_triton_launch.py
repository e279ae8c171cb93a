"""The launcher's key: two calls share a compiled kernel only if Triton would compile the same for both."""

import torch

from octavo.kernels.triton.launch import argument_key


def test_a_pointer_counts_by_dtype_and_alignment():
    x = torch.zeros(64)
    assert argument_key([x]) == argument_key([x[4:]]) != argument_key([x[1:]])
    assert argument_key([x]) != argument_key([x.half()])
    assert argument_key([x]) != argument_key([None])


def test_an_integer_counts_by_its_class_alone():
    classes = {argument_key([n]) for n in (1, 2, 16, 2**31, 2**31 + 1)}
    assert len(classes) == 5, "one, odd, a multiple of 16, and both of 64 bits"
    assert argument_key([3]) == argument_key([5]) == argument_key([2**31 - 1])
    assert argument_key([16]) == argument_key([4096])


def test_a_float_counts_as_a_float():
    assert argument_key([0.5]) == argument_key([1.0]) != argument_key([None])
    assert argument_key([1.0]) != argument_key([1])
