"""What the endpoints share: the engine, the tokenizer, the limits, and the door where requests are admitted."""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import secrets
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.engine.options import EngineOptions
from octavo.models import Tokenizer, read_tokenizer
from octavo.server.engine_client import EngineClient
from octavo.server.errors import ApiError, unavailable
from octavo.server.logprobs import TokenTexts
from octavo.server.messages import Ready
from octavo.server.metrics import Metrics
from octavo.server.settings import ServerSettings
from octavo.server.stats import StatsFeed

LONG_TEXT = 20_000  # characters, from which on a text is encoded in a thread, so that nobody waits for it
MAX_PRIORITY = 20  # a minute of waiting makes up for one step: who comes 40 minutes later overtakes nobody
RATE_WINDOW = 60.0  # seconds over which finished sequences are counted


class Service:
    """One server's state. Made before the event loop, started in it."""

    def __init__(self, settings: ServerSettings, options: dict[str, Any]) -> None:
        self.settings = settings
        checked = EngineOptions.from_dict(options)
        self.model_path = checked.model_path()
        self.engine = EngineClient(options)
        self.tokenizer: Tokenizer | None = None
        self._longest_token = 0  # characters
        if not checked.skip_tokenizer_init:
            self.tokenizer = read_tokenizer(self.model_path)
            self._longest_token = max(map(len, self.tokenizer.backend.get_vocab()))
        self.texts = TokenTexts(self.tokenizer)
        self.model_names = settings.served_model_name or (_model_name(self.model_path),)
        self.metrics = Metrics(self.engine, self.model_names[0])
        self.created = int(time.time())
        self.stopping = asyncio.Event()
        self.doors = Doors()
        self.stats = StatsFeed(self.engine)
        self._numbers = itertools.count()
        self._salt = secrets.token_bytes(32)

    async def start(self) -> None:
        """Loads the model; ValueError where it cannot be."""
        ready = await self.engine.start()
        self.doors.limit = ready.max_num_seqs + self.settings.max_queue

    async def stop(self) -> None:
        await self.engine.stop()

    @property
    def facts(self) -> Ready:
        """Of the engine that was last ready."""
        assert self.engine.ready is not None
        return self.engine.ready

    def healthy(self) -> bool:
        return self.engine.alive and self.engine.silence() < self.settings.stall_timeout

    # ---- what a request must satisfy --------------------------------------------------------------------------------

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            known = ", ".join(self.model_names)
            message = f"model: {name[:200]!r} is not served here; served: {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_priority(self, priority: int) -> None:
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise ApiError(400, f"priority: expected -{MAX_PRIORITY} to {MAX_PRIORITY}", param="priority")
        if priority and self.facts.scheduling_policy != "priority":
            raise ApiError(
                400, "priority: expected 0, since this server runs with --scheduling-policy fcfs", param="priority"
            )

    def unique(self, name: str) -> str:
        """A name for the engine, unlike any other, however often a client sends the same request id."""
        return f"{name}.{next(self._numbers)}"

    def salt(self, key: str | None, own: str | None) -> str | None:
        """The cache salt of a request: no two keys share one, and it cannot be guessed from the key."""
        if key is None and own is None:
            return None
        return hmac.digest(self._salt, f"{key or ''}\0{own or ''}".encode(), hashlib.sha256).hex()

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ApiError(400, "this server has no tokenizer; send token ids to /v1/completions", param="prompt")
        return self.tokenizer

    async def encode(self, text: str, add_special_tokens: bool, field: str) -> list[int]:
        """Token ids of a text, which must not be empty."""
        tokenizer = self.require_tokenizer()
        if not text:
            raise ApiError(400, f"{field}: expected a text of at least one character, got an empty one", param=field)
        context = self.facts.max_model_len
        if len(text) > self._longest_token * context:
            message = f"{field}: {len(text):,} characters cannot fit the context of {context} tokens"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        try:
            if len(text) < LONG_TEXT:
                return tokenizer.encode(text, add_special_tokens)
            return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from None

    def check_prompt(self, token_ids: list[int]) -> None:
        """ApiError for ids that do not exist and prompts without room for an answer."""
        vocab_size, context = self.facts.vocab_size, self.facts.max_model_len
        if not token_ids:
            raise ApiError(400, "prompt: expected at least one token, got none", param="prompt")
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise ApiError(400, f"prompt: expected token ids from 0 to {vocab_size - 1}, got {wrong}", param="prompt")
        if len(token_ids) >= context:
            raise ApiError(
                400,
                f"prompt: expected fewer than {context} tokens (the context), got {len(token_ids)}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )


class Doors:
    """Admits sequences up to a limit, and says to the others when to come back."""

    def __init__(self) -> None:
        self.limit = 0
        self.live = 0
        self._ends: deque[float] = deque(maxlen=4096)  # when the last sequences left, in seconds

    @contextlib.contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        if num_sequences > self.limit:
            raise ApiError(
                400, f"n: {num_sequences} sequences in one request; this server takes {self.limit}", param="n"
            )
        if self.live + num_sequences > self.limit:
            wait = self._wait(self.live + num_sequences - self.limit)
            raise ApiError(
                429,
                f"the queue is full ({self.live} sequences); try again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.live += num_sequences
        try:
            yield
        finally:
            self.live -= num_sequences
            self._ends.extend([time.monotonic()] * num_sequences)

    def _wait(self, excess: int) -> int:
        """Seconds until so many will have left, at the rate of the last minute; 1 to 60."""
        now = time.monotonic()
        recent = sum(now - end < RATE_WINDOW for end in self._ends)
        return max(1, min(60, round(excess * RATE_WINDOW / recent))) if recent else 5


def _model_name(path: Path) -> str:
    """What a model is called: its directory, or its file without the ending."""
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def check_alive(service: Service) -> None:
    """ApiError 503 where no engine could take a request now."""
    if service.stopping.is_set():
        raise unavailable("the server is shutting down")
    if not service.engine.alive:
        raise unavailable("the engine is being restarted; try again soon")
