"""`LLM`: a model that answers, in the caller's thread.

    llm = LLM()                                                # the default model; or a directory, or a .gguf file
    print(llm.generate("The capital of France is")[0].text)    # a list of prompts gives as many outputs

All requests of a call run together in one batch that grows and shrinks; their order in the result is that of the
prompts.
"""

import itertools
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from tqdm import tqdm

from octavo.engine.llm_engine import LLMEngine
from octavo.engine.memory_report import MemoryReport, MemoryTrace
from octavo.engine.options import EngineOptions
from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams
from octavo.models import Tokenizer


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: Sequence[int]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


Prompt = str | Sequence[int] | TokensPrompt | TextPrompt
Message = Mapping[str, Any]
Params = SamplingParams | BeamSearchParams


class LLM:
    """A model with its engine, for offline use. Not thread-safe; `AsyncLLM` is for servers.

    Takes the options of `EngineOptions` by name, `model` also by position; an unknown name is a ValueError with the
    nearest known one. progress: a bar while a large model loads.
    """

    def __init__(self, model: str | Path | None = None, *, progress: bool = True, **options: Any) -> None:
        self._bind(LLMEngine.from_options(EngineOptions.from_dict({"model": model, **options}), progress))

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "LLM":
        """Around an engine that is already built."""
        llm = cls.__new__(cls)
        llm._bind(engine)
        return llm

    def _bind(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._request_ids = map(str, itertools.count())
        self._newest: dict[str, RequestOutput] = {}  # outputs that their callers have not looked at yet

    @property
    def tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise ValueError("tokenizer: this engine has none; send token ids")
        return self.engine.tokenizer

    def default_params(self) -> SamplingParams:
        """SamplingParams with what the model's generation_config.json recommends; used where a call gives none."""
        return SamplingParams.from_dict(self.engine.generation_defaults)

    # ---- whole answers ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Continues one prompt or many; returns their outputs in the same order.

        Args:
            prompts: text, token ids, {"prompt": …} or {"prompt_token_ids": …}, or a list of these.
            sampling_params: one for all prompts, or one for each; `default_params()` when None.
            use_tqdm: a progress bar, if it takes longer than a second.
            priority: of all, or of each; lower runs first under scheduling_policy="priority", where a minute of waiting
                makes up for one step of it.
            cache_salt: cached prompt beginnings are shared only with calls of the same salt.

        Raises ValueError, naming the field, if any prompt cannot be served; none has run then.
        """
        items = _as_list(prompts)
        every_params = self._one_each("sampling_params", sampling_params, len(items))
        priorities = self._one_each("priority", priority, len(items))
        request_ids: list[str] = []
        try:
            for item, its_params, its_priority in zip(items, every_params, priorities, strict=True):
                request_id = next(self._request_ids)
                self.engine.add_request(
                    request_id, _content(item), its_params, priority=its_priority, cache_salt=cache_salt
                )
                request_ids.append(request_id)
            return self._run(request_ids, use_tqdm)
        finally:
            for request_id in request_ids:
                self.engine.abort(request_id)  # of those that are still there, after an error or Ctrl-C
                self._newest.pop(request_id, None)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of {"role": …, "content": …}, or a list of conversations."""
        if not messages:
            raise ValueError("messages: expected at least one message, got none")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's answer."""
        if not messages:
            raise ValueError("messages: expected at least one message, got none")
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """The likeliest continuations by beam search, best first in each output's `outputs`."""
        if type(params) is not BeamSearchParams:
            raise ValueError(f"params: expected BeamSearchParams, got {type(params).__name__}")
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    # ---- growing answers -------------------------------------------------------------------------------------------

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The continuation's text, piece by piece as it is computed. Leaving the loop early ends the request.

        Streams and `generate` calls may be interleaved: all advance with each step.
        """
        params = self.default_params() if sampling_params is None else sampling_params
        if type(params) is not SamplingParams or params.n != 1:
            raise ValueError(
                "sampling_params: expected SamplingParams with n=1 for a stream; use generate for the others"
            )
        return self._pieces(_content(prompt), params)

    def _pieces(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[str]:
        request_id = next(self._request_ids)
        self.engine.add_request(request_id, prompt, params, stream=True)
        try:
            finished = False
            while not finished:
                if request_id not in self._newest:
                    self._step()
                    continue
                output = self._newest.pop(request_id)
                finished = output.finished
                if output.outputs and output.text:
                    yield output.text
                _raise_if_failed(output)
        finally:
            self.engine.abort(request_id)
            self._newest.pop(request_id, None)

    # ---- memory ----------------------------------------------------------------------------------------------------

    def memory_report(self) -> MemoryReport:
        """Where every byte of the cache is right now: used, reserved, the wastes, cached, free. Print it."""
        return self.engine.memory_report()

    def record_memory(self) -> MemoryTrace:
        """From now on the cache is measured after each step; `report()` of what is returned sums the run up, beside
        what contiguous allocators would have taken."""
        self.engine.memory_trace = MemoryTrace(self.engine.scheduler)
        return self.engine.memory_trace

    # ---- state -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        with _interrupts_deferred():
            outputs = self.engine.step()
        for output in outputs:
            if (unread := self._newest.get(output.request_id)) is None:
                self._newest[output.request_id] = output
            else:
                unread.extend(output)

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        with tqdm(total=len(request_ids), desc="Generating", unit="request", delay=1.0, disable=not use_tqdm) as bar:
            while len(outputs) < len(request_ids):
                self._step()
                for request_id in self._newest.keys() & request_ids:
                    outputs[request_id] = self._newest.pop(request_id)
                    _raise_if_failed(outputs[request_id])
                    bar.update()
        return [outputs[request_id] for request_id in request_ids]

    def _one_each(self, field: str, value: Any, count: int) -> list[Any]:
        if value is None:
            value = self.default_params()
        if not isinstance(value, Sequence):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"{field}: expected one for all, or one for each of the {count} prompts, got {len(value)}")
        return list(value)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts: expected a prompt or a list of at least one, got {prompts!r}")
    if isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _content(prompt: Prompt) -> str | Sequence[int]:
    """The text or the token ids of one prompt."""
    field: str = "prompts"
    content: Any = prompt
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or next(iter(prompt)) not in ("prompt", "prompt_token_ids"):
            raise ValueError(
                f"prompts: expected a dict with either 'prompt' or 'prompt_token_ids', got {sorted(prompt)}"
            )
        field, content = next(iter(prompt.items()))
    if isinstance(content, str) and field != "prompt_token_ids":
        return content
    if isinstance(content, str | bytes | Mapping) or not isinstance(content, Sequence) or field == "prompt":
        expected = {"prompt": "text", "prompt_token_ids": "a list of token ids"}.get(
            field, "text or a list of token ids"
        )
        raise ValueError(f"{field}: expected {expected}, got {type(content).__name__}")
    return content


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, so that it never leaves a step half recorded."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        yield
        return
    pending: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pending:
        raise KeyboardInterrupt


def _raise_if_failed(output: RequestOutput) -> None:
    for candidate in output.outputs:
        if candidate.finish_reason == "error":
            reason = candidate.stop_reason or "the engine's step failed; its log holds the reason"
            raise RuntimeError(f"request {output.request_id}: {reason}")
