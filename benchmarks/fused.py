"""The fused inference kernels beside torch and cuBLAS on a GPU: norms, activation, rotation with cache write, linear
layers of a few rows, experts, sampling. One process, the same tensors, CUDA graphs for both sides.

    python benchmarks/fused.py [--only linear experts] [--json out.json]

A time is µs per call in a graph of many calls, so it holds a launch as an engine's decode step sees it. Weights rotate
through at least 200 MB, so that they come from memory, not from the L2 cache. The floor is the bytes that must move at
3.02 TB/s, an H100's measured copy rate, or for many tokens the products at 700 TFLOP/s.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from octavo import ops
from octavo.ops.linear_small_batch import InputNorm
from octavo.ops.moe import Routing
from octavo.ops.rotary_cache import HeadNorm, Rotary

DEVICE, DTYPE = "cuda", torch.bfloat16
COPY_RATE, PRODUCT_RATE = 3.02e12, 700e12  # bytes/s, FLOP/s


def graph_microseconds(calls: Sequence[Callable[[], Any]], replays: int = 7) -> float:
    """Best of a few replays of one graph of all calls, per call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be making what the calls read
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[1:]) * 1e3 / len(calls)


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def copies(*shape: int, scale: float = 1.0) -> list[torch.Tensor]:
    """As many random tensors as make 200 MB, at most 48."""
    nbytes = 2 * torch.Size(shape).numel()
    return [randn(*shape) * scale for _ in range(max(1, min(48, int(200e6 // nbytes))))]


class Table:
    """Prints and keeps rows: what, ours, torch's, floor in µs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, ours: float, peer: float, floor: float) -> None:
        self.rows.append({"what": what, "ours_us": ours, "torch_us": peer, "floor_us": floor})
        print(f"{what:<58}{ours:9.2f}{peer:9.2f}{floor:9.2f}{peer / ours:7.2f}×{floor / ours:7.0%}", flush=True)


def pointwise(table: Table) -> None:
    for tokens in (1, 64, 256, 4096):
        for dim, heads, kv_heads, hidden in ((1024, 16, 8, 3072), (4096, 32, 8, 14336)):
            x, residual, weight = randn(tokens, dim), randn(tokens, dim), randn(dim)
            gate_up, qkv = randn(tokens, 2 * hidden), randn(tokens, (heads + 2 * kv_heads) * 128)
            turns = torch.rand(tokens, 64, device=DEVICE)
            rotary, norm = Rotary(turns.cos(), turns.sin(), False), HeadNorm(randn(128), randn(128), 1e-6, False)
            caches = [randn(4096 // 16, 16, kv_heads, 128) for _ in "kv"]
            slots = torch.randperm(4096, device=DEVICE)[:tokens]

            def measure(name: str, nbytes: int, call: Callable[[], Any], label: str = f"{tokens} × {dim}") -> None:
                ours = graph_microseconds([call] * 20)
                with ops.use_backend("reference"):
                    peer = graph_microseconds([call] * 20)
                table.add(f"{name}, {label}", ours, peer, nbytes / COPY_RATE * 1e6)

            measure("add_rms_norm", 8 * x.numel(), lambda x=x, r=residual, w=weight: ops.add_rms_norm(x, r, w))
            measure("gated_activation", 3 * gate_up.numel(), lambda g=gate_up: ops.gated_activation(g))
            # the reference finds the stored tokens by a mask, which waits for the host: no graph, so torch's part of it
            ours = graph_microseconds(
                [lambda a=(qkv, heads, rotary, *caches, slots), n=norm: ops.rotate_and_store(*a, norm=n)] * 20
            )
            peer = graph_microseconds([lambda a=(qkv, heads, rotary, norm, caches, slots): _plain_store(*a)] * 20)
            floor = 4 * qkv.numel() / COPY_RATE * 1e6
            table.add(f"rotate_and_store with head norms, {tokens} × {dim}", ours, peer, floor)


def _plain_store(
    qkv: torch.Tensor, heads: int, rotary: Rotary, norm: HeadNorm, caches: list[torch.Tensor], slots: torch.Tensor
) -> torch.Tensor:
    """Norms, rotation and cache writes as separate torch ops, in half-split style."""
    split = qkv.view(len(qkv), -1, 128)
    kv_heads = (split.shape[1] - heads) // 2
    turned = []
    for x, weight in ((split[:, :heads], norm.q_weight), (split[:, heads : heads + kv_heads], norm.k_weight)):
        a, b = F.rms_norm(x, (128,), weight, norm.eps).chunk(2, -1)
        cos, sin = rotary.cos[:, None], rotary.sin[:, None]
        turned.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(qkv.dtype))
    for cache, rows in zip(caches, (turned[1], split[:, -kv_heads:]), strict=True):
        cache.view(-1, kv_heads, 128).index_copy_(0, slots, rows)
    return turned[0]


LINEARS = {
    "Qwen3-0.6B": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "lm_head": (151936, 1024),
    },
    "Llama-3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}


def linear(table: Table) -> None:
    for model, shapes in LINEARS.items():
        for name, (columns, width) in shapes.items():
            weights = copies(columns, width, scale=width**-0.5)
            norm, floor = InputNorm(randn(width), 1e-6, False), columns * width * 2 / COPY_RATE * 1e6
            for rows in (1, 2, 8, 16):
                x, residual = randn(rows, width), randn(rows, columns)
                options: dict[str, Any] = (
                    {"norm": norm} if name in ("qkv", "gate_up", "lm_head") else {"residual": residual}
                )
                if name == "gate_up":
                    options["activation"] = "silu"
                calls = weights * max(1, 24 // len(weights))
                ours = graph_microseconds(
                    [lambda w=w, x=x, o=options: ops.linear_small_batch(x, w, **o) for w in calls]
                )
                with ops.use_backend("reference"):
                    peer = graph_microseconds(
                        [lambda w=w, x=x, o=options: ops.linear_small_batch(x, w, **o) for w in calls]
                    )
                extra = "+".join(
                    ["norm"] * ("norm" in options)
                    + ["silu"] * ("activation" in options)
                    + ["residual"] * ("residual" in options)
                )
                table.add(f"{model} {name} with {extra}, {rows} rows", ours, peer, floor)


def experts(table: Table) -> None:
    """DeepSeek-V2-Lite's; torch's side is `torch._grouped_mm` for both products, its sorting and sums in plain ops.

    Tokens are spread over all experts, or (`6 experts`) all go to the same, as where every score is equal."""
    num_experts, dim, hidden, top_k = 64, 2048, 1408, 6
    gate_up = [randn(num_experts, 2 * hidden, dim) * dim**-0.5 for _ in range(2)]
    down = [randn(num_experts, dim, hidden) * hidden**-0.5 for _ in range(2)]
    routing = Routing(top_k, "softmax", 1, 1, False, 1.0)
    cases = [(tokens, 1.0) for tokens in (1, 4, 8, 16, 64, 128, 256, 512, 1024, 4096, 8192)]
    for tokens, spread in (*cases, *((tokens, 0.0) for tokens in (16, 64, 128, 256, 512, 8192))):
        x = randn(tokens, dim)
        weights, chosen = ops.route(spread * randn(tokens, num_experts, dtype=torch.float32), routing)

        def ours(i: int, x: torch.Tensor = x, w: torch.Tensor = weights, c: torch.Tensor = chosen) -> torch.Tensor:
            return ops.mix_experts(x, w, c, gate_up[i % 2], down[i % 2])

        def peer(i: int, x: torch.Tensor = x, w: torch.Tensor = weights, c: torch.Tensor = chosen) -> torch.Tensor:
            return _grouped_mm(x, w, c, gate_up[i % 2], down[i % 2])

        times = [graph_microseconds([lambda i=i, f=f: f(i) for i in range(6)]) for f in (ours, peer)]
        used = len(chosen.unique())
        floor = max(used * 3 * hidden * dim * 2 / COPY_RATE, tokens * top_k * 6 * hidden * dim / PRODUCT_RATE) * 1e6
        table.add(f"DeepSeek-V2-Lite experts, {tokens} tokens, {used} experts", *times, floor)


def _grouped_mm(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    flat = chosen.flatten()
    order = flat.argsort()
    ends = torch.searchsorted(flat[order], torch.arange(len(gate_up), device=x.device), right=True).int()
    gate, up = torch._grouped_mm(x[order // chosen.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    picked = torch.empty_like(out).index_copy_(0, order, out).view(*chosen.shape, -1)
    return (picked * weights.unsqueeze(-1)).sum(1).to(x.dtype)


SAMPLING = {  # temperature, top_k, top_p, standard deviation of the logits
    "greedy": (0.0, 0, 1.0, 3),
    "temperature": (0.6, 0, 1.0, 3),
    "top_k 50": (1.0, 50, 1.0, 3),
    "top_p 0.95, peaked": (0.8, 0, 0.95, 8),
    "top_p 0.95": (0.8, 0, 0.95, 3),
    "top_p 0.95, flat": (0.8, 0, 0.95, 1),
    "top_k 20, top_p 0.95": (0.6, 20, 0.95, 3),
}


def sampling(table: Table) -> None:
    """Torch's side: argmax; softmax and exponential noise; for truncation a full sort before."""
    vocab = 151936
    for rows in (1, 32, 256):
        noise, ones = randn(rows, vocab, dtype=torch.float32), torch.ones(rows, device=DEVICE)
        numbers = torch.arange(rows, device=DEVICE)
        for name, (t, k, p, deviation) in SAMPLING.items():
            logits = deviation * noise
            arguments = (ones * t, (ones * k).int(), ones * p, ones * 0, numbers, numbers)
            ours = graph_microseconds(
                [lambda a=arguments, x=logits, c=k > 0 or p < 1: ops.sample_on_device(x, *a, truncates=c)] * 4
            )
            peer = graph_microseconds([lambda x=logits, t=t, k=k, p=p: _plain_sample(x, t, k, p)] * 4)
            table.add(f"sample {rows} × {vocab}, {name}", ours, peer, 4 * logits.numel() / COPY_RATE * 1e6)


def _plain_sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    x = logits / temperature
    if top_k or top_p < 1:
        x, ids = x.sort(-1, descending=True)
        if top_k:
            x[:, top_k:] = float("-inf")
        probs = x.softmax(-1)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    else:
        probs = x.softmax(-1)
    drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    return drawn if ids is None else ids.gather(1, drawn[:, None]).squeeze(1)


SECTIONS = {"pointwise": pointwise, "linear": linear, "experts": experts, "sampling": sampling}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; µs")
    print(f"{'':<58}{'ours':>9}{'torch':>9}{'floor':>9}{'ratio':>8}{'of floor':>9}")
    table = Table()
    for name in arguments.only:
        SECTIONS[name](table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": table.rows}, file, indent=2)


if __name__ == "__main__":
    main()
