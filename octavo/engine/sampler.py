"""From logits to tokens, for a whole batch at once.

Order, as in vLLM: bias and masks, penalties, greedy or else temperature, min_p, top_k, top_p. Reported log
probabilities are those of the model, before all of this.

State is kept between steps and changed by differences. Each sequence in the running batch has a slot in the parameter
table; the selections that depend on who is in the batch (which rows are random, truncated, penalised) are made when the
batch changes, and a step whose batch is the last one's reuses them. When all rows are greedy, a step is one argmax.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from octavo import ops
from octavo.engine.beam_search import num_continuations
from octavo.engine.logit_rules import PenaltyTable, TokenRules, apply_bitmask
from octavo.engine.outputs import Logprob
from octavo.engine.request import Request
from octavo.engine.request import Sequence as SequenceState
from octavo.engine.sampling_math import argmax, derive_seed, sample_softmax, sample_truncated, uniforms
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams
from octavo.engine.step import ScheduledSequence, TopLogprobs
from octavo.engine.transfer import Readback, to_device

Tensor = torch.Tensor

_GREEDY_BELOW = 1e-5  # a temperature under this overflows fp32 logits; vLLM's bound
_PLAIN = SamplingParams(temperature=0.0)
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _PENALTIES = 0, 1, 2, 3, slice(4, 7)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token for each row, in order; see StepResult for the meaning of the columns."""

    token_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: dict[int, TopLogprobs]


@dataclass(frozen=True, slots=True)
class _LogprobWish:
    row: int
    count: int
    temperature: float  # 1 for sampling; that of a beam search, which ranks by its own distribution


@dataclass(slots=True)
class _Batch:
    """What follows from who is in the batch. Rows are samples: an entry with n samples has n."""

    entries: tuple[ScheduledSequence, ...]
    sequences: list[SequenceState]
    expand: Tensor | None  # (rows,) entry of each row, when some entry samples more than once
    wishes: list[_LogprobWish]
    wish_rows: Tensor  # of the wishes
    rules: list[tuple[int, TokenRules]]
    penalised: "_PenalisedRows | None"
    random: "_RandomRows | None"
    plain: "PlainRows | None"


@dataclass(slots=True)
class _PenalisedRows:
    """The rows that have penalties, as indices into the batch."""

    rows: NDArray[np.int64]
    rows_tensor: Tensor
    sequences: list[SequenceState]
    table_rows: NDArray[np.int64]  # theirs in the PenaltyTable
    penalties: Tensor  # (rows, 3) fp32


@dataclass(slots=True)
class _RandomRows:
    """The rows that draw, as indices into the batch: those that truncate (top_k, top_p) and the others."""

    rows: list[int]
    rows_tensor: Tensor
    everyone: bool
    seeds: NDArray[np.uint64]
    temperature: Tensor  # (R, 1)
    log_min_p: Tensor | None  # (R, 1)
    truncated: Tensor  # indices into rows
    plain: Tensor
    top_k: Tensor  # of the truncated
    top_p: Tensor
    device_parameters: dict[str, Tensor] | None  # on a GPU, of all rows of the batch


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Of a batch whose every row is drawn by a temperature alone (0: the likeliest token), one draw a sequence."""

    temperatures: NDArray[np.float32]
    seeds: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _DrawnLogprobs:
    """Of the rows that wish them, on their way to the host: the drawn tokens', their ranks, and the likeliest."""

    wishes: list[_LogprobWish]
    own: Readback
    ranks: Readback
    top: Readback
    top_ids: Readback


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """tokens (rows,) int64 on the device, and what is needed to report them."""

    tokens: Tensor
    logprobs: _DrawnLogprobs | None
    penalised: _PenalisedRows | None


@dataclass(slots=True)
class _Slot:
    """One sequence's parameters, made once."""

    numbers: tuple[float, ...]
    seed: int
    rules: TokenRules | None
    num_logprobs: int | None
    logprob_temperature: float = 1.0
    penalty_row: int | None = field(default=None)


class Sampler:
    """Draws the next tokens of a batch. Owned by one model runner, not thread-safe.

    Args:
        vocab_size: columns of the logits.
        device: where the logits are.
        seed: of the requests that bring none; the same engine seed and request ids give the same tokens.
        encode: text to token ids, for bad_words; None when there is no tokenizer.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._seed = seed
        self._encode = encode
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._penalties = PenaltyTable(vocab_size)
        self._batch = self._make_batch(())

    def sample(
        self,
        logits: Tensor,
        entries: Sequence[ScheduledSequence],
        token_bitmasks: Mapping[int, Tensor] | None = None,
    ) -> SampledTokens:
        """`draw`, then `report`."""
        drawn = self.draw(logits, entries, token_bitmasks)
        return self.report(drawn, drawn.tokens.tolist())

    def draw(
        self,
        logits: Tensor,
        entries: Sequence[ScheduledSequence],
        token_bitmasks: Mapping[int, Tensor] | None = None,
        pending: Tensor | None = None,
    ) -> "DrawnTokens":
        """The tokens on the device: on a GPU, requests that do not look back are drawn without waiting for it.

        Args:
        logits: (N, V) fp32, a row for each entry; overwritten.
        entries: what the scheduler wants sampled.
        token_bitmasks: by seq_id, int32 (ceil(V / 32),): only tokens whose bit is set may be drawn.
        pending: (N,) int64, each entry's newest token where its `token_ids` lack it, else −1.
        """
        batch = self._batch_of(tuple(entries))
        if batch.expand is not None:
            logits = logits[batch.expand]
            pending = None if pending is None else pending[batch.expand]
        wished = self._raw_logprobs(logits, batch) if batch.wishes else None
        self._apply_rules(logits, batch, token_bitmasks)
        if (penalised := batch.penalised) is not None:
            newest = None if pending is None else pending[penalised.rows_tensor]
            self._penalties.apply(logits, penalised.rows_tensor, penalised.table_rows, penalised.penalties, newest)
        tokens = self._draw(logits, batch)
        return DrawnTokens(tokens, None if wished is None else _drawn_logprobs(wished, tokens, batch), penalised)

    def plain_rows(self, entries: tuple[ScheduledSequence, ...]) -> PlainRows | None:
        """What these entries' tokens are drawn with, for whoever draws them in our place; None if it takes more."""
        return self._batch_of(entries).plain

    def penalises(self, entries: tuple[ScheduledSequence, ...]) -> bool:
        """Whether `draw` needs `pending` for these entries."""
        return self._batch_of(entries).penalised is not None

    def _batch_of(self, entries: tuple[ScheduledSequence, ...]) -> _Batch:
        if entries != self._batch.entries:
            self._batch = self._make_batch(entries)
        return self._batch

    def report(self, drawn: "DrawnTokens", token_ids: list[int]) -> SampledTokens:
        """What the scheduler records of them; `token_ids` are theirs, read back. In the order of the draws."""
        if (penalised := drawn.penalised) is not None:
            ids = np.array(token_ids, dtype=np.int64)[penalised.rows]
            self._penalties.record(penalised.table_rows, penalised.sequences, ids)
        if drawn.logprobs is None:
            return SampledTokens(token_ids, None, {})
        return _report(token_ids, drawn.logprobs)

    def _apply_rules(self, logits: Tensor, batch: _Batch, token_bitmasks: Mapping[int, Tensor] | None) -> None:
        for row, rules in batch.rules:
            rules.apply(logits[row], batch.sequences[row])
        if token_bitmasks:
            for row, seq in enumerate(batch.sequences):
                if (bitmask := token_bitmasks.get(seq.seq_id)) is not None:
                    apply_bitmask(logits[row], bitmask)

    def _draw(self, logits: Tensor, batch: _Batch) -> Tensor:
        random = batch.random
        if random is None:
            return argmax(logits)
        if random.device_parameters is not None:
            positions = _num_sampled_tokens(batch.sequences)
            truncates = len(random.truncated) > 0 or random.log_min_p is not None
            return ops.sample_on_device(
                logits,
                **random.device_parameters,
                positions=to_device(positions, self._device),
                truncates=truncates,
            )
        if random.everyone:
            return _draw_random(logits, random, batch.sequences)
        tokens = argmax(logits)
        sequences = [batch.sequences[row] for row in random.rows]
        tokens[random.rows_tensor] = _draw_random(logits[random.rows_tensor], random, sequences)
        return tokens

    # ---- when the batch changes ----------------------------------------------------------------------------------

    def _make_batch(self, entries: tuple[ScheduledSequence, ...]) -> _Batch:
        sequences = [entry.seq for entry in entries]
        candidates = [seq.index for seq in sequences]
        expand = None
        if any(entry.num_samples != 1 for entry in entries):
            index = [i for i, entry in enumerate(entries) for _ in range(entry.num_samples)]
            candidates = [c for entry in entries for c in range(entry.seq.index, entry.seq.index + entry.num_samples)]
            sequences = [entries[i].seq for i in index]
            expand = torch.tensor(index, dtype=torch.int64, device=self._device)
        slots = self._keep_slots(sequences, candidates)
        wishes = [
            _LogprobWish(row, slot.num_logprobs, slot.logprob_temperature)
            for row, slot in enumerate(slots)
            if slot.num_logprobs is not None
        ]
        penalised, random = self._penalised_rows(slots, sequences), self._random_rows(slots)
        rules = [(row, slot.rules) for row, slot in enumerate(slots) if slot.rules is not None]
        truncates = random is not None and (len(random.truncated) > 0 or random.log_min_p is not None)
        return _Batch(
            entries=entries,
            sequences=sequences,
            expand=expand,
            wishes=wishes,
            wish_rows=to_device(np.array([wish.row for wish in wishes], dtype=np.int64), self._device),
            rules=rules,
            penalised=penalised,
            random=random,
            plain=None if expand is not None or wishes or rules or penalised or truncates else _plain(slots, sequences),
        )

    def _keep_slots(self, sequences: list[SequenceState], candidates: list[int]) -> list[_Slot]:
        """The slots of these sequences, old or new; all others are dropped, so that nothing is kept for the dead.

        A preempted sequence's slot is dropped too: all of it follows from the request and its tokens.
        """
        old, self._slots = self._slots, {}
        slots = []
        for seq, candidate in zip(sequences, candidates, strict=True):
            key = seq.seq_id, candidate
            slot = old.pop(key, None) or self._make_slot(seq, candidate)
            self._slots[key] = slot
            slots.append(slot)
        for slot in old.values():
            if slot.penalty_row is not None:
                self._penalties.remove(slot.penalty_row)
        return slots

    def _make_slot(self, seq: SequenceState, candidate: int) -> _Slot:
        request = seq.request
        count: int | None
        if isinstance(request.params, BeamSearchParams):
            count = num_continuations(request.params, len(request.eos_token_ids))
            params, temperature = _PLAIN, request.params.temperature or 1.0
        else:
            params, count, temperature = request.params, request.params.logprobs, 1.0
        rules = TokenRules(params, request.ending_token_ids, self._vocab_size, self._device, self._encode)
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        return _Slot(
            numbers=(params.temperature, params.top_k, params.top_p, params.min_p, *penalties),
            seed=derive_seed(self._request_seed(request), candidate),
            rules=rules or None,
            num_logprobs=None if count is None else min(count, self._vocab_size),
            logprob_temperature=temperature,
            penalty_row=None if penalties == (0.0, 0.0, 1.0) else self._penalties.add(seq),
        )

    def _request_seed(self, request: Request) -> int:
        if isinstance(request.params, SamplingParams) and request.params.seed is not None:
            return request.params.seed
        digest = hashlib.blake2b(request.request_id.encode(), digest_size=8).digest()
        return derive_seed(self._seed, int.from_bytes(digest, "little"))

    def _penalised_rows(self, slots: list[_Slot], sequences: list[SequenceState]) -> _PenalisedRows | None:
        found = [(row, slot.penalty_row) for row, slot in enumerate(slots) if slot.penalty_row is not None]
        if not found:
            return None
        rows, table_rows = np.array(found, dtype=np.int64).T
        penalties = torch.tensor([slots[row].numbers[_PENALTIES] for row in rows], device=self._device)
        penalised = [sequences[row] for row in rows]
        return _PenalisedRows(rows, to_device(rows.copy(), self._device), penalised, table_rows, penalties)

    def _random_rows(self, slots: list[_Slot]) -> _RandomRows | None:
        rows = [row for row, slot in enumerate(slots) if slot.numbers[_TEMPERATURE] >= _GREEDY_BELOW]
        if not rows:
            return None
        numbers = np.array([slots[row].numbers for row in rows])
        top_k, top_p, min_p = numbers[:, _TOP_K], numbers[:, _TOP_P], numbers[:, _MIN_P]
        top_k = np.where((top_k <= 0) | (top_k > self._vocab_size), self._vocab_size, top_k).astype(np.int64)
        truncates = (top_k < self._vocab_size) | (top_p < 1)
        with np.errstate(divide="ignore"):
            log_min_p = np.log(min_p).astype(np.float32)

        def put(array: NDArray[np.generic]) -> Tensor:
            return to_device(array, self._device)

        return _RandomRows(
            rows=rows,
            rows_tensor=put(np.array(rows)),
            everyone=len(rows) == len(slots),
            seeds=np.array([slots[row].seed for row in rows], dtype=np.uint64),
            temperature=put(numbers[:, :1].astype(np.float32)),
            log_min_p=put(log_min_p[:, None]) if min_p.any() else None,
            truncated=put(np.flatnonzero(truncates)),
            plain=put(np.flatnonzero(~truncates)),
            top_k=put(top_k[truncates]),
            top_p=put(top_p[truncates]),
            device_parameters=None if self._device.type == "cpu" else self._device_parameters(slots),
        )

    def _device_parameters(self, slots: list[_Slot]) -> dict[str, Tensor]:
        """All rows', as `ops.sample_on_device` takes them."""
        numbers = np.array([slot.numbers for slot in slots])
        columns: dict[str, NDArray[np.generic]] = {
            "temperature": numbers[:, _TEMPERATURE].astype(np.float32),
            "top_k": numbers[:, _TOP_K].astype(np.int32),
            "top_p": numbers[:, _TOP_P].astype(np.float32),
            "min_p": numbers[:, _MIN_P].astype(np.float32),
            "seeds": np.array([slot.seed for slot in slots], dtype=np.uint64).view(np.int64),
        }
        return {name: to_device(column, self._device) for name, column in columns.items()}

    # ---- log probabilities ---------------------------------------------------------------------------------------

    def _raw_logprobs(self, logits: Tensor, batch: _Batch) -> Tensor:
        """(wishes, V), before any rule."""
        rows = logits[batch.wish_rows]
        if any(wish.temperature != 1 for wish in batch.wishes):
            temperatures = np.array([[wish.temperature] for wish in batch.wishes], dtype=np.float32)
            rows = rows / to_device(temperatures, self._device)
        return rows.log_softmax(-1)


def _plain(slots: list[_Slot], sequences: list[SequenceState]) -> PlainRows:
    return PlainRows(
        temperatures=np.array([slot.numbers[_TEMPERATURE] for slot in slots], dtype=np.float32),
        seeds=np.array([slot.seed for slot in slots], dtype=np.uint64).view(np.int64),
        num_prompt_tokens=np.array([seq.num_prompt_tokens for seq in sequences], dtype=np.int64),
    )


def _drawn_logprobs(logprobs: Tensor, tokens: Tensor, batch: _Batch) -> _DrawnLogprobs:
    own = logprobs.gather(1, tokens[batch.wish_rows][:, None])
    ranks = (logprobs > own).sum(1) + 1
    top, top_ids = logprobs.topk(max(wish.count for wish in batch.wishes))
    return _DrawnLogprobs(batch.wishes, *map(Readback, (own[:, 0], ranks, top, top_ids)))


def _num_sampled_tokens(sequences: list[SequenceState]) -> NDArray[np.int64]:
    return np.fromiter([seq.num_sampled_tokens for seq in sequences], np.int64, len(sequences))


def _draw_random(logits: Tensor, random: _RandomRows, sequences: list[SequenceState]) -> Tensor:
    """On the CPU; overwrites logits where there is a min_p."""
    positions = _num_sampled_tokens(sequences)
    if random.log_min_p is not None:
        least = logits.amax(-1, keepdim=True) + random.temperature * random.log_min_p
        logits.masked_fill_(logits < least, float("-inf"))
    tokens = torch.empty(len(logits), dtype=torch.int64)
    if len(rows := random.plain):
        those = logits if len(rows) == len(logits) else logits[rows]
        at = rows.numpy()
        tokens[rows] = sample_softmax(those, random.temperature[rows], random.seeds[at], positions[at])
    if len(rows := random.truncated):
        those = logits if len(rows) == len(logits) else logits[rows]
        uniform = torch.from_numpy(uniforms(random.seeds, positions))[rows]
        tokens[rows] = sample_truncated(those, random.temperature[rows], random.top_k, random.top_p, uniform)
    return tokens


def top_logprobs(logprobs: Tensor, token_id: int, count: int) -> tuple[float, TopLogprobs]:
    """Of one position (V,): the token's own log probability, and its rank with the `count` likeliest tokens."""
    own = logprobs[token_id]
    rank = int((logprobs > own).sum()) + 1
    values, ids = logprobs.topk(count)
    return float(own), TopLogprobs(ids.tolist(), values.tolist(), rank)


def token_logprobs(token_id: int, logprob: float, top: TopLogprobs) -> dict[int, Logprob]:
    """What a user gets for one position: the token itself first, then the likeliest."""
    result = {token_id: Logprob(logprob, top.rank)}
    for rank, (other, value) in enumerate(zip(top.token_ids, top.logprobs, strict=True), 1):
        result.setdefault(other, Logprob(value, rank))
    return result


def _report(token_ids: list[int], drawn: _DrawnLogprobs) -> SampledTokens:
    logprobs = [0.0] * len(token_ids)
    top = {}
    columns = (drawn.own.wait(), drawn.ranks.wait(), drawn.top.wait(), drawn.top_ids.wait())
    for wish, own, rank, values, ids in zip(drawn.wishes, *columns, strict=True):
        logprobs[wish.row] = own
        top[wish.row] = TopLogprobs(ids[: wish.count], values[: wish.count], rank)
    return SampledTokens(token_ids, logprobs, top)
