"""POST /v1/embeddings: refused in words. The families that we serve are decoders; none of them is an embedding model.

The hidden states of a chat model are no useful embedding, so nothing is served under that name.
"""

from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.errors import ApiError
from octavo.server.protocol import Strict
from octavo.server.service import Service


class EmbeddingRequest(Strict, kw_only=True):
    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


async def create_embedding(service: Service, request: Request, body: EmbeddingRequest) -> Response:
    """Refused: no model that is served here makes embeddings."""
    service.check_model(body.model)
    name = body.model or service.model_names[0]
    message = f"model: {name!r} writes text and makes no embeddings; ask an embedding model elsewhere"
    raise ApiError(400, message, param="model", code="model_not_supported")
