"""What passes between the scheduler and the model runner: one step's work and its result.

The contract of a step:

1. `Scheduler.schedule()` decides it and lends the named sequences and their blocks to the runner until
   `Scheduler.update(output, result)`.
2. The runner performs `block_copies` first, as if all sources were read before any destination is written (in order is
   right, too).
3. In each layer it stores the keys and values of *all* new tokens of the step before any of them attends: a sequence
   may share, through the prefix cache, blocks that another sequence fills in the very same step.
4. It samples for the entries with `num_samples` > 0, in order.
5. A block that is freed meanwhile is not given to anyone before `update`. A step that failed ends with
   `Scheduler.fail_step` instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from octavo.engine.outputs import Logprob
    from octavo.engine.request import Sequence


class ScheduledSequence(NamedTuple):
    """Compute tokens seq.token_ids[seq.num_computed_tokens :][:num_new_tokens], at those positions, into
    seq.block_table.

    num_samples: tokens to sample after the last of them; 0 for a chunk that does not reach the sequence's end, n when
    it ends a prompt with n candidates, else 1. A beam search needs the 2 · beam_width likeliest tokens in
    `StepResult.top_logprobs` instead.
    """

    seq: "Sequence"
    num_new_tokens: int
    num_samples: int

    @property
    def samples(self) -> bool:
        return self.num_samples > 0


class BlockCopy(NamedTuple):
    """Copy-on-write: copy the block src to dst, in all layers, before the step."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. `preempted` sequences lost their blocks, so a runner drops whatever it keeps for them; then it reads
    `scheduled`, where one of them may already stand again."""

    scheduled: tuple[ScheduledSequence, ...]
    block_copies: tuple[BlockCopy, ...]
    preempted: tuple["Sequence", ...]
    num_batched_tokens: int


class TopLogprobs(NamedTuple):
    """The likeliest tokens of one sampled position, best first. rank: that of the sampled token, from 1."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(frozen=True, slots=True)
class PromptChunkLogprobs:
    """Log probabilities of the prompt's positions start, start + 1, … (position 0 has none: its entry is None)."""

    seq: "Sequence"
    start: int
    logprobs: list[dict[int, "Logprob"] | None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner sampled, in columns: a row for each sample, in the order of `SchedulerOutput.scheduled`.

    An entry with num_samples = n owns n consecutive rows. Columns, not an object per token: at 256 sequences the
    objects would cost more than the scheduler. token_ids: one for each row (of a beam's row, ignored). logprobs: log
    probability of that token, or None where no request wants any. top_logprobs: by row, for requests that want
    alternatives and for beams.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: Mapping[int, TopLogprobs] = field(default_factory=dict)
    prompt_logprobs: tuple[PromptChunkLogprobs, ...] = ()
