"""Answers that take a while: streams of server-sent events, and waiting for an answer whose reader may leave.

Both watch the connection while they work. When the client is gone, the work is cancelled, and with it the requests in
the engine: their blocks are free before its next step.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.errors import ApiError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect a stream
]
_encode = msgspec.json.Encoder().encode


class Connection(Protocol):
    """A client's, as `scope["octavo.connection"]`: what ASGI cannot say, or says at a cost for each token."""

    def abort(self) -> None: ...

    def write_chunk(self, data: bytes) -> bool: ...


class ClientGone(Exception):
    """Nobody is left to answer."""


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; ClientGone, with the work cancelled, when the client leaves first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends what `events` yields. The headers go out with the first event, so that what fails before is an ordinary
    error; what fails later becomes the last event. send_timeout: seconds that the client may leave it unread."""

    def __init__(self, events: AsyncGenerator[bytes, None], send_timeout: float) -> None:
        self.background = None
        self.status_code = 200
        self._events = events
        self._send_timeout = send_timeout
        self._sending_since: float | None = None  # of time.monotonic
        self._write_chunk: Callable[[bytes], bool] = _never

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("octavo.connection")
        if connection is not None:
            self._write_chunk = connection.write_chunk
        try:
            await unless_gone(receive, self._pump(send))
        except ClientGone:
            if connection is not None:
                connection.abort()  # closing would wait for the client to read the rest

    async def _pump(self, send: Send) -> None:
        started = False
        with self._watched():
            async with contextlib.aclosing(self._events):
                try:
                    async for chunk in self._events:
                        if not started:
                            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                            started = True
                        if not self._write_chunk(chunk):
                            await self._send(send, chunk)
                except ApiError as error:
                    if not started:
                        raise
                    await self._send(send, event(error.body) + DONE)
            await self._send(send, b"", more=False)

    async def _send(self, send: Send, chunk: bytes, more: bool = True) -> None:
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._sending_since = None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """ClientGone when one chunk takes longer than send_timeout. Looked at now and then: a timer for each chunk
        would be a tenth of what a chunk costs."""
        loop, task, gave_up = asyncio.get_running_loop(), asyncio.current_task(), False
        assert task is not None

        def look() -> None:
            nonlocal gave_up
            since = self._sending_since
            gave_up = since is not None and time.monotonic() - since > self._send_timeout
            if gave_up:
                task.cancel()
            else:
                self._timer = loop.call_later(self._send_timeout / 2, look)

        self._timer = loop.call_later(self._send_timeout / 2, look)
        try:
            yield
        except asyncio.CancelledError:
            if gave_up:
                raise ClientGone from None
            raise
        finally:
            self._timer.cancel()


def _never(data: bytes) -> bool:
    return False
