"""Choice of experts, and their weighted sum, in plain torch; differentiable."""

import torch
from torch.nn import functional as F

from octavo.kernels.reference.gated_activation import gated_activation
from octavo.kernels.spec import Routing, Tensor


def refuses_route(logits: Tensor, bias: Tensor | None, routing: Routing) -> str | None:
    """The reference takes every call."""
    return None


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits (T, E), at least fp32 → weights (T, k) of their dtype and experts (T, k) int64."""
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = _within_best_groups(scores if bias is None else scores + bias, bias is not None, routing)
    experts = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if routing.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)  # all sigmoids may underflow
    return weights * routing.scaling_factor, experts


def _within_best_groups(choice: Tensor, biased: bool, routing: Routing) -> Tensor:
    """The scores to choose by, -inf outside of the best groups."""
    if routing.num_groups == 1:
        return choice
    groups = choice.view(-1, routing.num_groups, choice.shape[-1] // routing.num_groups)
    best = groups.topk(2 if biased else 1, dim=-1).values.sum(-1).topk(routing.topk_groups, dim=-1).indices
    closed = torch.ones(groups.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, best, False)
    return groups.masked_fill(closed.unsqueeze(-1), float("-inf")).view(choice.shape)


def refuses_mix_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str, shared: Tensor | None,
    shared_gate_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> str | None:  # fmt: skip
    """The reference takes every call."""
    return None


def mix_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, activation: str, shared: Tensor | None,
    shared_gate_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ over the k experts of each token, weights · down_e(act(gate_e(x)) · up_e(x)) (+ shared, + the shared MLP of x),
    summed in at least fp32. Tokens are sorted by expert, so that every expert with tokens is one matrix product."""
    top_k = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).tolist()  # on a GPU, a wait
    hidden = gated_activation(_grouped_linear(x[order // top_k], gate_up, counts), activation)
    out = _grouped_linear(hidden, down, counts)
    # back in the tokens' order by indexing, not index_add_: its order of additions varies on a GPU
    picked = out[order.argsort()].view(-1, top_k, x.shape[1])
    mixed = (picked * weights.unsqueeze(-1)).sum(1)  # fp32, or more, since the weights are
    if shared is not None:
        mixed = mixed + shared
    if shared_gate_up is not None and shared_down is not None:
        mixed = mixed + F.linear(gated_activation(F.linear(x, shared_gate_up), activation), shared_down)
    return mixed.to(x.dtype)


def _grouped_linear(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """x (N, in), sorted by expert, `counts` rows for each, times weight (E, out, in)."""
    parts = [F.linear(rows, weight[e]) for e, rows in enumerate(torch.split_with_sizes(x, counts)) if counts[e]]
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])
