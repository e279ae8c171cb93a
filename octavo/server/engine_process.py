"""The engine's process: one thread that reads commands between two steps, computes, and sends what is new.

Started by `EngineClient` as `python -m octavo.server.engine_process FD`; FD is its end of the socket pair. HTTP, JSON
and clients live in the other process and cannot slow a step. It ends when told to, or when the other end is gone, so no
engine outlives its server.
"""

import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from octavo.engine.llm_engine import LLMEngine
from octavo.engine.options import EngineOptions
from octavo.engine.outputs import CompletionOutput, RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.snapshot import Observer
from octavo.server.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Counters,
    FrameReader,
    FromEngine,
    Load,
    News,
    Piece,
    Ready,
    Refused,
    Step,
    Stop,
    ToEngine,
    Unable,
    decode_to_engine,
    frame,
)

logger = logging.getLogger(__name__)

RECEIVE = 1 << 20  # bytes at a time
COMPILE_POLL = 0.002  # seconds between looks at the thread that compiles grammars, while nothing else is to be done
MAX_FAILED_STEPS = 3  # in a row; a device that has failed so often does not come back without a new process


class Channel:
    """Our end of the socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._frames = FrameReader()
        self._bodies: deque[bytes] = deque()  # of frames that have come and are not read yet
        self.closed = False

    def send(self, message: FromEngine) -> None:
        self._socket.sendall(frame(message))

    def receive(self, patience: float | None) -> Iterator[ToEngine]:
        """What has come. If nothing has, waits so many seconds for it; None: until a message or the end comes."""
        while self._bodies or self._read(patience):
            while self._bodies:
                patience = 0
                yield decode_to_engine(self._bodies.popleft())

    def _read(self, patience: float | None) -> bool:
        """Reads what is there, after waiting for it if need be; False if there is nothing, or nothing more to come."""
        if self.closed or not select.select([self._socket], [], [], patience)[0]:
            return False
        data = self._socket.recv(RECEIVE)
        self.closed = not data
        self._bodies.extend(self._frames.feed(data))
        return not self.closed


class EngineProcess:
    """An engine that obeys a channel."""

    def __init__(self, engine: LLMEngine, channel: Channel) -> None:
        self.engine = engine
        self.channel = channel
        self._observer = Observer(engine.scheduler)
        self._num_steps = 0
        self._num_failed_steps = 0
        self._compiler = ThreadPoolExecutor(1, "octavo-grammars")
        self._compiling: dict[str, tuple[Add, SamplingParams, Future[Any]]] = {}

    def run(self) -> None:
        """Until told to stop, or the other end is gone. Raises RuntimeError when steps only fail."""
        engine, channel = self.engine, self.channel
        while not channel.closed:
            for message in channel.receive(self._patience()):
                if isinstance(message, Stop):
                    return
                self._obey(message)
            self._add_compiled()
            if engine.has_unfinished():
                self._step()

    def _patience(self) -> float | None:
        if self.engine.has_unfinished():
            return 0
        return COMPILE_POLL if self._compiling else None

    def _step(self) -> None:
        outputs = self.engine.step()
        self._num_steps += 1
        self._send([_news(output) for output in outputs])
        if any(o.finish_reason == "error" and o.stop_reason is None for output in outputs for o in output.outputs):
            self._num_failed_steps += 1
            if self._num_failed_steps == MAX_FAILED_STEPS:
                raise RuntimeError(f"{MAX_FAILED_STEPS} steps in a row have failed; the log above holds the reasons")
        else:
            self._num_failed_steps = 0

    def _obey(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            self._add(message)
        elif isinstance(message, Abort):
            for name in message.request_ids:
                self._compiling.pop(name, None)
            outputs = [output for name in message.request_ids if (output := self.engine.abort(name))]
            self._send([_news(output) for output in outputs])
        else:
            assert isinstance(message, Ask), message
            self.channel.send(Answer(message.number, self._answer(message)))

    def _add(self, message: Add) -> None:
        """Adds a request; one that asks for a form, when another thread has compiled that."""
        try:
            params = SamplingParams.from_dict(message.params)
        except ValueError as error:
            self.channel.send(Refused(message.request_id, str(error)))
            return
        if params.structured_outputs is None:
            self._add_ready(message, params)
        else:
            job = self._compiler.submit(self.engine.compile_grammar, params)
            self._compiling[message.request_id] = message, params, job

    def _add_compiled(self) -> None:
        for message, params, job in [*self._compiling.values()] if self._compiling else ():
            if job.done():
                del self._compiling[message.request_id]
                self._add_ready(message, params, job)

    def _add_ready(self, message: Add, params: SamplingParams, job: "Future[Any] | None" = None) -> None:
        try:
            if job is not None:
                job.result()
            self.engine.add_request(
                message.request_id,
                message.prompt_token_ids,
                params,
                priority=message.priority,
                cache_salt=message.cache_salt,
                stream=message.stream,
            )
        except ValueError as error:
            self.channel.send(Refused(message.request_id, str(error)))
        except Exception as error:  # a bug of ours must not take the others down
            logger.exception("Request %s could not be added", message.request_id)
            self.engine.scheduler.abort(message.request_id)
            self.channel.send(Refused(message.request_id, f"the engine failed to take this request: {error!r}", True))

    def _answer(self, message: Ask) -> object:
        if message.question == "snapshot":
            return self._observer.snapshot()
        if message.question == "memory":
            return self.engine.memory_report().to_dict()
        self.engine.check_integrity()
        blocks = self.engine.scheduler.blocks
        return {"num_blocks": self.engine.config.num_blocks, "num_free_blocks": blocks.num_free_blocks}

    def _send(self, news: list[News]) -> None:
        self.channel.send(Step(news, self._counters()))

    def _counters(self) -> Counters:
        scheduler = self.engine.scheduler
        blocks, cache = scheduler.blocks, scheduler.blocks.prefix_cache
        running = self._observer.num_running
        return Counters(
            running=running,
            waiting=len(scheduler.requests) - running,
            used_blocks=self.engine.config.num_blocks - blocks.num_free_blocks,
            steps=self._num_steps,
            generated_tokens=self.engine.num_generated_tokens,
            prefix_queried_tokens=cache.num_queried_tokens if cache else 0,
            prefix_hit_tokens=cache.num_hit_tokens if cache else 0,
            preemptions=scheduler.num_preemptions,
        )


def _news(output: RequestOutput) -> News:
    queued = None if output.metrics is None else output.metrics.time_in_queue
    return News(
        output.request_id,
        [_piece(candidate) for candidate in output.outputs],
        output.finished,
        output.num_cached_tokens or 0,
        queued or 0.0,
        output.prompt_logprobs,
    )


def _piece(o: CompletionOutput) -> Piece:
    return Piece(o.index, o.text, o.token_ids, o.logprobs, o.finish_reason, o.stop_reason)


def _load(channel: Channel) -> LLMEngine | None:
    """The engine that the first message asks for; None when it cannot be, which has been said then."""
    for message in channel.receive(None):
        assert isinstance(message, Load)
        try:
            options = EngineOptions.from_dict(message.options)
            engine = LLMEngine.from_options(options, progress=sys.stderr.isatty())
        except (ValueError, OSError, ImportError) as error:
            channel.send(Unable(str(error)))
            return None
        _warm_up(engine)
        channel.send(_ready(engine))
        return engine
    return None


def _warm_up(engine: LLMEngine) -> None:
    """Computes a prompt and some tokens, so that what is compiled or allocated on first use is there before the first
    user is. Leaves nothing behind. Raises RuntimeError when the model does not run."""
    length = min(8, engine.config.max_model_len - 4)
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        params = SamplingParams(temperature=temperature, max_tokens=3, ignore_eos=True, detokenize=False)
        engine.add_request(name, [0] * max(length, 1), params, cache_salt="warm-up")
    while engine.has_unfinished():
        for output in engine.step():
            if output.outputs[0].finish_reason == "error":
                raise RuntimeError("the model fails at its first step; the log above holds the reason")
    engine.scheduler.blocks.forget_prefixes()
    engine.num_generated_tokens = 0
    if (cache := engine.scheduler.blocks.prefix_cache) is not None:
        cache.num_queried_tokens = cache.num_hit_tokens = 0


def _ready(engine: LLMEngine) -> Ready:
    config = engine.config
    return Ready(
        vocab_size=engine.model.config.vocab_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        scheduling_policy=config.scheduling_policy,
        device=str(engine.model.device),
        generation_defaults=dict(engine.generation_defaults),
    )


def main(fd: int) -> int:
    """Runs an engine on the inherited socket; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when we end
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: engine: %(message)s")
    channel = Channel(socket.socket(fileno=fd))
    try:
        engine = _load(channel)
        if engine is not None:
            EngineProcess(engine, channel).run()
    except (BrokenPipeError, ConnectionResetError):
        return 1  # the server is gone
    except Exception:
        logger.exception("The engine died at %s", time.strftime("%H:%M:%S"))
        return 1
    return 0


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # at once: the device's own threads need no farewell
