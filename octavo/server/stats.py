"""The engine's state as the page follows it, several times a second.

Shape of a snapshot: `Observer.snapshot` of `octavo/engine/snapshot.py`, the map in base64, and tokens_per_second.
"""

import asyncio
import base64
import time
from collections import deque

from octavo.server.engine_client import EngineClient
from octavo.server.sse import event

INTERVAL = 0.25  # seconds between two snapshots
RATE_WINDOW = 2.0  # seconds over which tokens per second are counted


class StatsFeed:
    """Asks the engine for one snapshot an interval, however many watch, and for none while nobody does."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._event = b""
        self._time = -1e9
        self._asking: asyncio.Task[bytes] | None = None
        self._rate = Rate()

    async def newest(self) -> bytes:
        """A server-sent event, at most an interval old. Raises EngineDeadError."""
        if time.monotonic() - self._time < INTERVAL / 2:
            return self._event
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bytes:
        snapshot = await self._engine.ask("snapshot")
        snapshot["map"] = base64.b64encode(snapshot["map"]).decode()
        snapshot["tokens_per_second"] = self._rate.of(self._engine.counters.generated_tokens)
        self._event, self._time = event(snapshot), time.monotonic()
        return self._event


class Rate:
    """Of a count that grows, over the last seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def of(self, count: int) -> float:
        now = time.monotonic()
        if self._points and (count < self._points[-1][1] or now - self._points[-1][0] > RATE_WINDOW):
            self._points.clear()  # a new engine, or nobody has watched
        self._points.append((now, count))
        while len(self._points) > 2 and self._points[1][0] < now - RATE_WINDOW:
            self._points.popleft()
        start, first = self._points[0]
        return (count - first) / (now - start) if now > start else 0.0
