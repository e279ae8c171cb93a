"""What a user may say when an engine starts: `LLM(...)`, `AsyncLLM(...)` and the command line share these fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from octavo.engine.config import SchedulingPolicy
from octavo.engine.from_dict import FromDict
from octavo.models import default_model_path

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(FromDict):
    """How an engine is built.

    model: a directory with safetensors, or a .gguf file; None is the default model (SmolLM2-135M-Instruct).
    dtype: of activations: "auto", "float32", "bfloat16", "float16" or torch's own.
    keep_quantized: on the CPU, 4- and 8-bit GGUF weights stay as they are; False unpacks them (exact, larger).
    load_format: "auto" reads the model's weights; "dummy" makes random ones from its config.json, for benchmarks.
    skip_tokenizer_init: no tokenizer is loaded; prompts are token ids, and outputs have no text.
    device: "auto" (CUDA if there is a GPU, else the CPU), "cpu", "cuda", "cuda:1", …
    max_model_len: longest prompt and output together, in tokens; None is the model's context.
    block_size: tokens in a block of the cache.
    kv_cache_memory: bytes of the cache. None takes kv_cache_memory_fraction of what is free on the device after loading
    (by default 0.9 of a GPU's, less what steps and graphs take there, which is measured; 0.25 of the host's).
    max_num_seqs, max_num_batched_tokens: most sequences and most new tokens in a step; the latter is 512 on a CPU and
    8192 on a GPU by default (at least max_num_seqs).
    enable_prefix_caching: reuse the blocks of equal prompt beginnings.
    scheduling_policy: "fcfs" or "priority".
    cuda_graphs: on a GPU, record decode steps at the start and replay them; False starts sooner and decodes slower.
    seed: of requests that bring none.
    """

    unknown_name: ClassVar[str] = "unknown option"
    known_names: ClassVar[str] = "known"

    model: str | Path | None = None
    dtype: str | torch.dtype = "auto"
    keep_quantized: bool = True
    load_format: Literal["auto", "dummy"] = "auto"
    skip_tokenizer_init: bool = False
    device: str | torch.device = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | None = None
    kv_cache_memory_fraction: float | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    cuda_graphs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("max_model_len", "kv_cache_memory", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{field}: expected an integer of at least 1, got {value!r}")
        fraction = self.kv_cache_memory_fraction
        if fraction is not None and not (type(fraction) in (int, float) and 0 < fraction <= 1):
            raise ValueError(f"kv_cache_memory_fraction: expected a number above 0 and at most 1, got {fraction!r}")
        if fraction is not None and self.kv_cache_memory is not None:
            raise ValueError("kv_cache_memory: expected this or kv_cache_memory_fraction, got both")
        for field in ("keep_quantized", "skip_tokenizer_init", "cuda_graphs"):
            if type(getattr(self, field)) is not bool:
                raise ValueError(f"{field}: expected True or False, got {getattr(self, field)!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format: expected 'auto' or 'dummy', got {self.load_format!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")

    def model_path(self) -> Path:
        return default_model_path() if self.model is None else Path(self.model)

    def torch_device(self) -> torch.device:
        """Raises ValueError for a device that is not there."""
        import torch  # here: the server's process checks options, and computes nothing

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device: {name!r} needs a CUDA GPU, and torch {torch.__version__} sees none; use device='cpu'"
            )
        return device

    def resolved_max_model_len(self, context: int) -> int:
        """The model's context, or less where the user says so; more is refused: positions beyond it are untrained."""
        if self.max_model_len is not None and self.max_model_len > context:
            raise ValueError(
                f"max_model_len: expected at most the model's context of {context} tokens, got {self.max_model_len}"
            )
        return self.max_model_len or context

    def resolved_max_num_batched_tokens(self, device: torch.device) -> int:
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(self.max_num_seqs, 512 if device.type == "cpu" else 8192)
