"""Why attention divides its scores by √d_k.

Entries of q and k with variance σ² give q·k the variance d_k·σ⁴. Without the division the scores of wide heads are
large, the softmax puts everything on one key, and almost nothing flows back through it.

    python examples/why_scale.py [--quick] [--save]

For each d_k this prints, from random q and k with σ = 1: the variance of q·k beside theory; the entropy of the softmax
over n keys, raw and scaled, beside that of Gaussian scores of theory's variance, d_k and 1; and the norm of the loss's
gradient in the scores of the median query, taken through `octavo.flash_attn_func`. (The mean falls more slowly: the few
queries with two keys near a tie keep theirs.)
"""

import math
from typing import NamedTuple

import figures
import torch

from octavo import flash_attn_func

KEYS = 256


class Measured(NamedTuple):
    d_k: int
    variance: float  # of q·k
    entropy: dict[str, float]  # nats, of the softmax over the keys
    gradient: dict[str, float]  # norm of d loss / d scores, median over queries


def softmax_scales(d_k: int) -> dict[str, float]:
    return {"raw": 1.0, "scaled": d_k**-0.5}


def measure(d_k: int, queries: int) -> Measured:
    """q, k ~ N(0, 1): statistics over `queries` × KEYS scores, and gradients of a random linear loss of the output."""
    q, k = torch.randn(1, queries, 1, d_k), torch.randn(1, KEYS, 1, d_k)
    v, d_out = torch.randn(1, KEYS, 1, 16), torch.randn(1, queries, 1, 16)
    scores = q[0, :, 0] @ k[0, :, 0].T
    entropy, gradient = {}, {}
    for name, scale in softmax_scales(d_k).items():
        entropy[name] = mean_entropy(scores * scale)
        # a bias of zero is added to the scores, so its gradient is theirs
        bias = torch.zeros(1, 1, queries, KEYS, requires_grad=True)
        flash_attn_func(q, k, v, softmax_scale=scale, attn_bias=bias).backward(d_out)
        assert bias.grad is not None
        gradient[name] = float(bias.grad.norm(dim=-1).median())
    return Measured(d_k, float(scores.var()), entropy, gradient)


def mean_entropy(scores: torch.Tensor) -> float:
    """Nats, of the softmax over the last axis."""
    log_p = scores.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def entropy_theory(variance: float) -> float:
    """What the variance alone predicts: independent Gaussian scores over KEYS keys (sampled: no closed form)."""
    generator = torch.Generator().manual_seed(1)
    return mean_entropy(math.sqrt(variance) * torch.randn(2000, KEYS, generator=generator))


def draw(rows: list[Measured]) -> object:
    figure, (variance, entropy, gradient) = figures.panels(3, "Why attention divides by √d_k")
    d = [row.d_k for row in rows]
    variance.loglog(d, [row.variance for row in rows], "o", label="measured")
    variance.loglog(d, d, "-", color="black", lw=1, label="theory: d_k·σ⁴")
    variance.set(title="variance of q·k", xlabel="d_k")
    for name in ("raw", "scaled"):
        label = "softmax(q·k)" if name == "raw" else "softmax(q·k / √d_k)"
        entropy.semilogx(d, [row.entropy[name] for row in rows], "o-", label=label)
        gradient.loglog(d, [row.gradient[name] for row in rows], "o-", label=label)
    entropy.semilogx(d, [entropy_theory(x) for x in d], "k--", lw=1, label="theory: Gaussian scores")
    entropy.semilogx(d, [entropy_theory(1.0)] * len(d), "k--", lw=1)
    entropy.set(title=f"entropy over {KEYS} keys, nats", xlabel="d_k", ylim=(-0.2, math.log(KEYS) + 0.3))
    gradient.set(title="gradient norm in the scores, median query", xlabel="d_k")
    for axes in (variance, entropy, gradient):
        axes.legend()
    return figure


def main() -> None:
    options = figures.parser(__doc__, "why_scale.png").parse_args()
    torch.manual_seed(0)
    sizes = [4, 16, 64, 256] if options.quick else [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    rows = [measure(d_k, queries=128 if options.quick else 1024) for d_k in sizes]
    print("  d_k   var q·k  theory | entropy raw  scaled | gradient raw  scaled")
    for row in rows:
        print(
            f"{row.d_k:5d} {row.variance:9.1f} {row.d_k:7d} | {row.entropy['raw']:11.3f} {row.entropy['scaled']:7.3f}"
            f" | {row.gradient['raw']:12.1e} {row.gradient['scaled']:7.4f}"
        )
    if options.save:
        figures.save(draw(rows), options.save)


if __name__ == "__main__":
    main()
