"""The server's end of the engine: starts its process, sends requests, hands out what comes back, starts it again.

Everything here runs in the event loop. What comes from the engine is put into the mailbox of whoever waits, merged with
what is still unread there, so that a slow reader costs the engine nothing. When the process ends, everyone who waits
gets an EngineDeadError at once, and a new one is started.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from octavo.server.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Counters,
    FrameReader,
    FromEngine,
    Load,
    News,
    Question,
    Ready,
    Refused,
    Step,
    Stop,
    ToEngine,
    Unable,
    decode_from_engine,
    frame,
)

logger = logging.getLogger(__name__)

LONGEST_BACKOFF = 30.0  # seconds between two attempts to start an engine that keeps dying
STEADY = 60.0  # seconds after which an engine that dies is not seen as one that keeps dying
SOCKET_BUFFER = 4 << 20  # bytes that the engine may be ahead of us before its send waits
STOP_TIMEOUT = 5.0  # seconds that the engine's process may take to end


class EngineDeadError(RuntimeError):
    """The engine's process has ended."""


class RequestFailedError(RuntimeError):
    """The engine has met a bug of ours in this request, and goes on."""


class Mailbox:
    """Where one caller waits for news of its requests."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        self.unfinished = set(request_ids)
        self._unread: dict[str, News] = {}
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, news: News) -> None:
        if news.finished:
            self.unfinished.discard(news.request_id)
        unread = self._unread.get(news.request_id)
        if unread is None:
            self._unread[news.request_id] = news
        else:
            unread.extend(news)
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[News]:
        """What is new, a request at most once; raises what `fail` was given once all news is read."""
        if not self._unread and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._unread:
            news = list(self._unread.values())
            self._unread.clear()
            return news
        assert self._error is not None
        raise self._error


class _Connection(asyncio.Protocol):
    def __init__(self, receive: Callable[[FromEngine], None]) -> None:
        self._receive = receive
        self._frames = FrameReader()
        self.lost = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._receive(decode_from_engine(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class EngineClient:
    """One engine in a process of its own, restarted when it dies.

    options: of EngineOptions, as plain data. ready: its facts, once started. counters: after its last step.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.ready: Ready | None = None
        self.counters = Counters()
        self.on_step: Callable[[Counters, Counters], None] = lambda before, now: None
        self.num_restarts = 0
        self.pid: int | None = None
        self._transport: asyncio.WriteTransport | None = None  # None while no engine is ready
        self._mailboxes: dict[str, Mailbox] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[Ready | Unable] | None = None
        self._heard = time.monotonic()

    # ---- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> Ready:
        """Starts the process and waits until its model is loaded. ValueError with the reason where it cannot be."""
        process, connection = await self._spawn()
        assert self.ready is not None
        self._supervisor = asyncio.create_task(self._supervise(process, connection))
        return self.ready

    async def stop(self) -> None:
        """Ends the process; its requests end with an EngineDeadError."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    @property
    def alive(self) -> bool:
        return self._transport is not None

    def silence(self) -> float:
        """Seconds that the engine has said nothing although it has something to compute; 0 while all is well."""
        return time.monotonic() - self._heard if self._mailboxes or self._answers else 0.0

    async def _spawn(self) -> tuple[asyncio.subprocess.Process, _Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "octavo.server.engine_process", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.pid = process.pid
        loop = asyncio.get_running_loop()
        transport, connection = await loop.create_connection(lambda: _Connection(self._receive), sock=ours)
        try:
            self._started = loop.create_future()
            transport.write(frame(Load(self.options)))
            lost = asyncio.create_task(connection.lost.wait())
            waiting: set[asyncio.Future[Any]] = {self._started, lost}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            if not self._started.done():
                raise EngineDeadError(f"the engine's process ended while it loaded, with code {await process.wait()}")
            answer = self._started.result()
            if isinstance(answer, Unable):
                raise ValueError(answer.reason)  # noqa: TRY004  (the user's value)
        except BaseException:
            transport.close()
            await _end(process)
            raise
        self.ready, self._transport, self.counters = answer, transport, Counters()
        self._heard = time.monotonic()
        return process, connection

    async def _supervise(self, process: asyncio.subprocess.Process, connection: _Connection) -> None:
        """Waits for the process's end, again and again; ends it when cancelled."""
        backoff = 0.0
        while True:
            born = time.monotonic()
            try:
                await connection.lost.wait()
            finally:
                await self._bury(process)
            logger.error("The engine's process died with code %s; starting another", process.returncode)
            backoff = 0.0 if time.monotonic() - born > STEADY else backoff
            while True:
                await asyncio.sleep(backoff)
                backoff = min(max(2 * backoff, 1.0), LONGEST_BACKOFF)
                try:
                    process, connection = await self._spawn()
                except (EngineDeadError, ValueError, OSError) as error:
                    logger.error("The engine does not start: %s; trying again in %.0f s", error, backoff)
                else:
                    break
            self.num_restarts += 1
            logger.warning("The engine is back, as process %s", process.pid)

    async def _bury(self, process: asyncio.subprocess.Process) -> None:
        transport, self._transport = self._transport, None
        error = EngineDeadError("the engine died and is being restarted; send the request again")
        for mailbox in dict.fromkeys(self._mailboxes.values()):
            mailbox.fail(error)
        self._mailboxes.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        self.counters = Counters()
        if transport is not None:
            if not transport.is_closing():
                transport.write(frame(Stop()))
            transport.close()
        await _end(process)

    # ---- requests --------------------------------------------------------------------------------------------------

    async def run(self, requests: Sequence[Add], timeout: float) -> AsyncGenerator[list[News], None]:
        """Yields what is new of these requests until all have finished, merging what was not read in time.

        Raises ValueError, naming the field, when the engine refuses one, RequestFailedError when it cannot take it for
        a fault of ours, EngineDeadError when it is not, or no longer, there, TimeoutError after `timeout` seconds.
        Leaving or cancelling aborts them all.
        """
        mailbox = Mailbox([request.request_id for request in requests])
        self._check_alive()
        if not self._mailboxes:
            self._heard = time.monotonic()
        for request in requests:
            self._mailboxes[request.request_id] = mailbox
            self._send(request)
        deadline = asyncio.get_running_loop().call_later(timeout, mailbox.fail, TimeoutError())
        try:
            while mailbox.unfinished:
                yield await mailbox.get()
        finally:
            deadline.cancel()
            left = [name for name in mailbox.unfinished if self._mailboxes.pop(name, None) is not None]
            if left and self.alive:
                self._send(Abort(left))

    def end_all(self) -> None:
        """Ends every request; their readers get the last news, with finish_reason "abort"."""
        if self.alive and self._mailboxes:
            self._send(Abort(list(self._mailboxes)))

    async def ask(self, question: Question) -> Any:
        """The engine's answer between two steps."""
        self._check_alive()
        number = next(self._numbers)
        if not self._mailboxes and not self._answers:
            self._heard = time.monotonic()
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._send(Ask(number, question))
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineDeadError("the engine is being restarted; try again soon")

    def _send(self, message: ToEngine) -> None:
        assert self._transport is not None
        self._transport.write(frame(message))

    def _receive(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Step):
            before, self.counters = self.counters, message.counters
            self.on_step(before, message.counters)
            for news in message.news:
                self._deliver(news)
        elif isinstance(message, Answer):
            answer = self._answers.get(message.number)
            if answer is not None and not answer.done():
                answer.set_result(message.value)
        elif isinstance(message, Refused):
            mailbox = self._mailboxes.pop(message.request_id, None)
            if mailbox is not None:
                mailbox.unfinished.discard(message.request_id)
                mailbox.fail((RequestFailedError if message.ours else ValueError)(message.reason))
        elif self._started is not None and not self._started.done():
            self._started.set_result(message)

    def _deliver(self, news: News) -> None:
        mailbox = self._mailboxes.get(news.request_id)
        if mailbox is None:
            return  # its reader has left
        if news.finished:
            del self._mailboxes[news.request_id]
        mailbox.put(news)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Waits for the end of a process that has been told to stop; kills one that does not."""
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
