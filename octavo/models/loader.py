"""`load_model`: a path in, a model that answers out, with its tokenizer and what `octavo inspect` says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from octavo.models.causal_lm import CausalLM
from octavo.models.config import ModelConfig, end_ids, read_json
from octavo.models.gguf_config import config_from_gguf
from octavo.models.gguf_file import GGUFFile, read_gguf
from octavo.models.gguf_tokenizer import tokenizer_from_gguf
from octavo.models.gguf_weights import GGUFWeights
from octavo.models.registry import build_model, config_from_hf
from octavo.models.safetensors_weights import SafetensorsWeights
from octavo.models.tokenizer import Tokenizer
from octavo.models.weights import WeightSource, load_weights
from octavo.nn import RMSNorm

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that a checkpoint brings."""

    model: CausalLM
    tokenizer: Tokenizer | None
    config: ModelConfig
    generation_defaults: Mapping[str, float]  # of generation_config.json, under SamplingParams' names
    held: Mapping[str, int] = field(repr=False)  # parameters by how they are kept in memory
    notes: tuple[str, ...] = ()  # what the loader decided that a user may not expect

    def describe(self) -> dict[str, Any]:
        """What `octavo inspect` shows; sizes in bytes, counts of parameters. JSON-ready."""
        config, dtype = self.config, self.model.dtype
        return {
            "architecture": config.architecture,
            "parameters": config.num_parameters,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "sliding_windows": sorted({window for window in config.layer_windows if window}),
            "activation_dtype": str(dtype).removeprefix("torch."),
            "kv_bytes_per_token": config.kv_bytes_per_token(self.model.cache_dtype),
            "kv_bytes_per_token_of_mha": config.mha_kv_bytes_per_token(self.model.cache_dtype),
            "weights": dict(self.held),
            "weight_bytes": weight_bytes(self.model),
            "notes": list(self.notes),
        }


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    progress: bool = True,
    *,
    keep_quantized: bool = True,
    skip_tokenizer: bool = False,
) -> LoadedModel:
    """Load a .gguf file, or a directory with config.json, *.safetensors and tokenizer.json.

    dtype: of activations, and of the weights that are not kept quantised. "auto" is the checkpoint's own; on the CPU,
    fp32 for a GGUF's quantised weights and for fp16 (which CPUs compute more slowly than fp32). keep_quantized: on the
    CPU, 4- and 8-bit GGUF weights stay as they are; False unpacks them all (exact, slower, larger). skip_tokenizer:
    `tokenizer` is None, and the directory needs none. progress: a bar, if it takes over 1 s. Raises `ValueError` for a
    file that is missing, damaged, or of a kind that is not known.
    """
    path, device = Path(path), torch.device(device)
    if path.is_dir():
        config, tokenizer, defaults = _read_directory(path, skip_tokenizer)
        source: WeightSource = SafetensorsWeights(path, config)
    else:
        file = read_gguf(path)
        config, defaults = _gguf_model_config(file), {}
        tokenizer = None if skip_tokenizer else tokenizer_from_gguf(file.metadata)
        source = GGUFWeights(file, config)
    _check_token_ids(config, tokenizer)
    torch_dtype, notes = _compute_dtype(dtype, config, device)
    model = build_model(config, device="meta", dtype=torch_dtype)
    held = load_weights(
        model,
        source,
        dtype=torch_dtype,
        device=device,
        keep_quantized=keep_quantized and device.type == "cpu",
        progress=progress,
    )
    return LoadedModel(model.eval(), tokenizer, config, defaults, held, notes)


def load_dummy_model(
    config: ModelConfig | str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
) -> CausalLM:
    """Random weights (std 0.02, norms at their start) for a config, or a directory's config.json: for benchmarks."""
    if not isinstance(config, ModelConfig):
        config = config_from_hf(Path(config))
    device = torch.device(device)
    torch_dtype, _ = _compute_dtype(dtype, config, device)
    model = build_model(config, device="meta", dtype=torch_dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
    return model.eval()


def read_config(path: str | Path) -> ModelConfig:
    """The config of a model, without its weights."""
    path = Path(path)
    return _read_directory_config(path)[0] if path.is_dir() else _gguf_model_config(read_gguf(path))


def weight_bytes(model: CausalLM) -> int:
    """Bytes that the weights take in memory; a tied table counts once."""
    held = {
        id(weight): weight.nbytes
        for module in model.modules()
        for weight in [getattr(module, "weight", None)]
        if weight is not None
    }
    others = sum(parameter.nbytes for name, parameter in model.named_parameters() if not name.endswith("weight"))
    return int(sum(held.values()) + others)


def _gguf_model_config(file: GGUFFile) -> ModelConfig:
    config = config_from_gguf(file.metadata, {name: tensor.shape for name, tensor in file.tensors.items()})
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return config
    if factors.type.name != "F32" or factors.shape != (config.head_dim // 2,):
        raise ValueError(
            f"rope_freqs.weight must be F32 of shape ({config.head_dim // 2},), got {factors.type.name} {factors.shape}"
        )
    return replace(
        config, rope_freq_factors=tuple(torch.from_numpy(factors.data).view(torch.float32).flatten().tolist())
    )


def _read_directory_config(directory: Path) -> tuple[ModelConfig, Mapping[str, float]]:
    """The config, with generation_config.json's end-of-sequence ids, and its sampling defaults."""
    config = config_from_hf(directory)
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    ids = end_ids(generation, config.eos_token_ids)
    defaults = {name: generation[name] for name in _GENERATION_DEFAULTS if generation.get(name) is not None}
    return replace(config, eos_token_ids=ids), defaults


def _read_directory(directory: Path, skip_tokenizer: bool) -> tuple[ModelConfig, Tokenizer | None, Mapping[str, float]]:
    config, defaults = _read_directory_config(directory)
    if skip_tokenizer:
        return config, None, defaults
    tokenizer = Tokenizer.from_directory(directory, config.eos_token_ids)
    return replace(config, eos_token_ids=tokenizer.eos_token_ids), tokenizer, defaults


def _check_token_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size} rows: "
            "they belong to different models"
        )
    for token_id in config.eos_token_ids:
        if not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise ValueError(f"eos_token_id {token_id!r} is outside of the vocabulary of {config.vocab_size}")


def _compute_dtype(
    dtype: str | torch.dtype, config: ModelConfig, device: torch.device
) -> tuple[torch.dtype, tuple[str, ...]]:
    if isinstance(dtype, str):
        name = config.dtype_name if dtype == "auto" else dtype
        if name not in _DTYPES:
            raise ValueError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)} (or torch's own), got {name!r}")
        dtype = _DTYPES[name]
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)} (or torch's own), got {dtype}")
    if dtype == torch.float16 and device.type == "cpu":
        return torch.float32, ("float16 computes as float32 on the CPU: more exact, and no slower there",)
    return dtype, ()
