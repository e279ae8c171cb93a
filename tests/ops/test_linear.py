"""Quantised weights: each type reads as `gguf` itself reads it, and linear layers over them are near exact."""

import gguf
import numpy as np
import pytest
import torch

from octavo.ops.linear import QuantizedWeight, linear

IN = 512


def random_tensor(qtype: str, rows: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Raw bytes of random weights and the values that the gguf package reads from them."""
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[qtype]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, IN // block, size), dtype=np.uint8)
    halves = raw[..., : 2 if qtype.endswith("_0") else 4].view(np.float16)
    halves[:] = rng.standard_normal(halves.shape) * 0.01
    flat = raw.reshape(rows, -1)
    return flat, torch.from_numpy(gguf.quants.dequantize(flat, kind).reshape(rows, IN))


@pytest.fixture(params=sorted(QuantizedWeight.QTYPES))
def qtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_dequantize_is_what_gguf_reads(qtype: str, rows: int) -> None:
    raw, dense = random_tensor(qtype, rows)
    weight = QuantizedWeight.from_gguf(raw, qtype, (rows, IN))
    torch.testing.assert_close(weight.dequantize(), dense, rtol=1e-6, atol=1e-7)


def test_rows_are_an_embedding_lookup(qtype: str) -> None:
    raw, _ = random_tensor(qtype, 50)
    weight = QuantizedWeight.from_gguf(raw, qtype, (50, IN))
    ids = torch.tensor([[0, 49, 17], [17, 16, 3]])
    assert torch.equal(weight.rows(ids), weight.dequantize()[ids])


def test_cat_stacks_outputs_even_when_they_do_not_fill_blocks(qtype: str) -> None:
    parts = [QuantizedWeight.from_gguf(random_tensor(qtype, n, n)[0], qtype, (n, IN)) for n in (32, 5, 16)]
    merged = QuantizedWeight.cat(parts)
    assert merged.shape == (53, IN)
    assert torch.equal(merged.dequantize(), torch.cat([p.dequantize() for p in parts]))


def test_a_weight_takes_the_bytes_of_the_file() -> None:
    for qtype, size in {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}.items():
        assert QuantizedWeight.from_gguf(random_tensor(qtype, 32)[0], qtype, (32, IN)).nbytes == 32 * IN // 32 * size


def test_what_does_not_fit_is_refused() -> None:
    raw, _ = random_tensor("Q4_1", 16)
    with pytest.raises(ValueError, match="qtype: expected one of"):
        QuantizedWeight.from_gguf(raw, "Q6_K", (16, IN))
    with pytest.raises(ValueError, match="raw: expected 5440 uint8"):
        QuantizedWeight.from_gguf(raw, "Q4_1", (17, IN))
    with pytest.raises(ValueError, match="multiple of 32"):
        QuantizedWeight.from_gguf(raw, "Q4_1", (16, 33))
    with pytest.raises(ValueError, match="one qtype"):
        QuantizedWeight.cat([QuantizedWeight.from_gguf(random_tensor(q, 16)[0], q, (16, IN)) for q in ("Q4_0", "Q4_1")])
    with pytest.raises(ValueError, match="x: expected a last axis of 512"):
        linear(torch.zeros(1, 8), QuantizedWeight.from_gguf(raw, "Q4_1", (16, IN)))
