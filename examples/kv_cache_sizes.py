"""How much memory the KV cache of real models takes, and would take under another attention.

    python examples/kv_cache_sizes.py [--quick] [--save]

Bytes per token come from the caches that `octavo.nn` makes for the models' published shapes (on torch's meta device,
so nothing is allocated); "8-bit" is one byte per number, without scales. "In 80 GB" is the number of tokens that fit
beside the model's own bf16 weights on one 80 GB card, or a dash where those alone do not fit.
"""

from dataclasses import dataclass

import figures
import torch

from octavo.nn import MultiHeadAttention, MultiHeadLatentAttention

CARD = 80e9  # bytes


@dataclass(frozen=True)
class Shape:
    """A model's published sizes; kv_heads 0 means MLA with a latent of 512 and 64 rotary channels (DeepSeek's)."""

    name: str
    billions: float  # parameters
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kind(self) -> str:
        return {0: "MLA", 1: "MQA", self.heads: "MHA"}.get(self.kv_heads, f"GQA-{self.kv_heads}")


MODELS = [
    Shape("GPT-3 175B", 175, 96, 96, 96, 128),
    Shape("Llama-2 7B", 6.74, 32, 32, 32, 128),
    Shape("Llama-2 70B", 69.0, 80, 64, 8, 128),
    Shape("Llama-3.1 8B", 8.03, 32, 32, 8, 128),
    Shape("Llama-3.1 405B", 405.9, 126, 128, 8, 128),
    Shape("Qwen3 32B", 32.8, 64, 64, 8, 128),
    Shape("SmolLM2 135M", 0.135, 30, 9, 3, 64),
    Shape("Falcon 7B", 7.22, 32, 71, 1, 64),
    Shape("DeepSeek-V2-Lite", 15.7, 27, 16, 0, 128),
    Shape("DeepSeek-V3", 671, 61, 128, 0, 128),
]


def layer_bytes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes per token and layer, asked of the cache that the module itself would make."""
    with torch.device("meta"):
        attention: MultiHeadAttention | MultiHeadLatentAttention
        if kv_heads:
            attention = MultiHeadAttention(heads * head_dim, heads, kv_heads, head_dim)
        else:
            attention = MultiHeadLatentAttention(heads * head_dim, heads, None, 512)
        return attention.new_cache(1, 16, dtype=dtype).bytes_per_token


def bytes_per_token(shape: Shape, kv_heads: int | None = None, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of the whole model, with its own or another number of key/value heads (0: MLA)."""
    return shape.layers * layer_bytes(
        shape.heads, shape.kv_heads if kv_heads is None else kv_heads, shape.head_dim, dtype
    )


def variants(shape: Shape) -> dict[str, int]:
    """Bytes per token of this model's shape under each attention its heads allow, bf16, and MLA in 8 bits."""
    sizes = {"MHA": shape.heads, "GQA-8": 8, "MQA": 1, "MLA": 0}
    result = {
        name: bytes_per_token(shape, kv_heads)
        for name, kv_heads in sizes.items()
        if shape.heads % max(1, kv_heads) == 0
    }
    return result | {"MLA 8-bit": bytes_per_token(shape, 0, torch.int8)}


def tokens_beside_weights(shape: Shape, dtype: torch.dtype) -> str:
    room = CARD - 2e9 * shape.billions
    return "–" if room <= 0 else f"{int(room // bytes_per_token(shape, dtype=dtype)):,}"


def draw(models: list[Shape]) -> object:
    figure, (own, other) = figures.panels(2, "KV cache per token")
    names = [f"{shape.name} ({shape.kind})" for shape in models]
    for offset, (label, dtype) in enumerate([("bf16", torch.bfloat16), ("8-bit", torch.int8)]):
        sizes = [bytes_per_token(shape, dtype=dtype) / 1024 for shape in models]
        own.barh([y + 0.4 * offset for y in range(len(models))], sizes, height=0.4, label=label)
    own.set_yticks([y + 0.2 for y in range(len(models))], names)
    own.invert_yaxis()
    own.set(xscale="log", xlabel="KiB per token", title="as published")
    own.legend()
    llama = next(shape for shape in models if shape.name == "Llama-2 70B")
    sizes = variants(llama)
    bars = other.bar(list(sizes), [size / 1024 for size in sizes.values()], color=figures.COLOURS)
    other.bar_label(bars, [f"{size / 1024:,.0f}" for size in sizes.values()])
    other.set(title=f"{llama.name}'s shape under each attention", ylabel="KiB per token", yscale="log", ylim=(10, 6000))
    return figure


def main() -> None:
    options = figures.parser(__doc__, "kv_cache_sizes.png").parse_args()
    models = (
        [m for m in MODELS if m.name in ("Llama-2 70B", "SmolLM2 135M", "DeepSeek-V3")] if options.quick else MODELS
    )
    print(f"{'model':18} {'kind':6} {'KiB/token':>9} {'8-bit':>7} {'tokens in 80 GB':>16} {'8-bit':>11}")
    for shape in models:
        sizes = [bytes_per_token(shape, dtype=dtype) / 1024 for dtype in (torch.bfloat16, torch.int8)]
        fits = [tokens_beside_weights(shape, dtype) for dtype in (torch.bfloat16, torch.int8)]
        print(f"{shape.name:18} {shape.kind:6} {sizes[0]:9.1f} {sizes[1]:7.1f} {fits[0]:>16} {fits[1]:>11}")
    kinds = ["MHA", "GQA-8", "MQA", "MLA", "MLA 8-bit"]
    print(f"\n{'the same shape as':18} " + " ".join(f"{kind:>10}" for kind in kinds) + "   KiB/token")
    for shape in models:
        kib = {kind: f"{size / 1024:.1f}" for kind, size in variants(shape).items()}
        print(f"{shape.name:18} " + " ".join(f"{kib.get(kind, '–'):>10}" for kind in kinds))
    if options.save:
        figures.save(draw(models), options.save)


if __name__ == "__main__":
    main()
