"""Grammars at work: which tokens may come next, for the sequences whose requests ask for a form.

llguidance parses; here are its tokenizer (made of the very bytes that our detokenizer writes, so both see one text),
the compiled grammars, and a matcher for each running sequence. A matcher's state follows from the output's tokens
alone. So it is not carried along when a sequence forks, is preempted or fails a step: it catches up with the tokens
when the next mask is wanted, and a sequence without a matcher gets a new one.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.engine.detokenizer import token_bytes_of
from octavo.engine.grammar_check import PARSER_LIMITS, GrammarChecker
from octavo.engine.request import Request
from octavo.engine.request import Sequence as SequenceState
from octavo.engine.step import ScheduledSequence
from octavo.engine.structured_output import StructuredOutputsParams
from octavo.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

GAVE_UP = "following the grammar took more work than is allowed"  # the stop_reason of an "error"
_MAX_GRAMMARS = 32  # kept compiled; each may grow to the size of its lexer, see PARSER_LIMITS

Bitmasks = dict[int, NDArray[np.int32]]  # by seq_id: (ceil(V / 32),), lowest bit first; a set bit allows the token


class GrammarCompiler:
    """Compiles wishes for one tokenizer and remembers the last of them. Thread-safe.

    vocab_size: columns of the logits. eos_token_ids: allowed where a form may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._checker = GrammarChecker()
        self._matchers: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def compile(self, wish: StructuredOutputsParams) -> "LLMatcher":
        """A matcher at the output's beginning, to be copied. Raises ValueError, naming the field, for a wish that is
        not sound or not compiled within the bounds of `grammar_check`."""
        key = wish.kind, wish.source()
        with self._lock:
            matcher = self._matchers.get(key)
            if matcher is None:
                matcher = self._matchers[key] = self._compile(wish)
            self._matchers.move_to_end(key)
            if len(self._matchers) > _MAX_GRAMMARS:
                self._matchers.popitem(last=False)
        return matcher

    def _compile(self, wish: StructuredOutputsParams) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        if not self._eos_token_ids:
            raise ValueError("structured_outputs: this model has no end-of-sequence token with which a form could end")
        grammar = self._checker.check(wish)
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
        limits = LLParserLimits(**PARSER_LIMITS, verbose_errors=False)  # type: ignore[arg-type]
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        for _ in range(2):  # a lexer that outgrew its limit in one copy says so in the next; all copies share it
            trial = matcher.deep_copy()
            trial.compute_bitmask()
        if trial.is_error():
            raise ValueError(f"structured_outputs.{wish.kind}: {GAVE_UP}; simplify it ({trial.get_error():.200})")
        return matcher

    def close(self) -> None:
        self._checker.close()


class _Wrapped:
    """A tokenizer under the names that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        known = min(vocab_size, tokenizer.vocab_size)
        spelt = token_bytes_of(tokenizer, skip_special_tokens=False)
        self._tokenizer = tokenizer
        self.tokens = [spelt[token_id] for token_id in range(known)] + [b""] * (vocab_size - known)
        self.special_token_ids = [token_id for token_id in tokenizer.special_token_ids if token_id < vocab_size]
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)


def _vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> "LLTokenizer":
    """0.3 s for 50,000 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapper = TokenizerWrapper(_Wrapped(tokenizer, vocab_size, eos_token_ids[0]))
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(eos_token_ids))


class _Progress:
    """One sequence's matcher and how many of its output tokens it has read."""

    __slots__ = ("matcher", "num_read")

    def __init__(self, matcher: "LLMatcher") -> None:
        self.matcher = matcher
        self.num_read = 0

    def catch_up(self, seq: SequenceState) -> None:
        """Reads the tokens that are new. A matcher that can't go on says so by `is_error`, from then on."""
        new = seq.token_ids[seq.num_prompt_tokens + self.num_read :]
        self.num_read += len(new)
        self.matcher.consume_tokens(new)


class GrammarStates:
    """The grammars of the live requests and how far their sequences are. Owned by one engine, used in its thread."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._grammars: dict[str, LLMatcher] = {}
        self._progress: dict[int, _Progress] = {}
        self._executor: LLExecutor | None = None

    def __len__(self) -> int:
        return len(self._grammars)

    @property
    def request_ids(self) -> Set[str]:
        return self._grammars.keys()

    def add(self, request: Request, grammar: "LLMatcher") -> None:
        self._grammars[request.request_id] = grammar

    def remove(self, request: Request) -> None:
        """Forgets a request and its sequences. Of one without a grammar, does nothing."""
        if self._grammars.pop(request.request_id, None) is not None:
            for seq in request.sequences:
                self._progress.pop(seq.seq_id, None)

    def bitmasks(self, scheduled: Sequence[ScheduledSequence]) -> tuple[Bitmasks, list[SequenceState]]:
        """What the sampling sequences of a step may draw, where their requests have a grammar; and those that can't
        go on, because the grammar's work outgrew its limits."""
        sequences = [
            entry.seq for entry in scheduled if entry.num_samples and entry.seq.request.request_id in self._grammars
        ]
        matchers = [self._up_to_date(seq) for seq in sequences]
        masks = np.empty((len(sequences), self._words), dtype=np.int32)
        if len(sequences) == 1:
            matchers[0].unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        elif sequences:
            rows = [(matcher, row) for row, matcher in enumerate(matchers)]
            self._threads().unsafe_compute_mask_ptr(rows, masks.ctypes.data, self._words * 4, len(rows))
        stuck = [seq for seq, matcher in zip(sequences, matchers, strict=True) if matcher.is_error()]
        for seq in stuck:
            reason = self._progress[seq.seq_id].matcher.get_error()
            logger.warning("Request %s: its grammar gave up: %.200s", seq.request.request_id, reason)
        return {seq.seq_id: mask for seq, mask in zip(sequences, masks, strict=True)}, stuck

    def _up_to_date(self, seq: SequenceState) -> "LLMatcher":
        progress = self._progress.get(seq.seq_id)
        if progress is None:
            grammar = self._grammars[seq.request.request_id]
            progress = self._progress[seq.seq_id] = _Progress(grammar.deep_copy())
        progress.catch_up(seq)
        return progress.matcher

    def _threads(self) -> "LLExecutor":
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        return self._executor
