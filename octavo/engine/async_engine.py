"""`AsyncLLM`: the engine in a thread of its own, many asyncio callers around it.

The thread alone touches the engine. Callers send it commands through a queue, which it reads between steps; it answers
by setting a mailbox and waking the caller's event loop, once per step and loop. What a reader has not yet taken from
its mailbox is merged into one output, so a slow reader misses nothing.

A caller that goes away (cancelled, or leaves its loop) aborts its request: the blocks are back before the next step.
When the engine itself dies, everyone who waits gets an EngineDeadError, and so does everyone who comes later.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from octavo.engine.llm_engine import LLMEngine
from octavo.engine.options import EngineOptions
from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineDeadError(RuntimeError):
    """The engine's thread has ended; its cause is `__cause__`."""


@dataclass(slots=True)
class _Mailbox:
    """Where one caller waits. Written in the caller's event loop only."""

    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    output: RequestOutput | None = None
    error: BaseException | None = None

    def put(self, item: RequestOutput | BaseException) -> None:
        if isinstance(item, RequestOutput):
            if self.output is None:
                self.output = item
            else:
                self.output.extend(item)
        else:
            self.error = item
        self.arrived.set()

    async def get(self) -> RequestOutput:
        await self.arrived.wait()
        self.arrived.clear()
        output, self.output = self.output, None
        if output is not None:
            return output
        assert self.error is not None
        raise self.error


@dataclass(frozen=True, slots=True)
class _Add:
    request_id: str
    mailbox: _Mailbox
    arguments: dict[str, Any]  # of LLMEngine.add_request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[LLMEngine], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class AsyncLLM:
    """For servers and other asyncio programs; options as `LLM`. Close it when done: `async with`, or `close()`."""

    def __init__(self, model: str | Path | None = None, *, progress: bool = False, **options: Any) -> None:
        self._bind(LLMEngine.from_options(EngineOptions.from_dict({"model": model, **options}), progress))

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "AsyncLLM":
        """Around an engine that is already built, and belongs to this object from now on."""
        llm = cls.__new__(cls)
        llm._bind(engine)
        return llm

    def _bind(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Add | _Abort | _Call | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}  # the thread's
        self._cause: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()  # orders commands against the thread's end: none is left unanswered
        self._request_ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    # ---- for callers -----------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """False once closed or dead."""
        return not self._closed and self._cause is None

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields what is new, in constant time for each token, ending with an output whose `finished` is set; with
        stream=False that one alone, which holds everything.

        Steps that come faster than they are read are merged. Raises ValueError, naming the field, for what cannot be
        served, EngineDeadError when the engine is not (or no longer) there. Leaving or cancelling aborts the request.
        """
        request_id = f"request-{next(self._request_ids)}" if request_id is None else request_id
        mailbox = _Mailbox(asyncio.get_running_loop())
        arguments = {
            "prompt": self._engine.prompt_token_ids(prompt),
            "prompt_text": prompt if isinstance(prompt, str) else None,
            "params": sampling_params,
            "priority": priority,
            "cache_salt": cache_salt,
            "stream": stream,
        }
        if isinstance(sampling_params, SamplingParams) and sampling_params.structured_outputs is not None:
            # `add_request` finds it compiled, so no step waits for it
            await asyncio.to_thread(self._engine.compile_grammar, sampling_params)
        self._send(_Add(request_id, mailbox, arguments))
        finished = False
        try:
            while not finished:
                try:
                    output = await mailbox.get()
                except (ValueError, EngineDeadError):
                    finished = True  # there is nothing to abort
                    raise
                finished = output.finished
                yield output
        finally:
            if not finished:
                with contextlib.suppress(EngineDeadError):
                    self._send(_Abort(request_id))

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `stream`, but every output holds the whole so far: a copy, O(output) each."""
        whole: RequestOutput | None = None
        async with contextlib.aclosing(self.stream(prompt, sampling_params, request_id, **options)) as pieces:
            async for piece in pieces:
                if whole is None:
                    whole = piece
                else:
                    whole.extend(piece)
                yield whole.copy()

    def abort(self, request_id: str) -> None:
        """Ends a request; its reader gets the last output, with finish_reason "abort". Unknown ids are ignored."""
        self._send(_Abort(request_id))

    async def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Runs `function` on the engine between two steps, in its thread: for reports and checks."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._send(_Call(function, loop, future))
        return await future

    async def check_health(self) -> None:
        """Returns when the engine has answered; raises EngineDeadError when it can't."""
        await self.call(lambda engine: None)

    def close(self) -> None:
        """Ends all requests with reason "abort", then the thread. May be called twice, and from any thread."""
        with self._lock:
            if not self._closed and self._cause is None:
                self._commands.put(_Stop())
            self._closed = True
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    def _send(self, command: _Add | _Abort | _Call) -> None:
        with self._lock:
            if self._cause is not None:
                raise EngineDeadError(f"the engine has died: {self._cause!r}") from self._cause
            if self._closed:
                raise EngineDeadError("the engine is closed")
            self._commands.put(command)

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey_commands():
                if self._engine.has_unfinished():
                    self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("The engine died")
            self._die(error)

    def _obey_commands(self) -> bool:
        """Obeys what has come; waits for a command when there is nothing to compute. False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_unfinished())
            except queue.Empty:
                return True
            if isinstance(command, _Stop):
                self._deliver([output for key in list(self._mailboxes) if (output := self._engine.abort(key))])
                return False
            self._obey(command)

    def _obey(self, command: _Add | _Abort | _Call) -> None:
        if isinstance(command, _Add):
            try:
                self._engine.add_request(command.request_id, **command.arguments)
            except ValueError as error:
                command.mailbox.loop.call_soon_threadsafe(command.mailbox.put, error)
            else:
                self._mailboxes[command.request_id] = command.mailbox
        elif isinstance(command, _Abort):
            output = self._engine.abort(command.request_id)
            self._deliver([] if output is None else [output])
        else:
            self._answer(command)

    def _answer(self, call: _Call) -> None:
        try:
            result = call.function(self._engine)
        except Exception as error:
            _wake(call.loop, _resolve, call.future, None, error)
        else:
            _wake(call.loop, _resolve, call.future, result, None)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, RequestOutput]]] = {}
        for output in outputs:
            mailbox = self._mailboxes[output.request_id]
            by_loop.setdefault(mailbox.loop, []).append((mailbox, output))
            if output.finished:
                del self._mailboxes[output.request_id]
        for loop, deliveries in by_loop.items():
            _wake(loop, _put_all, deliveries)

    def _die(self, cause: BaseException) -> None:
        with self._lock:
            self._cause = cause
        error = EngineDeadError(f"the engine has died: {cause!r}")
        error.__cause__ = cause
        for mailbox in self._mailboxes.values():
            _wake(mailbox.loop, mailbox.put, error)
        self._mailboxes.clear()
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                _wake(command.mailbox.loop, command.mailbox.put, error)
            elif isinstance(command, _Call):
                _wake(command.loop, _resolve, command.future, None, error)


def _wake(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any) -> None:
    """Runs the callback in an event loop of another thread; nobody is left to hear it when that loop has closed."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        logger.debug("a caller's event loop closed before its answer came")


def _put_all(deliveries: list[tuple[_Mailbox, RequestOutput]]) -> None:
    for mailbox, output in deliveries:
        mailbox.put(output)


def _resolve(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():  # its caller was cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
