"""Mixture of experts: which experts serve each token, and their weighted sum, without a host read on a GPU.

Sources: Shazeer et al. 2017 (softmax, top k), DeepSeek-AI, "DeepSeek-V2" 2024 (groups) and "DeepSeek-V3" 2024 (sigmoid
with a correction bias).
"""

from typing import cast

import torch

from octavo.kernels.reference import moe as reference
from octavo.kernels.spec import Routing as Routing
from octavo.kernels.spec import Tensor
from octavo.ops import inference
from octavo.ops.checks import check_shape
from octavo.ops.gated_activation import check_activation
from octavo.ops.linear_small_batch import MOST_ROWS, linear_small_batch

MOST_PAIRS = 32  # as the GPU's kernels have it


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, D) times weight (E, D), summed and returned in at least fp32: rounded logits would change the choice."""
    if inference.fuses(x, weight) and x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == x.dtype:
        if x.shape[0] <= MOST_ROWS:
            return linear_small_batch(x, weight, out_dtype=torch.float32)
        if x.is_cuda:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide))


def route(logits: Tensor, routing: Routing, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits (T, E) fp32 to weights (T, k) fp32 and experts (T, k) int64.

    bias (E,) fp32: added to the scores for the choice only. Among equal scores the lower expert wins on a GPU;
    elsewhere `torch.topk` decides. Differentiable in the logits.
    """
    check_shape("logits", logits, ("T", "E"))
    if bias is not None:
        check_shape("bias", bias, (logits.shape[1],))
    result = inference.run("route", reference.route, (logits, bias, routing), bias)
    return cast(tuple[Tensor, Tensor], result)


def mix_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    shared: Tensor | None = None,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """Σ_j weights[t, j] · down_e(act(gate_e(x_t)) · up_e(x_t)) with e = experts[t, j] (+ shared[t]); returns (T, D).

    x, shared (T, D); weights (T, k) fp32, experts (T, k) int64; gate_up (E, 2·H, D), gate's rows first; down (E, D, H).
    shared_gate_up (2·S, D), shared_down (D, S): an MLP that every token goes through, added; worth fusing where
    `few_pairs` says so. Summed in at least fp32, rounded once. Differentiable.
    """
    check_activation(activation)
    num_experts, rows, dim = gate_up.shape
    check_shape("x", x, ("T", dim))
    check_shape("down", down, (num_experts, dim, rows // 2))
    check_shape("experts", experts, (x.shape[0], "k"))
    check_shape("weights", weights, tuple(experts.shape))
    if shared is not None:
        check_shape("shared", shared, tuple(x.shape))
    if (shared_gate_up is None) != (shared_down is None):
        raise ValueError("shared_gate_up, shared_down: expected both or neither")
    if shared_gate_up is not None and shared_down is not None:
        check_shape("shared_gate_up", shared_gate_up, ("2·S", dim))
        check_shape("shared_down", shared_down, (dim, shared_gate_up.shape[0] // 2))
    arguments = (x, weights, experts, gate_up, down, activation, shared, shared_gate_up, shared_down)
    leaves = (weights, gate_up, down, shared, shared_gate_up, shared_down)
    return cast(Tensor, inference.run("mix_experts", reference.mix_experts, arguments, *leaves))


def few_pairs(x: Tensor, num_pairs: int) -> bool:
    """Whether `mix_experts` computes these (token, expert) pairs each on its own, where the shared MLP joins them."""
    return num_pairs <= MOST_PAIRS and inference.fuses(x)
