"""Runs the server: uvicorn around the application, with its limits, its signals and an orderly end.

After SIGTERM or Ctrl-C nobody new is admitted, /health says so, and answers may go on for shutdown_timeout seconds;
what is left then is ended with an error that says why. A second signal ends at once.
"""

import asyncio
import logging
import resource
import socket
import ssl
import sys
from typing import Any

import h11
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.server.app import build_app
from octavo.server.errors import ApiError, unavailable
from octavo.server.guards import MAX_HEAD, head_too_large
from octavo.server.service import Service
from octavo.server.settings import ServerSettings

logger = logging.getLogger("octavo.server")

LAST_WORDS = 5.0  # seconds for the ended streams to say why


class _Config(Config):
    """Uvicorn's, with more limits."""

    max_connections: int
    header_timeout: float  # seconds
    send_timeout: float  # seconds


class _Protocol(H11Protocol):
    """Uvicorn's, which closes a connection whose request's head does not come in time, or whose other end has gone
    without a word: what was sent to it stays unacknowledged, which the system is asked to notice."""

    config: _Config
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            milliseconds = round(1000 * self.config.send_timeout)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._await_head()
        if len(self.connections) > self.config.max_connections:
            self._last_answer(unavailable(f"{self.config.max_connections} connections are open, which is the limit"))

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            self._forget_head()

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None:
            self.scope.setdefault("octavo.connection", self)  # type: ignore[typeddict-item]

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or the endless beginning of it, gets an error of the same shape as all others, too."""
        received, _ = self.conn.trailing_data
        self._last_answer(head_too_large() if len(received) > MAX_HEAD else ApiError(400, "expected HTTP/1.1"))

    def _last_answer(self, error: ApiError) -> None:
        """Closes the connection with an error, where no answer is under way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.json()
            fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            head = h11.Response(status_code=error.status, headers=[*(error.headers | fields).items()])
            events = (head, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join([self.conn.send(event) or b"" for event in events]))
        self.transport.close()

    def abort(self) -> None:
        """Closes without waiting for the client to read the rest."""
        self.transport.abort()

    def write_chunk(self, data: bytes) -> bool:
        """Sends a piece of a chunked answer that has begun, past the layers that do nothing to it; False, with nothing
        sent, where those must: the client reads slowly or is gone, or its HTTP has no chunks."""
        cycle, scope = self.cycle, self.scope
        if self.flow.write_paused or cycle.disconnected or scope["http_version"] != "1.1" or scope["method"] == "HEAD":
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.config.header_timeout, self.transport.close)

    def _forget_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class OctavoServer(Server):
    """Uvicorn's, with an engine that starts before and stops after it. address: where it listens, once started."""

    def __init__(self, config: Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.address = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        bound = _bind(self._service.settings)  # first, since loading a model takes long and a port may be taken
        try:
            if not await self._load():
                return
            self.address = _address(bound, self._service.settings)
            await super().startup([bound])
            logger.info("Listening at %s", self.address)
        finally:
            if not self.started:
                bound.close()

    async def _load(self) -> bool:
        """Starts the engine; False if a signal came first."""
        loading = asyncio.create_task(self._service.start())
        while not (loading.done() or self.should_exit):
            await asyncio.wait({loading}, timeout=0.1)
        if not loading.done():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return False
        await loading
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service = self._service
        service.stopping.set()
        loop = asyncio.get_running_loop()
        ending = loop.call_later(service.settings.shutdown_timeout, service.engine.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await service.stop()


def _bind(settings: ServerSettings) -> socket.socket:
    """A socket at the address, which does not listen yet. OSError, naming it, where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)  # asyncio sends without delay only where the protocol is named
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"host, port: {settings.host} port {settings.port} cannot be had: {error}") from None
    return bound


def _address(listener: socket.socket, settings: ServerSettings) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"


def run(settings: ServerSettings, options: dict[str, Any]) -> None:
    """Serves until a signal. options: of EngineOptions, as plain data. ValueError for what the user must change."""
    _log_to_stderr()
    _allow_many_connections()
    make_server(settings, options).run()


def make_server(settings: ServerSettings, options: dict[str, Any]) -> OctavoServer:
    """A server that has not started; its `run` blocks."""
    service = Service(settings, options)
    config = _Config(
        build_app(service),
        root_path=settings.root_path,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=settings.ssl_keyfile_password,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
        http=_Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nothing here depends on the client's address
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=round(settings.idle_timeout),
        timeout_graceful_shutdown=round(settings.shutdown_timeout + LAST_WORDS),
        lifespan="off",
    )
    config.header_timeout, config.send_timeout = settings.header_timeout, settings.send_timeout
    config.max_connections = settings.max_connections
    return OctavoServer(config, service)


def _allow_many_connections() -> None:
    """As many open files as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("octavo.server", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name.startswith("octavo") else logging.WARNING)
