"""Train a small decoder on Shakespeare with our flash attention, forward and backward, then talk to it.

    python examples/train_tiny.py --attention gqa --out .out/gqa --save     # train, checkpoint, export, picture
    python examples/train_tiny.py --attention gqa --out .out/gqa --resume   # go on from the last checkpoint
    octavo generate --model .out/gqa/hf "To be, or"                         # the engine serves what was trained
    python examples/train_tiny.py --compare --save                          # loss against KV bytes: MHA, GQA, MQA, MLA

--compare trains each in its own folder under --out; with --resume it goes on from what is there.

A run is the same whether or not it was interrupted: batches are drawn from (seed, step), and a checkpoint, one
safetensors file, holds weights, optimizer and history. Ctrl-C leaves the last one to go on from.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import figures
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shakespeare_text import Text, load_text
from tiny_model import TinyConfig, TinyDecoder, config_json, export
from torch.nn import functional as F
from tqdm import tqdm

ATTENTIONS = ("mha", "gqa", "mqa", "mla")
ADAM = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Plan:
    """How to train; part of what a checkpoint must match."""

    steps: int = 500
    batch: int = 8
    learning_rate: float = 3e-3
    eval_every: int = 50
    seed: int = 0


@dataclass
class Run:
    """A model in training and what happened so far."""

    model: TinyDecoder
    optimizer: torch.optim.Optimizer
    step: int = 0
    train_loss: list[float] = field(default_factory=list)  # nats per byte, of every step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per byte)
    seconds: float = 0.0


def start(config: TinyConfig, plan: Plan) -> Run:
    torch.manual_seed(plan.seed)
    model = TinyDecoder(config)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return Run(model, torch.optim.AdamW(groups, betas=(0.9, 0.95)))


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine to a tenth."""
    warmup = max(1, plan.steps // 20)
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, plan.steps - warmup)
    return plan.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def windows(data: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """(count, length + 1) int64 token ids from random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length, (count,), generator=generator)
    return torch.stack([data[s : s + length + 1] for s in starts.tolist()]).long()


def loss_of(model: TinyDecoder, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: TinyDecoder, text: Text, count: int) -> float:
    """Nats per byte on windows that are the same every time."""
    tokens = windows(text.validation, count, model.config.context, seed=0)
    return sum(float(loss_of(model, part)) * len(part) for part in tokens.split(8)) / count


def train(run: Run, text: Text, plan: Plan, stop_at: int, label: str) -> Iterator[Run]:
    """Train to step `stop_at`, yielding after each validation."""
    context = run.model.config.context
    with tqdm(total=stop_at, initial=run.step, desc=label, unit="step", dynamic_ncols=True) as bar:
        while run.step < stop_at:
            began = time.perf_counter()
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(plan, run.step)
            loss = loss_of(run.model, windows(text.train, plan.batch, context, seed=plan.seed * 10**6 + run.step))
            run.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            run.step += 1
            run.train_loss.append(float(loss.detach()))
            run.seconds += time.perf_counter() - began
            bar.update()
            bar.set_postfix(loss=f"{run.train_loss[-1]:.3f}")
            if run.step % plan.eval_every == 0 or run.step == plan.steps:
                run.validation.append((run.step, validate(run.model, text, count=16 * plan.batch)))
                yield run


def save_checkpoint(run: Run, plan: Plan, path: Path) -> None:
    """One safetensors file, replaced in one move."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        state = run.optimizer.state.get(parameter, {})
        tensors |= {f"adam.{key}.{name}": state[key] for key in ADAM if key in state}
    history = {"step": run.step, "train_loss": run.train_loss, "validation": run.validation, "seconds": run.seconds}
    metadata = {"history": json.dumps(history), "config": config_json(run.model.config), "plan": repr(plan)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata=metadata)
    os.replace(unfinished, path)


def load_checkpoint(run: Run, plan: Plan, path: Path) -> None:
    """Put the run where the checkpoint left it. Raises ValueError when it belongs to another model or plan."""
    with safe_open(path, framework="pt") as file:
        metadata, stored = file.metadata(), set(file.keys())
        for name, ours in (("config", config_json(run.model.config)), ("plan", repr(plan))):
            if metadata[name] != ours:
                raise ValueError(f"{path}: its {name} is {metadata[name]}, this run's is {ours}; use another --out")
        for name, parameter in run.model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
            saved = {key: f"adam.{key}.{name}" for key in ADAM}
            run.optimizer.state[parameter] = {key: file.get_tensor(at) for key, at in saved.items() if at in stored}
    history = json.loads(metadata["history"])
    run.step, run.train_loss, run.seconds = history["step"], history["train_loss"], history["seconds"]
    run.validation = [(step, loss) for step, loss in history["validation"]]


def train_one(config: TinyConfig, plan: Plan, text: Text, out: Path, options: argparse.Namespace) -> Run:
    """Train with checkpoints under `out`, resuming if asked; export and sample at the end."""
    run, path = start(config, plan), out / "checkpoint.safetensors"
    if options.resume and path.exists():
        load_checkpoint(run, plan, path)
    elif options.resume:
        print(f"no checkpoint at {path}: starting at step 0")
    try:
        for _ in train(run, text, plan, options.stop_at or plan.steps, config.attention):
            save_checkpoint(run, plan, path)
    except KeyboardInterrupt:
        # no checkpoint here: the interrupt may have come in the middle of an optimizer step
        print(f"interrupted at step {run.step}; --resume goes on from the last checkpoint, {path}")
        raise SystemExit(130) from None
    save_checkpoint(run, plan, path)
    print(f"checkpoint: {path} (step {run.step} of {plan.steps})")
    if config.wiring == "pre":
        export(run.model, out / "hf")
        print(f"Hugging Face layout: {out / 'hf'}")
    sample = run.model.generate(b"To be, or", max_new_tokens=40 if options.quick else 200)
    print(f"--- a sample\n{sample.decode(errors='replace')}\n---")
    return run


def table(runs: dict[str, Run]) -> str:
    """Markdown: what each attention keeps per token and how well it predicts."""
    lines = ["| attention | parameters | KV bytes per token (bf16) | validation loss, nats per byte | bits per byte |"]
    lines.append("|---|---|---|---|---|")
    for name, run in runs.items():
        loss = run.validation[-1][1]
        parameters = sum(p.numel() for p in run.model.parameters())
        columns = [
            name.upper(),
            f"{parameters:,}",
            f"{run.model.kv_bytes_per_token:,}",
            f"{loss:.4f}",
            f"{loss / math.log(2):.4f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def draw(runs: dict[str, Run], title: str) -> object:
    figure, (curves, *rest) = figures.panels(2 if len(runs) > 1 else 1, title)
    for colour, (name, run) in zip(figures.COLOURS, runs.items(), strict=False):
        curves.plot(range(1, run.step + 1), run.train_loss, color=colour, alpha=0.25, lw=0.8)
        curves.plot(*zip(*run.validation, strict=True), "o-", color=colour, ms=3, label=f"{name.upper()}, validation")
    curves.set(xlabel="step", ylabel="nats per byte", title="loss (faint: training)", ylim=(None, 3.2))
    curves.legend()
    for axes in rest:
        for colour, (name, run) in zip(figures.COLOURS, runs.items(), strict=False):
            point = (run.model.kv_bytes_per_token, run.validation[-1][1])
            axes.plot(*point, "o", color=colour, ms=8)
            axes.annotate(name.upper(), point, xytext=(7, 5), textcoords="offset points")
        axes.set(xlabel="KV bytes per token, bf16", ylabel="validation loss, nats per byte", title="loss against cache")
        axes.margins(0.2)
    return figure


def parse() -> argparse.Namespace:
    parser = figures.parser(__doc__, "train_tiny.png")
    parser.add_argument("--attention", choices=ATTENTIONS, default="mha")
    parser.add_argument(
        "--wiring", default="pre", help='residual wiring, a name of octavo.nn.wire such as "pre+branch"'
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default 500; 12 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(".out/tiny"), help="folder of the checkpoint and the exported model"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--stop-at", type=int, help="stop at this step, to be resumed later")
    parser.add_argument("--compare", action="store_true", help="train MHA, GQA, MQA and MLA alike and print the table")
    return parser.parse_args()


def main() -> None:
    options = parse()
    config = TinyConfig(options.attention, options.wiring)
    plan = Plan(seed=options.seed)
    if options.quick:
        config = replace(config, dim=48, layers=2, head_dim=8, mlp_dim=64, context=64, kv_rank=12, rope_head_dim=4)
        plan = replace(plan, steps=12, batch=4, eval_every=4)
    if options.steps is not None:
        plan = replace(plan, steps=options.steps)
    text = load_text()
    if options.compare:
        runs = {
            name: train_one(replace(config, attention=name), plan, text, options.out / name, options)
            for name in ATTENTIONS
        }
        print(table(runs))
    else:
        runs = {config.attention: train_one(config, plan, text, options.out, options)}
    if options.save:
        figures.save(draw(runs, "A small decoder on Shakespeare, byte by byte"), options.save)


if __name__ == "__main__":
    main()
