"""/openapi.json, made from the table of endpoints and the wire types."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from octavo import __version__
from octavo.server.errors import ErrorResponse

if TYPE_CHECKING:
    from octavo.server.app import Endpoint

REF = "#/components/schemas/{name}"
EVERYWHERE = (403, 431)
ANY_BODY = (400, 408, 413, 415)  # errors of every endpoint that reads a body
DESCRIPTIONS = {
    200: "The answer",
    400: "A field is wrong; error.param names it",
    401: "No valid API key",
    403: "Called by a name that is not this machine's",
    404: "Unknown model or path",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full; Retry-After says when to come back",
    431: "The request's line and headers are too large",
    500: "A step of the engine failed",
    503: "The engine is away for a moment",
    504: "The answer took too long",
}


def document(endpoints: Iterable["Endpoint"], with_keys: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    endpoints = list(endpoints)
    types = [kind for e in endpoints for kind in (e.body, e.answer, e.chunk) if kind is not None]
    _, components = msgspec.json.schema_components([*types, ErrorResponse], ref_template=REF)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, with_keys)
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": __version__, "description": "An OpenAI-compatible API."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole


def _operation(endpoint: "Endpoint", with_keys: bool) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media: {"schema": _schema(endpoint.answer)}}
    if endpoint.chunk is not None:
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": f"Events of {endpoint.chunk.__name__}, then [DONE]"}
        }
    statuses = {*endpoint.statuses, *EVERYWHERE}
    if endpoint.body is not None:
        statuses |= {*ANY_BODY, 404}
    if with_keys and not endpoint.open:
        statuses.add(401)
    error = {"application/json": {"schema": _schema(ErrorResponse)}}
    contents = dict.fromkeys(sorted(statuses), error) | {200: content}
    if endpoint.open and 503 in statuses:
        contents[503] = content  # of /health, which says why
    responses = {str(s): {"description": DESCRIPTIONS[s], "content": told} for s, told in contents.items()}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__,
        "responses": responses,
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _schema(endpoint.body)}},
        }
    if with_keys and not endpoint.open:
        operation["security"] = [{"key": []}]
    return operation


def _schema(kind: type | None) -> dict[str, Any]:
    return {} if kind is None else {"$ref": REF.format(name=kind.__name__)}
