"""act(gate) · up of the merged projection in one pass: 3 bytes move where two ops move 5."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.launch import ceil_div, launch_by_arguments, next_power_of_2


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of Hugging Face's name KIND, in fp32."""
    if KIND == "silu":
        x = x * tl.sigmoid(tl.maximum(x, -80.0))  # exp(80) still fits
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    else:
        tl.static_assert((KIND == "gelu_pytorch_tanh") | (KIND == "gelu_new"))
        y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(tl.maximum(y, -80.0))  # (1 + tanh(y / 2)) / 2 = sigmoid(y)
    return x


@triton.jit
def gated_activation_kernel(gate_up, out, stride, width, KIND: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row: gate_up (T, 2·width) with contiguous columns, out (T, width) contiguous."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = d < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_up + row * stride + d, mask=used, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + d, mask=used, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=used)


def refuses_gated_activation(gate_up: Tensor, activation: str) -> str | None:
    """Why this backend cannot take the call, or None."""
    return "it computes in fp32" if gate_up.dtype == torch.float64 else None


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, of gate_up (…, 2·H) = [gate, up]; returns (…, H) contiguous."""
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, 2 * width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if out.numel():
        block = min(next_power_of_2(width), 1024)
        early = early_launch_options(out.device)["PDL"]
        launch_by_arguments(
            gated_activation_kernel, (rows.shape[0], ceil_div(width, block), 1), (rows, out, rows.stride(0), width),
            (("KIND", activation), ("PDL", early), ("BLOCK", block)), num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out
