"""What the server's process and the engine's say to each other: msgpack frames on a socket pair, never pickle.

A frame is its length in 4 bytes, little-endian, then one message. Both ends are ours and of one version: a frame that
does not decode is a bug, and ends the process that reads it.
"""

from typing import Any, Literal

import msgspec
from msgspec import Struct

from octavo.engine.outputs import Logprob

LENGTH = 4  # bytes of a frame's length

TokenLogprobs = dict[int, Logprob]
Question = Literal["snapshot", "memory", "integrity"]


# ---- to the engine -------------------------------------------------------------------------------------------------


class Load(Struct, tag="load", array_like=True):
    """The first message: EngineOptions by name."""

    options: dict[str, Any]


class Add(Struct, tag="add", array_like=True):
    """One prompt. params: of SamplingParams, checked by the sender. stream: News after each token, not only the
    last."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    stream: bool
    priority: int = 0
    cache_salt: str | None = None


class Abort(Struct, tag="abort", array_like=True):
    request_ids: list[str]


class Ask(Struct, tag="ask", array_like=True):
    """Answered between two steps."""

    number: int
    question: Question


class Stop(Struct, tag="stop", array_like=True):
    pass


ToEngine = Load | Add | Abort | Ask | Stop


# ---- from the engine -----------------------------------------------------------------------------------------------


class Ready(Struct, tag="ready", array_like=True):
    """The model is loaded."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    scheduling_policy: str
    device: str
    generation_defaults: dict[str, float]


class Unable(Struct, tag="unable", array_like=True):
    """The model cannot be loaded as asked; the user's mistake, in words."""

    reason: str


class Refused(Struct, tag="refused", array_like=True):
    """An Add that could not be served. The reason begins with the field's name, or the fault is ours."""

    request_id: str
    reason: str
    ours: bool = False


class Piece(Struct, array_like=True):
    """What is new of one candidate; as CompletionOutput."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None

    def extend(self, newer: "Piece") -> None:
        self.text += newer.text
        self.token_ids += newer.token_ids
        if self.logprobs is not None and newer.logprobs is not None:
            self.logprobs += newer.logprobs
        self.finish_reason, self.stop_reason = newer.finish_reason, newer.stop_reason


class News(Struct, array_like=True):
    """What is new of one request. queue_time: seconds before it was first scheduled. prompt_logprobs: in its first
    news, if asked for."""

    request_id: str
    pieces: list[Piece]
    finished: bool
    num_cached_tokens: int
    queue_time: float
    prompt_logprobs: list[TokenLogprobs | None] | None

    def extend(self, newer: "News") -> None:
        by_index = {piece.index: piece for piece in self.pieces}
        for piece in newer.pieces:
            if piece.index in by_index:
                by_index[piece.index].extend(piece)
            else:
                self.pieces.append(piece)
        self.finished = newer.finished


class Counters(Struct, array_like=True):
    """The engine's state after a step. running and waiting count requests; the others count since its start, but
    used_blocks, which are those that live sequences hold."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    steps: int = 0
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0


class Step(Struct, tag="step", array_like=True):
    """Sent after each step, also when it has no news: it says that the engine lives."""

    news: list[News]
    counters: Counters


class Answer(Struct, tag="answer", array_like=True):
    number: int
    value: Any


FromEngine = Ready | Unable | Refused | Step | Answer

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine) -> bytes:
    """The bytes of a message on the wire."""
    buffer = bytearray(LENGTH)
    _encoder.encode_into(message, buffer, LENGTH)
    buffer[:LENGTH] = (len(buffer) - LENGTH).to_bytes(LENGTH, "little")
    return bytes(buffer)


class FrameReader:
    """Cuts a stream of bytes into the messages' bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that `data` completes."""
        buffer, bodies = self._buffer, []
        buffer += data
        start = 0
        while len(buffer) - start >= LENGTH:
            end = start + LENGTH + int.from_bytes(buffer[start : start + LENGTH], "little")
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[start + LENGTH : end]))
            start = end
        del buffer[:start]
        return bodies
