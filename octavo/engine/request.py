"""A request and its sequences: the state that the scheduler advances and the model runner reads.

A `Request` is what the user sent. It starts with one `Sequence`; once the prompt is computed, `n` candidates (or beams)
fork from it and share its blocks copy-on-write. A sequence is prompt and output in one list: what is left to compute is
`token_ids[num_computed_tokens:]`, be it a prompt, the last sampled token, or everything again after a preemption;
nothing else distinguishes prefill from decode.
"""

import enum
import itertools
import time
from collections.abc import Iterable
from typing import Literal

from octavo.engine.outputs import PromptLogprobs, RequestMetrics
from octavo.engine.sampling_params import MAX_TOKEN_ID, BeamSearchParams, SamplingParams
from octavo.engine.step import ScheduledSequence

FinishReason = Literal["stop", "length", "abort", "error"]

_sequence_ids = itertools.count()


class SequenceStatus(enum.Enum):
    WAITING = "waiting"  # holds no blocks: new, or preempted
    RUNNING = "running"  # holds blocks
    FINISHED = "finished"  # holds no blocks (or gives them back when the step in flight is recorded)


_FINISHED = SequenceStatus.FINISHED


class Sequence:
    """One candidate of a request.

    Owned by the scheduler: only `Scheduler` (and `BlockManager` for `block_table`, `block_hashes` and
    `num_writable_tokens`) writes here. The model runner reads it between `Scheduler.schedule` and `Scheduler.update`;
    in between it does not change, even when the request is aborted.

    seq_id: unique in the process. index: which of the request's candidates. token_ids: prompt and output.
    num_pending_tokens: 1 while a step in flight samples the next token, whose place is taken but whose value is not
    known; else 0. num_computed_tokens: leading tokens whose keys and values are in the cache (or will be, by a step in
    flight that has a successor). num_cached_tokens: those that the prefix
    cache gave at the first admission. block_table: block of each block_size tokens. finish_reason, stop_reason: as in
    CompletionOutput.
    awaiting_token: of a beam search, every token is computed and the engine has not yet appended the next.
    """

    __slots__ = (
        "awaiting_token",
        "block_hashes",
        "block_table",
        "cumulative_logprob",
        "decode_entry",
        "finish_reason",
        "index",
        "max_tokens_total",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_named_blocks",
        "num_pending_tokens",
        "num_promised_blocks",
        "num_prompt_tokens",
        "num_unseen_blocks",
        "num_writable_tokens",
        "order",
        "request",
        "seq_id",
        "status",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, request: "Request", index: int, token_ids: list[int]) -> None:
        self.request = request
        self.index = index
        self.seq_id = next(_sequence_ids)
        self.token_ids = token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_pending_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the leading full blocks, as far as known
        self.num_named_blocks = 0  # leading blocks that the prefix cache knows
        self.num_promised_blocks = 0  # free blocks kept for the rest of its prompt
        self.num_unseen_blocks = 0  # leading entries of the table that are before every layer's window: given back
        self.num_writable_tokens = 0  # token slots that can be written with no further call of the block manager
        self.status = SequenceStatus.WAITING
        self.awaiting_token = False
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.max_tokens_total = 0  # prompt and output together; set when the request is added
        self.order: tuple[float, int, int] = (0.0, 0, index)  # first in this order runs first and is preempted last
        # what a decode step schedules: made once, not at each step; a beam has none, since its tokens come from outside
        self.decode_entry = None if request.is_beam_search else ScheduledSequence(self, 1, 1)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def held_blocks(self) -> list[int]:
        """A copy of the table without the entries that were given back: O(blocks)."""
        return self.block_table[self.num_unseen_blocks :]

    @property
    def output_token_ids(self) -> list[int]:
        """A copy: O(output)."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_sampled_tokens(self) -> int:
        """Output tokens, those included whose value is pending."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, index={self.index}, {self.status.value}, "
            f"computed {self.num_computed_tokens}/{self.num_tokens}, blocks={self.block_table})"
        )


class Request:
    """One prompt with its parameters. Made by the engine, advanced by the scheduler, which owns `sequences` and
    `metrics`.

    request_id: unique among the live requests. prompt_token_ids: at least one id, none negative. priority: lower runs
    first under the "priority" policy, each step worth `scheduler.PRIORITY_SECONDS` of waiting. cache_salt: requests
    share cached blocks only with those of the same salt. looks_back: the choice of its next token needs the values of
    those before it on the host (bad words, grammars, beams), so no step with it is scheduled before the last one is
    read.
    eos_token_ids: end the output unless params.ignore_eos. arrival_time: seconds of time.monotonic.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams | BeamSearchParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = _checked_prompt(prompt_token_ids)
        self.params = params
        self.is_beam_search = isinstance(params, BeamSearchParams)
        self.priority = _checked_priority(priority)
        self.cache_salt = _checked_salt(cache_salt)
        self.eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        stop_ids = params.stop_token_ids if isinstance(params, SamplingParams) else ()
        self.ending_token_ids = self.eos_token_ids | frozenset(stop_ids)
        self.looks_back = params.looks_back if isinstance(params, SamplingParams) else True
        self.sequences = [Sequence(self, 0, list(self.prompt_token_ids))]
        self.num_created_sequences = 1
        self.forked = self.num_candidates == 1  # once true, each sequence samples one token per step
        self.prompt_logprobs: PromptLogprobs = []
        self.metrics = RequestMetrics(arrival_time=time.monotonic() if arrival_time is None else arrival_time)

    @property
    def num_candidates(self) -> int:
        """Most sequences of this request that run at a time."""
        return self.params.n if isinstance(self.params, SamplingParams) else self.params.beam_width

    @property
    def finished(self) -> bool:
        """Every candidate has ended. Beams leave `sequences` when they end."""
        for seq in self.sequences:  # noqa: SIM110  (no generator: asked for each token of each stream)
            if seq.status is not _FINISHED:
                return False
        return True

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, prompt of {len(self.prompt_token_ids)}, sequences={self.sequences})"


def _checked_prompt(token_ids: Iterable[int]) -> tuple[int, ...]:
    prompt = tuple(token_ids)
    if not prompt:
        raise ValueError("prompt_token_ids: expected at least one token id, got none")
    for token in prompt:
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            raise ValueError(f"prompt_token_ids: expected integers from 0 to {MAX_TOKEN_ID}, got {token!r}")
    return prompt


def _checked_priority(priority: int) -> int:
    if type(priority) is not int or not -(2**31) <= priority < 2**31:
        raise ValueError(f"priority: expected an integer of 32 bits (lower runs first), got {priority!r}")
    return priority


def _checked_salt(salt: str | None) -> str | None:
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt: expected a string that is not empty, or None, got {salt!r}")
    return salt
