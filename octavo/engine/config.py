"""The engine's fixed numbers: complete at construction, frozen, every contradiction refused."""

from dataclasses import dataclass
from typing import Literal, get_args

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of the paged cache and of a step.

    num_blocks: blocks in the cache. block_size: tokens in a block, any positive number.
    kv_bytes_per_token: bytes that one token takes in the cache, over all layers (K and V, or the latent).
    max_model_len: longest sequence, prompt and output together, in tokens.
    max_num_seqs: most sequences in one step. max_num_batched_tokens: most new tokens in one step, prompts' chunks and
    decodes together; at least max_num_seqs, so that every decode fits in every step.
    enable_prefix_caching: reuse the blocks of equal prompt beginnings. scheduling_policy: "fcfs", or "priority" (lowest
    number first, but a minute of waiting makes up for one step, so that nobody starves). sliding_window: tokens that
    every layer sees at most, the token itself included; blocks before them are given back. 0 where some layer sees all.
    """

    num_blocks: int
    max_model_len: int
    kv_bytes_per_token: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    sliding_window: int = 0

    def __post_init__(self) -> None:
        for field in (
            "num_blocks",
            "max_model_len",
            "kv_bytes_per_token",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}: expected an integer of at least 1, got {value!r}")
        if isinstance(self.sliding_window, bool) or not isinstance(self.sliding_window, int) or self.sliding_window < 0:
            raise ValueError(
                f"sliding_window: expected an integer of at least 0 (0: none), got {self.sliding_window!r}"
            )
        if type(self.enable_prefix_caching) is not bool:
            raise ValueError(f"enable_prefix_caching: expected True or False, got {self.enable_prefix_caching!r}")
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            raise ValueError(f"scheduling_policy: expected 'fcfs' or 'priority', got {self.scheduling_policy!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: expected at least max_num_seqs ({self.max_num_seqs}), so that each running "
                f"sequence gets a token in each step, got {self.max_num_batched_tokens}; raise it or lower max_num_seqs"
            )

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.kv_bytes_per_token

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def max_sequence_len(self) -> int:
        """Longest sequence that can finish here, in tokens: the context, or the whole cache and one last token that is
        never stored."""
        return min(self.max_model_len, self.cache_tokens + 1)
