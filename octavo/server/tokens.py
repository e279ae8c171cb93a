"""POST /tokenize and /detokenize: what the model reads, without running it."""

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.chat import chat_prompt
from octavo.server.errors import ApiError
from octavo.server.guards import json_response
from octavo.server.protocol import DetokenizeRequest, Text, TokenizeRequest, Tokens
from octavo.server.service import Service


async def tokenize(service: Service, request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a prompt or of a chat's messages."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: expected either prompt or messages", param="prompt")
    if body.messages is not None:
        token_ids = await chat_prompt(service, body.messages, body.add_generation_prompt)
    else:
        assert body.prompt is not None
        token_ids = await service.encode(body.prompt, body.add_special_tokens, "prompt")
    tokenizer = service.require_tokenizer()
    names = [tokenizer.id_to_token(token) or "" for token in token_ids] if body.return_token_strs else None
    return json_response(Tokens(len(token_ids), service.facts.max_model_len, token_ids, names))


async def detokenize(service: Service, request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    service.check_model(body.model)
    vocab_size = service.facts.vocab_size
    if any(not 0 <= token < vocab_size for token in body.tokens):
        raise ApiError(400, f"tokens: expected token ids from 0 to {vocab_size - 1}", param="tokens")
    return json_response(Text(service.require_tokenizer().decode(body.tokens, body.skip_special_tokens)))
