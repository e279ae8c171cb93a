"""The application: every endpoint in one table, from which routes, checks and /openapi.json follow."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from octavo.server import chat, completions, embeddings, observe, protocol, responses, tokens
from octavo.server.errors import KINDS, ApiError
from octavo.server.guards import HeadCheck, HostCheck, KeyCheck, RequestLog, error_response, json_response, read_json
from octavo.server.openapi import document
from octavo.server.protocol import decode
from octavo.server.service import Service
from octavo.server.sse import ClientGone
from octavo.server.tracing import traced

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """handler: called with service, request and, where `body` names its type, the decoded body.

    answer: of 200; None for another media type, `media`. chunk: of the events of a stream. open: needs no key.
    statuses: errors that it may answer with, apart from those that all do.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Response]]
    body: type[Struct] | None = None
    answer: type[Struct] | None = None
    chunk: type[Struct] | None = None
    media: str = "application/json"
    open: bool = False
    statuses: tuple[int, ...] = ()

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip()


GENERATES = (429, 500, 503, 504)


async def openapi(service: Service, request: Request) -> Response:
    """This document."""
    return json_response(document(ENDPOINTS, bool(service.settings.api_keys)))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat.create_chat_completion,
        protocol.ChatRequest,
        protocol.ChatCompletion,
        protocol.ChatChunk,
        statuses=GENERATES,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions.create_completion,
        protocol.CompletionRequest,
        protocol.Completion,
        protocol.Completion,
        statuses=GENERATES,
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses.create_response,
        responses.ResponseRequest,
        responses.ResponseObject,
        responses.ResponseObject,
        statuses=GENERATES,
    ),
    Endpoint("POST", "/v1/embeddings", embeddings.create_embedding, embeddings.EmbeddingRequest),
    Endpoint("GET", "/v1/models", observe.models, answer=protocol.ModelList),
    Endpoint("POST", "/tokenize", tokens.tokenize, protocol.TokenizeRequest, protocol.Tokens),
    Endpoint("POST", "/detokenize", tokens.detokenize, protocol.DetokenizeRequest, protocol.Text),
    Endpoint("GET", "/health", observe.health, answer=protocol.Health, open=True, statuses=(503,)),
    Endpoint("GET", "/version", observe.version, answer=protocol.Version, open=True),
    Endpoint("GET", "/metrics", observe.metrics, media="text/plain"),
    Endpoint("GET", "/v1/memory", observe.memory, answer=protocol.Memory, statuses=(503,)),
    Endpoint("GET", "/v1/stats", observe.stats, media="text/event-stream", statuses=(503,)),
    Endpoint("GET", "/openapi.json", openapi),
)


def build_app(service: Service) -> Any:
    """The ASGI application of one service, which whoever runs it starts and stops."""
    page_paths = {"/", *(f"/{path.name}" for path in PAGE.iterdir())}
    paths = frozenset({endpoint.path for endpoint in ENDPOINTS} | page_paths)
    open_paths = frozenset({endpoint.path for endpoint in ENDPOINTS if endpoint.open} | page_paths)
    middleware = [
        Middleware(RequestLog, service.metrics.answered, paths),
        Middleware(HeadCheck),
        Middleware(KeyCheck, service.settings.api_keys, open_paths),
    ]
    if not service.settings.api_keys and service.settings.host in LOOPBACK:
        middleware.insert(2, Middleware(HostCheck))
    if service.settings.allowed_origins:
        cors: dict[str, Any] = {"allow_origins": service.settings.allowed_origins, "allow_methods": ["GET", "POST"]}
        middleware.insert(2, Middleware(CORSMiddleware, allow_headers=["Authorization", "Content-Type"], **cors))
    routes = [
        *(Route(e.path, _route(service, e), methods=[e.method]) for e in ENDPOINTS),
        Mount("/", _with_policy(StaticFiles(directory=PAGE, html=True))),
    ]
    handlers: Any = {ApiError: _on_api_error, HTTPException: _on_http_error, ClientGone: _on_client_gone}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    endpoint = service.settings.otlp_traces_endpoint
    return traced(app, endpoint) if endpoint else app


def _route(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    body_type, handler, settings = endpoint.body, endpoint.handler, service.settings

    async def without_body(request: Request) -> Response:
        return await handler(service, request)

    async def with_body(request: Request) -> Response:
        assert body_type is not None
        body = await read_json(request, settings.max_body, settings.body_timeout)
        return await handler(service, request, decode(body, body_type))

    return without_body if body_type is None else with_body


def _with_policy(app: StaticFiles) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"cache-control", b"no-cache"),
                ]
            await send(message)

        await app(scope, receive, send_with_policy)

    return page


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: 404 and 405."""
    status = error.status_code if error.status_code in KINDS else 400
    return error_response(ApiError(status, error.detail, headers=error.headers))


async def _on_client_gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=499)  # nobody reads it
