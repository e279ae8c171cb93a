"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

import re
from collections.abc import Mapping

import msgspec
from msgspec import Struct

KINDS = {  # OpenAI's error types by status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(Struct):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than 2xx. param: the field at fault. code: OpenAI's word for it, for programs. headers: travel
    with it (Retry-After, WWW-Authenticate)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorResponse(ErrorBody(message, KINDS[status], param, code))

    def json(self) -> bytes:
        return msgspec.json.encode(self.body)


_FIELD = re.compile(r"([a-z_]\w*(?:\[\d+\]|\.\w+)*): ")


def refusal(error: ValueError) -> ApiError:
    """400 for what the engine refuses; its messages begin with the field's name: `temperature: expected …`."""
    field = _FIELD.match(str(error))
    param = field[1] if field else None
    return ApiError(400, str(error), param="prompt" if param == "prompt_token_ids" else param)


def unavailable(message: str) -> ApiError:
    """503: the engine is away for a moment."""
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "2"})
