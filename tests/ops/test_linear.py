"""Quantised weights: each type reads as `gguf` itself reads it, and linear layers over them are near exact."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch

from octavo.ops.linear import QuantizedWeight, linear

IN = 512
LARGEST = 127 * 256  # code of the largest input of a group


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


def quantized(x: torch.Tensor) -> torch.Tensor:
    """x rounded as the kernel rounds it: two bytes per group of 32, with the scale in fp32."""
    groups = x.double().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True).float() / LARGEST).double()
    return (torch.round(groups / scale.clamp_min(1e-30)) * scale).flatten(-2)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 13, 64])
@pytest.mark.parametrize("rows", [16, 37, 96])
def test_linear_is_the_exact_product_of_rounded_activations(qtype: str, rows: int, tokens: int) -> None:
    weight = QuantizedWeight.from_gguf(random_tensor(qtype, rows)[0], qtype, (rows, IN))
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(tokens))
    bias = torch.linspace(-1, 1, rows)
    expected = quantized(x) @ weight.dequantize(torch.float64).T + bias
    fp32 = 3e-6 * (quantized(x).abs() @ weight.dequantize(torch.float64).abs().T).max()
    assert (linear(x, weight, bias) - expected).abs().max() < fp32


def test_rounding_the_activations_costs_what_the_docstring_says(qtype: str) -> None:
    weight = QuantizedWeight.from_gguf(random_tensor(qtype, 64)[0], qtype, (64, IN))
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(0))
    half_step = x.unflatten(-1, (-1, 32)).abs().amax(-1) / (2 * LARGEST)
    bound = half_step.repeat_interleave(32, -1) @ weight.dequantize().abs().T
    error = (linear(x, weight) - x @ weight.dequantize().T).abs()
    assert (error <= bound * 1.001 + 1e-5).all()


def test_linear_keeps_dtype_and_leading_axes(qtype: str) -> None:
    weight = QuantizedWeight.from_gguf(random_tensor(qtype, 37)[0], qtype, (37, IN))
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.float().view(6, IN), weight).bfloat16().view(2, 3, 37))
    assert linear(x[:0], weight).shape == (0, 3, 37)


def test_zeros_and_nans_pass_through(qtype: str) -> None:
    weight = QuantizedWeight.from_gguf(random_tensor(qtype, 16)[0], qtype, (16, IN))
    x = torch.zeros(2, IN)
    x[1, 40] = torch.nan
    y = linear(x, weight)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    weight = QuantizedWeight.from_gguf(random_tensor("Q4_1", 96)[0], "Q4_1", (96, IN))
    xs = [torch.randn(5, IN, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    expected = [linear(x, weight) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(lambda x: linear(x, weight), xs), expected, strict=True))
