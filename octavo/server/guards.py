"""What stands before every endpoint, as plain ASGI: a request id and a log line, the API key, and the body's limits."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.errors import ApiError
from octavo.server.sse import ClientGone

logger = logging.getLogger("octavo.server.access")

_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")
_PLAIN = re.compile(r"[\w.,:/@+%-]+")
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_CLOSE = {"Connection": "close"}
MAX_HEAD = 32 << 10  # bytes of a request's line and headers
LINGER = 1.0  # seconds that a refused body is still read and dropped: an answer amid its sending would be lost
_COMMON_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class RequestInfo:
    """One request's own facts; `request.scope["octavo"]`. key: the API key that opened it."""

    __slots__ = ("key", "output_tokens", "prompt_tokens", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.key: str | None = None
        self.prompt_tokens = 0
        self.output_tokens = 0


def info_of(request: Request) -> RequestInfo:
    info: RequestInfo = request.scope["octavo"]
    return info


def log_line(event: str, **fields: Any) -> str:
    """`event=… name=value …`; a value that is not plain is quoted as JSON, so no value can forge a field or a line."""
    pairs = []
    for name, value in {"event": event, **fields}.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        pairs.append(f"{name}={text if _PLAIN.fullmatch(text) else json.dumps(text)}")
    return " ".join(pairs)


class RequestLog:
    """Gives each request an id (the client's, where it is plain), which goes out as x-request-id and into the log;
    answers 500 in OpenAI's shape where an endpoint raised, without its details.

    answered: called with method, path and status of each; a method or path that is none of ours is "other".
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, str, int], None], paths: frozenset[str]) -> None:
        self.app = app
        self._answered = answered
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        info = RequestInfo(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["octavo"] = info
        start, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", info.request_id.encode()),
                    *_COMMON_HEADERS,
                ]
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            logger.exception(log_line("failed", request_id=info.request_id, path=scope["path"]))
            if not status:
                error = ApiError(500, f"something failed here; the log tells more under {info.request_id}")
                await error_response(error)(scope, receive, send_with_headers)
        finally:
            self._log(scope, info, status or 499, time.monotonic() - start)

    def _log(self, scope: Scope, info: RequestInfo, status: int, seconds: float) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        method = scope["method"] if scope["method"] in METHODS else "other"  # clients must not make up labels
        self._answered(method, path if path in self._paths else "other", status)
        tokens = {}
        if info.prompt_tokens:
            tokens = {"prompt_tokens": info.prompt_tokens, "output_tokens": info.output_tokens}
        line = {"request_id": info.request_id, "method": scope["method"], "path": path, "status": status}
        logger.info(log_line("request", **line, seconds=seconds, **tokens))


class HeadCheck:
    """431 for a request's line and headers of more than MAX_HEAD bytes in all: what comes in one read is parsed whole,
    whatever its size."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _head_size(scope) > MAX_HEAD:
            await error_response(head_too_large())(scope, receive, send)
            return
        await self.app(scope, receive, send)


def head_too_large() -> ApiError:
    return ApiError(431, f"the request's line and headers are larger than {MAX_HEAD:,} bytes", headers=_CLOSE)


def _head_size(scope: Scope) -> int:
    """Bytes of a head, with one space behind each colon, as HTTP/1.1 writes it."""
    line = len(scope["method"]) + len(scope["raw_path"]) - len(scope.get("root_path", "")) + len("  HTTP/1.1\r\n")
    query = len(scope["query_string"]) + 1 if scope["query_string"] else 0
    return line + query + sum([len(name) + len(value) + 4 for name, value in scope["headers"]]) + 2


class KeyCheck:
    """401 without one of the keys, but on the open paths. Digests of equal length are compared in constant time, all
    of them, so that time tells nothing of a key."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], open_paths: frozenset[str]) -> None:
        self.app = app
        self._keys = [(key, _digest(key)) for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if not (path in self._open_paths and scope["method"] in ("GET", "HEAD")):
                key = self._key_of(Headers(scope=scope).get("authorization", ""))
                if key is None:
                    error = ApiError(
                        401,
                        "expected a valid API key: Authorization: Bearer KEY",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
                    await error_response(error)(scope, receive, send)
                    return
                scope["octavo"].key = key
        await self.app(scope, receive, send)

    def _key_of(self, authorization: str) -> str | None:
        scheme, _, given = authorization.partition(" ")
        digest, found = _digest(given.strip()), None
        for key, expected in self._keys:
            if hmac.compare_digest(digest, expected):
                found = key
        return found if scheme.lower() == "bearer" else None


class HostCheck:
    """403 for a Host that is a name other than localhost. Stands where no key protects a server that only its own
    machine should reach: a page of another site could else let its own name point here, and read our answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            if not _is_local(host):
                error = ApiError(
                    403,
                    f"Host: expected localhost or an address, got {host[:80]!r}; give the server an --api-key to let "
                    "others in",
                )
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


_HOST = re.compile(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?")  # the name without the port


def _is_local(host: str) -> bool:
    named = _HOST.fullmatch(host)
    host = (named[1] or named[2] or "") if named else host
    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def error_response(error: ApiError) -> Response:
    return Response(error.json(), error.status, error.headers, "application/json")


async def read_json(request: Request, max_body: int, timeout: float) -> bytes:
    """The body of a JSON request. ApiError 413 above max_body bytes, 408 after `timeout` seconds, 415 for another type
    (which is also what keeps a foreign page's form from being taken for a request)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type: expected application/json, got {kind[:80]!r}")
    length = request.headers.get("content-length", "")
    refused = length.isdigit() and int(length[:18]) > max_body
    if refused and "expect" in request.headers:
        raise _too_large(max_body)  # the client waits for our word before it sends
    body = bytearray()
    try:
        async with asyncio.timeout(LINGER if refused else timeout) as deadline:
            async for chunk in request.stream():
                if not refused and len(body) + len(chunk) > max_body:
                    refused = True
                    deadline.reschedule(asyncio.get_running_loop().time() + LINGER)
                if not refused:
                    body += chunk
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        if not refused:
            raise ApiError(408, f"the body did not come within {timeout:g} s", headers=_CLOSE) from None
    if refused:
        raise _too_large(max_body)
    return bytes(body)


def _too_large(max_body: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_body:,} bytes", headers=_CLOSE)


def json_response(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, media_type="application/json")
