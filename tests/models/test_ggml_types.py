"""Every ggml type dequantises to the same bits as the `gguf` package."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.models.ggml_dequantize import dequantize
from octavo.models.ggml_types import GGML_TYPES, GgmlType


@pytest.mark.parametrize("ggml_type", GGML_TYPES.values(), ids=lambda ggml_type: ggml_type.name)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_equals_the_gguf_package_on_any_bytes(ggml_type: GgmlType, seed: int, rows: int, blocks: int):
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * ggml_type.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are infinite or NaN at times; so are they here
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[ggml_type.name])
    got = dequantize(torch.from_numpy(raw), ggml_type)
    assert got.shape == (rows, blocks * ggml_type.block_elements)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("ggml_type", GGML_TYPES.values(), ids=lambda ggml_type: ggml_type.name)
def test_block_sizes_are_those_of_ggml(ggml_type: GgmlType):
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type.name]]
    assert (ggml_type.block_elements, ggml_type.block_bytes) == (elements, size)


def test_large_tensors_are_unpacked_in_chunks():
    """More elements than one chunk, with a remainder."""
    q8_0 = GGML_TYPES[8]
    raw = np.zeros(((1 << 22) // 4096 + 1, 128 * q8_0.block_bytes), np.uint8)
    raw[:, 0::34], raw[:, 1::34] = 0x00, 0x3C  # fp16 one
    raw[:, 2::34] = np.arange(len(raw)).reshape(-1, 1) % 100
    values = dequantize(torch.from_numpy(raw), q8_0, torch.bfloat16)
    assert values.dtype == torch.bfloat16
    np.testing.assert_array_equal(values[:, 0].float().numpy(), np.arange(len(raw)) % 100)
