"""Routers pick as DeepSeek and Qwen do; experts computed in groups equal a loop over tokens."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from octavo.nn import Experts, GatedMLP, MixtureOfExperts, Router


def loop(experts: Experts, x: Tensor, weights: Tensor, picked: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t], picked[t].tolist(), strict=True):
            gate, up = (experts.gate_up_proj.weight[e] @ x[t]).chunk(2)
            out[t] += weight * (experts.down_proj.weight[e] @ (F.silu(gate) * up))
    return out


def router_with_scores(scores: list[float], **options: Any) -> tuple[Router, Tensor]:
    """A router that gives one token these scores."""
    options.setdefault("top_k", 2)
    router = Router(1, len(scores), **options)
    given = torch.tensor(scores)
    logits = given.log() if router.routing.scoring == "softmax" else given.logit()
    router.weight.data.copy_(logits.unsqueeze(1))
    return router, torch.ones(1, 1)


def picks(router: Router, x: Tensor) -> dict[int, float]:
    weights, experts = router(x)
    return {e: round(w, 5) for e, w in zip(experts[0].tolist(), weights[0].tolist(), strict=True)}


def test_softmax_takes_the_best() -> None:
    assert picks(*router_with_scores([0.1, 0.4, 0.2, 0.3])) == {1: 0.4, 3: 0.3}


def test_weights_are_normed_then_scaled() -> None:
    router, x = router_with_scores([0.1, 0.5, 0.2, 0.2], top_k=1, norm_topk_prob=True, routed_scaling_factor=2.5)
    assert picks(router, x) == {1: 2.5}
    assert picks(*router_with_scores([0.1, 0.5, 0.2, 0.2], top_k=1, routed_scaling_factor=2.0)) == {1: 1.0}


def test_a_group_counts_as_its_best_expert() -> None:
    """The second group loses, though its two together weigh more."""
    router, x = router_with_scores([0.05, 0.4, 0.3, 0.25], num_groups=2, topk_groups=1)
    assert picks(router, x) == {1: 0.4, 0: 0.05}


def test_with_a_correction_bias_a_group_counts_as_its_two_best() -> None:
    options = {"scoring": "sigmoid", "correction_bias": True, "num_groups": 2, "topk_groups": 1}
    assert picks(*router_with_scores([0.05, 0.4, 0.3, 0.25], **options)) == {2: 0.3, 3: 0.25}


def test_the_correction_bias_chooses_but_does_not_weigh() -> None:
    router, x = router_with_scores([0.6, 0.4, 0.3, 0.2], scoring="sigmoid", correction_bias=True)
    router.e_score_correction_bias.data[3] = 0.9
    assert picks(router, x) == {3: 0.2, 0: 0.6}


def test_negative_corrected_scores_stay_within_the_groups() -> None:
    """Experts of closed groups are out of reach even where all the others' corrected scores are below zero."""
    options = {"scoring": "sigmoid", "correction_bias": True, "num_groups": 2, "topk_groups": 1}
    router, x = router_with_scores([0.6, 0.5, 0.4, 0.3], **options)
    router.e_score_correction_bias.data.fill_(-5.0)
    assert picks(router, x).keys() == {0, 1}


def test_the_correction_bias_stays_in_fp32() -> None:
    router = Router(4, 8, 2, scoring="sigmoid", correction_bias=True, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, "num_groups must divide num_experts = 8, got 3"),
        ({"num_groups": 2, "topk_groups": 3}, "topk_groups must be from 1 to num_groups = 2, got 3"),
        ({"num_groups": 4, "topk_groups": 1, "top_k": 3}, "top_k must be from 1 to the 2 experts within reach, got 3"),
        ({"num_groups": 8, "topk_groups": 2, "correction_bias": True}, "two best experts"),
        ({"scoring": "tanh"}, "scoring must be"),
    ],
)
def test_routing_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(4, 8, **{"top_k": 2, **options})


@given(tokens=st.integers(0, 17), num_experts=st.integers(1, 6), top_k=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_grouped_experts_equal_the_loop(tokens: int, num_experts: int, top_k: int, seed: int) -> None:
    """Whatever the distribution: no token, idle experts, all tokens to one expert."""
    torch.manual_seed(seed)
    experts = Experts(num_experts, 6, 5, dtype=torch.float64)
    router = Router(6, num_experts, min(top_k, num_experts), dtype=torch.float64)
    router.weight.data *= 8 * (seed % 3)  # 0: all ties, which sends every token to the same experts
    x = torch.randn(tokens, 6, dtype=torch.float64)
    with torch.no_grad():
        weights, picked = router(x)
        torch.testing.assert_close(experts(x, weights, picked), loop(experts, x, weights, picked))


def test_shared_experts_see_every_token() -> None:
    torch.manual_seed(0)
    shared = GatedMLP(6, 9)
    moe = MixtureOfExperts(Router(6, 4, 2), Experts(4, 6, 5), shared)
    x = torch.randn(2, 3, 6)
    alone = MixtureOfExperts(moe.router, moe.experts)
    torch.testing.assert_close(moe(x), alone(x) + shared(x))
    torch.testing.assert_close(moe(x)[1, 2], moe(x[1, 2:])[0])


def test_gradients_reach_router_and_used_experts() -> None:
    torch.manual_seed(0)
    router, x = Router(6, 4, 2), torch.randn(3, 6)
    moe = MixtureOfExperts(router, Experts(4, 6, 5))
    moe(x).square().sum().backward()
    used = set(router(x)[1].flatten().tolist())
    assert router.weight.grad.abs().sum() > 0
    for e in range(4):
        assert bool(moe.experts.gate_up_proj.weight.grad[e].any()) == (e in used)
