"""How a branch joins the residual stream decides whether a deep model trains.

    PostNorm norm(x + f(x))    PreNorm x + f(norm(x))    BranchNorm x + norm(f(x))    ReZero x + α·f(x), α from 0

    python examples/residual_wiring.py [--quick] [--save]

For each wiring, the same deep decoder with the same Xavier-initialised weights: the norm of the loss's gradient in the
stream after each block, before training, as a multiple of that after the last; then the training loss on Shakespeare
with Adam at one constant learning rate and no warm-up, for which post-norm is known to be fragile (Xiong et al. 2020).
"""

from dataclasses import dataclass

import figures
import torch
from shakespeare_text import Text, load_text
from tiny_model import TinyConfig, TinyDecoder
from torch import nn
from tqdm import tqdm
from train_tiny import loss_of, windows

WIRINGS = {"post": "PostNorm", "pre": "PreNorm", "branch": "BranchNorm", "rezero": "ScaledResidual (ReZero)"}


@dataclass(frozen=True)
class Plan:
    layers: int = 24
    steps: int = 300
    batch: int = 8
    learning_rate: float = 1e-3


def build(wiring: str, plan: Plan) -> TinyDecoder:
    """The same weights for each wiring."""
    torch.manual_seed(0)
    config = TinyConfig(wiring=wiring, dim=48, head_dim=8, mlp_dim=96, context=64, layers=plan.layers)
    model = TinyDecoder(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.xavier_uniform_(parameter, generator=generator)
    return model


def gradient_norms(model: TinyDecoder, text: Text, plan: Plan) -> list[float]:
    """Norm of d loss / d stream after each block, relative to the last."""
    streams: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: object, stream: torch.Tensor) -> None:
        stream.retain_grad()
        streams.append(stream)

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    loss_of(model, windows(text.train, plan.batch, model.config.context, seed=0)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    norms = [float(stream.grad.norm()) for stream in streams if stream.grad is not None]
    return [norm / norms[-1] for norm in norms]


def train(model: TinyDecoder, text: Text, plan: Plan, label: str) -> list[float]:
    """Training loss of every step, nats per byte."""
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.learning_rate)
    losses = []
    for step in tqdm(range(plan.steps), desc=label, unit="step", dynamic_ncols=True):
        loss = loss_of(model, windows(text.train, plan.batch, model.config.context, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def smooth(losses: list[float]) -> list[float]:
    """Mean of up to 10 steps."""
    return [sum(part) / len(part) for part in (losses[max(0, i - 9) : i + 1] for i in range(len(losses)))]


def draw(norms: dict[str, list[float]], losses: dict[str, list[float]], plan: Plan) -> object:
    figure, (gradients, curves) = figures.panels(2, f"Residual wirings, {plan.layers} blocks")
    for wiring, label in WIRINGS.items():
        gradients.semilogy(range(1, plan.layers + 1), norms[wiring], "o-", ms=3, label=label)
        curves.plot(range(1, plan.steps + 1), smooth(losses[wiring]), label=label)
    gradients.set(xlabel="block", title="gradient in the stream before training\n(last block = 1)")
    curves.set(xlabel="step", ylabel="nats per byte", title="training loss, no warm-up")
    gradients.legend()
    curves.legend()
    return figure


def main() -> None:
    options = figures.parser(__doc__, "residual_wiring.png").parse_args()
    plan = Plan(layers=6, steps=6, batch=2) if options.quick else Plan()
    text = load_text()
    norms: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for wiring, label in WIRINGS.items():
        model = build(wiring, plan)
        norms[wiring] = gradient_norms(model, text, plan)
        losses[wiring] = train(model, text, plan, label)
    print(f"{'wiring':25} {'gradient at block 1 / last':>26} {'loss, first step':>17} {'last 10 steps':>14}")
    for wiring, label in WIRINGS.items():
        last = smooth(losses[wiring])[-1]
        print(f"{label:25} {norms[wiring][0]:26.2e} {losses[wiring][0]:17.3f} {last:14.3f}")
    if options.save:
        figures.save(draw(norms, losses, plan), options.save)


if __name__ == "__main__":
    main()
