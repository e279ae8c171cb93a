"""Mixture of experts: a router picks a few expert MLPs for each token, and only those are computed.

    y = Σ over the picked experts e:  w_e · expert_e(x)      (+ shared(x), an MLP that sees every token)

Two ways to pick are in use. Softmax scores, greedy or within the best groups of experts (DeepSeek-V2, Qwen3). Sigmoid
scores, chosen with a correction bias that balances the load but does not enter the weights (DeepSeek-V3).

`octavo.ops` computes every expert that has tokens as one matrix product, on a GPU in fused kernels without a host read;
the loop that it replaces is in tests/nn/test_nn_moe.py.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from octavo.nn.mlp import GatedMLP
from octavo.nn.norm import RMSNorm
from octavo.ops.gated_activation import check_activation
from octavo.ops.moe import Routing, few_pairs, mix_experts, route, router_logits

Scoring = Literal["softmax", "sigmoid"]


class Router(nn.Module):
    """Which `top_k` of `num_experts` experts serve each token, and with what weights.

    scoring: "softmax" over all experts, or "sigmoid" of each. correction_bias: added to the scores for the choice only;
    a parameter in fp32 whatever `dtype`, since rounding it changes which experts win. num_groups, topk_groups: experts
    stand in groups of equal size, and only those of the best topk_groups groups may be picked; a group counts as its
    best expert, with a correction bias as its two best together. norm_topk_prob: the picked weights are divided by
    their sum. routed_scaling_factor: then multiplies them.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Scoring = "softmax",
        correction_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring must be 'softmax' or 'sigmoid', got {scoring!r}")
        check_routing(num_experts, top_k, num_groups, topk_groups, correction_bias)
        self.routing = Routing(top_k, scoring, num_groups, topk_groups, norm_topk_prob, routed_scaling_factor)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if correction_bias else None
        self.e_score_correction_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, dim) to weights (T, top_k) fp32 and experts (T, top_k) int64."""
        logits = router_logits(x, self.weight)
        return route(logits, self.routing, bias=self.e_score_correction_bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} experts, {self.routing}"


def check_routing(num_experts: int, top_k: int, num_groups: int, topk_groups: int, correction_bias: bool) -> None:
    """Raises ValueError when no token could be routed so."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts = {num_experts}, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups must be from 1 to num_groups = {num_groups}, got {topk_groups}")
    group_size = num_experts // num_groups
    if not 1 <= top_k <= topk_groups * group_size:
        raise ValueError(f"top_k must be from 1 to the {topk_groups * group_size} experts within reach, got {top_k}")
    if correction_bias and num_groups > 1 and group_size < 2:
        raise ValueError(f"num_groups: groups count as their two best experts, got {num_groups} of {group_size}")


class ExpertLinear(nn.Module):
    """One matrix per expert, without bias: weight (num_experts, out_features, in_features)."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        bound = in_features**-0.5  # as nn.Linear begins
        nn.init.uniform_(self.weight, -bound, bound)


class Experts(nn.Module):
    """`num_experts` gated MLPs of width `hidden_dim`; gate_up_proj holds gate's rows, then up's, as in `GatedMLP`."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "silu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.num_experts, self.activation = num_experts, activation
        self.gate_up_proj = ExpertLinear(num_experts, dim, 2 * hidden_dim, device=device, dtype=dtype)
        self.down_proj = ExpertLinear(num_experts, hidden_dim, dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        shared: Tensor | None = None,
        shared_gate_up: Tensor | None = None,
        shared_down: Tensor | None = None,
    ) -> Tensor:
        """x, shared (T, dim), weights (T, k) fp32, experts (T, k) int64; returns (T, dim), summed in at least fp32.

        shared is added; shared_gate_up and shared_down are those of an MLP of x that is added, too.
        """
        return mix_experts(
            x,
            weights,
            experts,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            activation=self.activation,
            shared=shared,
            shared_gate_up=shared_gate_up,
            shared_down=shared_down,
        )


class MixtureOfExperts(nn.Module):
    """router → experts, beside an optional shared MLP for every token; x (…, dim)."""

    def __init__(self, router: Router, experts: Experts, shared_experts: GatedMLP | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """norm: of x, first; residual: joins the result, and may be overwritten by it, as in `Linear`."""
        tokens = (x if norm is None else norm(x)).flatten(0, -2)
        shared = None if residual is None else residual.flatten(0, -2)
        mlp = self.shared_experts
        if mlp is not None and self._joins_pairs(mlp, tokens):
            weights = mlp.gate_up_proj.weight, mlp.down_proj.weight
            joined: Tensor = self.experts(tokens, *self.router(tokens), shared, *weights)
            return joined.view(x.shape)
        if mlp is not None:
            shared = mlp(tokens, residual=shared)
        mixed: Tensor = self.experts(tokens, *self.router(tokens), shared)
        return mixed.view(x.shape)

    def _joins_pairs(self, mlp: GatedMLP, tokens: Tensor) -> bool:
        """Whether the shared MLP is computed in the experts' own kernels here."""
        if not few_pairs(tokens, len(tokens) * self.router.routing.top_k):
            return False
        names = [name for name, _ in mlp.named_parameters()]  # quantised weights are none; a bias would be one
        return names == ["gate_up_proj.weight", "down_proj.weight"] and mlp.activation_name == self.experts.activation
