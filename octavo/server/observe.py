"""What the server says of itself: health, version, models, metrics, memory, and the page's live statistics."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.server.engine_client import EngineDeadError
from octavo.server.errors import unavailable
from octavo.server.guards import json_response
from octavo.server.protocol import Health, Model, ModelList, Version
from octavo.server.service import Service, check_alive
from octavo.server.sse import EventStream
from octavo.server.stats import INTERVAL

SCRAPE_TIMEOUT = 2.0  # seconds that a scrape of the metrics waits for a report of the memory


async def health(service: Service, request: Request) -> Response:
    """200 while requests would be served; 503 while the engine is dead, stalled, or the server is shutting down."""
    status = "ok"
    if service.stopping.is_set():
        status = "stopping"
    elif not service.engine.alive:
        status = "engine restarting"
    elif not service.healthy():
        status = "engine stalled"
    return json_response(Health(status, service.engine.num_restarts), 200 if status == "ok" else 503)


async def version(service: Service, request: Request) -> Response:
    """The server's version."""
    return json_response(Version(__version__))


async def models(service: Service, request: Request) -> Response:
    """The names that `model` may take."""
    context = service.facts.max_model_len
    root = service.model_names[0]
    return json_response(ModelList([Model(name, service.created, context, root=root) for name in service.model_names]))


async def metrics(service: Service, request: Request) -> Response:
    """For Prometheus."""
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT):
            service.metrics.show_memory(await service.engine.ask("memory"))
    except (TimeoutError, EngineDeadError):
        pass  # the gauges keep their last values; octavo:engine_up tells
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def memory(service: Service, request: Request) -> Response:
    """Where every byte of the cache is: MemoryReport."""
    try:
        return json_response(await service.engine.ask("memory"))
    except EngineDeadError as error:
        raise unavailable(str(error)) from None


async def stats(service: Service, request: Request) -> Response:
    """Server-sent events, several a second: the block map and the figures beside it."""
    check_alive(service)
    return EventStream(_snapshots(service), service.settings.send_timeout)


async def _snapshots(service: Service) -> AsyncGenerator[bytes, None]:
    try:
        yield await service.stats.newest()
    except EngineDeadError as error:
        raise unavailable(str(error)) from None
    while not service.stopping.is_set():
        await asyncio.sleep(INTERVAL)
        try:
            yield await service.stats.newest()
        except EngineDeadError:
            return  # the page asks again, and learns why
