"""A small byte-level decoder of `octavo.nn` parts: any attention, any residual wiring, cached generation, HF export."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo.nn import (
    GatedMLP,
    LayerKVCache,
    LayerLatentCache,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    RMSNorm,
    RotaryEmbedding,
    TransformerBlock,
    make_caches,
)
from octavo.ops import AttentionMetadata

END = 256  # the one token that is no byte
KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}
EPS = 1e-6


@dataclass(frozen=True)
class TinyConfig:
    """Sizes; the latent (kv_rank + rope_head_dim = 64 numbers per token and layer) is as small as MQA's k and v."""

    attention: str = "mha"  # mha, gqa, mqa or mla
    wiring: str = "pre"  # a name of octavo.nn.wire
    dim: int = 192
    layers: int = 4
    heads: int = 6
    head_dim: int = 32
    mlp_dim: int = 512
    context: int = 128
    kv_rank: int = 48
    rope_head_dim: int = 16
    vocab_size: int = 257


class TinyDecoder(nn.Module):
    """Embedding, blocks, norm, and the embedding again as the output matrix."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        is_mla = config.attention == "mla"
        self.rope = RotaryEmbedding(config.rope_head_dim if is_mla else config.head_dim, interleaved=is_mla)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, EPS)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if into_stream else 0.02)

    def _block(self) -> TransformerBlock:
        c = self.config
        attention: nn.Module
        if c.attention == "mla":
            attention = MultiHeadLatentAttention(
                c.dim,
                c.heads,
                None,
                c.kv_rank,
                nope_head_dim=c.head_dim,
                rope_head_dim=c.rope_head_dim,
                v_head_dim=c.head_dim,
                rope=self.rope,
            )
        else:
            kv_heads = KV_HEADS[c.attention]
            attention = MultiHeadAttention(c.dim, c.heads, kv_heads, c.head_dim, causal=True, rope=self.rope)
        return TransformerBlock(
            c.dim, attention, GatedMLP(c.dim, c.mlp_dim), wiring=c.wiring, norm=lambda dim: RMSNorm(dim, EPS)
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor | None = None,
        caches: Sequence[LayerKVCache | LayerLatentCache] | None = None,
        metadata: AttentionMetadata | None = None,
    ) -> Tensor:
        """Logits (…, vocab_size) of token_ids (B, S), or (T,) with caches."""
        if positions is None:
            positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
        rotation = self.rope(positions, metadata)
        x = self.embedding(token_ids)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, positions, cache, metadata, rotation=rotation)
        return nn.functional.linear(self.norm(x), self.embedding.weight)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers, in bf16."""
        _, caches = make_caches(self, 1, 1, dtype=torch.bfloat16)
        return sum(cache.bytes_per_token for cache in caches)

    @torch.no_grad()
    def generate(self, prompt: bytes, max_new_tokens: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """The prompt and its continuation, sampled with a paged cache and without the engine."""
        generator = torch.Generator().manual_seed(seed)
        rows, caches = make_caches(self, 1, len(prompt) + max_new_tokens)
        ids, new = list(prompt), list(prompt)
        for _ in range(max_new_tokens):
            step = rows.append(len(new))
            logits = self(torch.tensor(new), step.positions, caches, step.metadata)[-1, :END]
            new = [int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))]
            ids += new
        return bytes(ids)


def export(model: TinyDecoder, folder: Path) -> None:
    """Write config.json, model.safetensors and tokenizer.json as Hugging Face lays them out.

    MHA, GQA and MQA become a Llama, MLA a DeepSeek-V2 without experts; both are pre-norm, so other wirings cannot be
    written. Raises ValueError for them.
    """
    if model.config.wiring != "pre":
        raise ValueError(f"wiring {model.config.wiring!r} has no Hugging Face layout here: only 'pre' can be exported")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_hf_config(model.config), indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in _hf_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(folder)


def _hf_config(c: TinyConfig) -> dict[str, Any]:
    common = {
        "hidden_size": c.dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.context,
        "rms_norm_eps": EPS,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "vocab_size": c.vocab_size,
        "bos_token_id": None,
        "eos_token_id": END,
        "torch_dtype": "float32",
    }
    if c.attention != "mla":
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": c.head_dim}
        return kind | {"num_key_value_heads": KV_HEADS[c.attention]} | common
    return common | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": c.heads,
        "q_lora_rank": None,
        "kv_lora_rank": c.kv_rank,
        "qk_nope_head_dim": c.head_dim,
        "qk_rope_head_dim": c.rope_head_dim,
        "v_head_dim": c.head_dim,
        "first_k_dense_replace": c.layers,
    }


def _hf_tensors(model: TinyDecoder) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; merged matrices are split."""
    c = model.config
    tensors = {
        "model.embed_tokens.weight": model.embedding.weight.detach(),
        "model.norm.weight": model.norm.weight.detach(),
    }
    for index, block in enumerate(model.blocks):
        ours = {name: parameter.detach() for name, parameter in block.named_parameters()}
        layer = {
            "input_layernorm": ours["attention.norm.weight"],
            "post_attention_layernorm": ours["mlp.norm.weight"],
            "self_attn.o_proj": ours["attention.inner.o_proj.weight"],
            "mlp.down_proj": ours["mlp.inner.down_proj.weight"],
        }
        layer["mlp.gate_proj"], layer["mlp.up_proj"] = ours["mlp.inner.gate_up_proj.weight"].chunk(2)
        if c.attention == "mla":
            names = {
                "q_proj": "q_proj",
                "kv_a_proj_with_mqa": "kv_proj",
                "kv_a_layernorm": "kv_norm",
                "kv_b_proj": "kv_proj_up",
            }
            layer |= {f"self_attn.{theirs}": ours[f"attention.inner.{mine}.weight"] for theirs, mine in names.items()}
        else:
            rows = [heads * c.head_dim for heads in (c.heads, KV_HEADS[c.attention], KV_HEADS[c.attention])]
            split = ours["attention.inner.qkv_proj.weight"].split(rows)
            layer |= {f"self_attn.{x}_proj": weight for x, weight in zip("qkv", split, strict=True)}
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in layer.items()}
    return tensors


def _save_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids are the bytes themselves, and 256 for the end of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={_byte_symbol(b): b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_symbol(byte: int) -> str:
    """The printable character that byte-level BPE (GPT-2) writes for a byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in kept]
    return chr(byte) if byte in kept else chr(256 + others.index(byte))


def config_json(config: TinyConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)
