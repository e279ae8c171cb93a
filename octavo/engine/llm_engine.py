"""The engine: requests in, outputs out, one step at a time. Schedule, run, record.

Synchronous and single-threaded; `LLM` drives it in the caller's thread, `AsyncLLM` in one of its own. A request that is
wrong is refused by `add_request` and touches nothing else; a step that fails ends the requests in it with reason
"error", and the engine goes on.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from octavo.engine.beam_search import BeamSearch
from octavo.engine.candidate import LiveRequest
from octavo.engine.config import EngineConfig
from octavo.engine.decode_graphs import DecodeGraphs
from octavo.engine.detokenizer import TokenBytes, token_bytes_of
from octavo.engine.gpu_memory import DeviceMemory, device_memory, measure_step_memory
from octavo.engine.grammar import GAVE_UP, GrammarCompiler, GrammarStates
from octavo.engine.kv_cache import PagedKVCache, default_kv_cache_memory, kv_bytes_per_token, num_blocks_for
from octavo.engine.logit_rules import bad_word_ids
from octavo.engine.memory_report import MemoryReport, MemoryTrace, measure
from octavo.engine.model_runner import ModelRunner, StepInFlight
from octavo.engine.options import EngineOptions
from octavo.engine.outputs import RequestOutput
from octavo.engine.request import Request, SequenceStatus
from octavo.engine.request import Sequence as SequenceState
from octavo.engine.sampler import Sampler
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import SchedulerOutput, StepResult
from octavo.engine.structured_output import StructuredOutputsParams
from octavo.models import LoadedModel, load_dummy_model, load_model, read_tokenizer, weight_bytes
from octavo.models.causal_lm import CausalLM
from octavo.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)


class LLMEngine:
    """Owns scheduler, runner and the live requests.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: None serves token ids only.
        config: sizes; its num_blocks are allocated here.
        cache_dtype: of the KV cache; `CausalLM.cache_dtype` by default.
        seed: for requests that bring none.
        generation_defaults: what the model's authors recommend, under SamplingParams' names.
        run_ahead: launch a step before the last one's tokens are read, where the scheduler can; by default on a GPU.
        cuda_graphs: record the steps that only decode; False computes them eagerly.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        cache_dtype: torch.dtype | None = None,
        seed: int = 0,
        generation_defaults: Mapping[str, float] | None = None,
        run_ahead: bool | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.generation_defaults = generation_defaults or {}
        self.tokenizer = tokenizer
        self.config = config
        self.scheduler = Scheduler(config)
        self._encode = None if tokenizer is None else _plain_encoder(tokenizer)
        self._token_bytes: dict[bool, TokenBytes] = {}
        if tokenizer is not None:
            self._token_bytes = {skip: token_bytes_of(tokenizer, skip_special_tokens=skip) for skip in (True, False)}
        self._eos_token_ids = frozenset(model.config.eos_token_ids) | frozenset(
            tokenizer.eos_token_ids if tokenizer else ()
        )
        self._grammars = GrammarStates(model.config.vocab_size)
        self._gave_up: list[RequestOutput] = []  # last outputs of requests whose grammars did, in the step in flight
        self._grammar_compiler: GrammarCompiler | None = None
        if tokenizer is not None:
            self._grammar_compiler = GrammarCompiler(tokenizer, model.config.vocab_size, self._eos_token_ids)
        cache_dtype = cache_dtype or model.cache_dtype
        cache = PagedKVCache(model, config.num_blocks, config.block_size, cache_dtype, model.device)
        sampler = Sampler(model.config.vocab_size, model.device, seed, self._encode)
        bounds = {"max_num_seqs": config.max_num_seqs, "max_model_len": config.max_model_len}
        on_gpu = model.device.type == "cuda"
        graphs = None
        if on_gpu if run_ahead is None else run_ahead:
            graphs = DecodeGraphs(model, cache, **bounds, record=on_gpu and cuda_graphs)
        self.runner = ModelRunner(model, cache, sampler, **bounds, decode_graphs=graphs)
        # launched and not recorded, oldest first
        self._in_flight: deque[tuple[SchedulerOutput, StepInFlight]] = deque()
        self._live: dict[str, LiveRequest | BeamSearch] = {}
        self._attentive: set[str] = set()  # those of them that look at every token
        self.num_generated_tokens = 0  # since the start, of all requests
        self.memory_trace: MemoryTrace | None = None  # samples the cache after each step while it is set

    @classmethod
    def from_options(cls, options: EngineOptions, progress: bool = True) -> "LLMEngine":
        """Loads the model and sizes everything; the first step may follow. `progress`: a bar while it loads."""
        return cls.from_loaded(_load(options, progress), options)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, options: EngineOptions) -> "LLMEngine":
        """An engine around a model that is already loaded."""
        model = loaded.model
        max_model_len = options.resolved_max_model_len(model.config.max_position_embeddings)
        config = EngineConfig(
            num_blocks=1,  # until the memory that is there has been measured
            max_model_len=max_model_len,
            kv_bytes_per_token=kv_bytes_per_token(model, model.cache_dtype),
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.resolved_max_num_batched_tokens(model.device),
            enable_prefix_caching=options.enable_prefix_caching,
            scheduling_policy=options.scheduling_policy,
            # groups of layers with windows of their own would need block tables of their own
            sliding_window=max(model.config.layer_windows) if all(model.config.layer_windows) else 0,
        )
        memory, taken = options.kv_cache_memory, 0
        if model.device.type == "cuda":  # also where the memory is given: it compiles the kernels
            taken = measure_step_memory(model, config, cuda_graphs=options.cuda_graphs and memory is None)
        if memory is None:
            memory = default_kv_cache_memory(model.device, options.kv_cache_memory_fraction) - taken
        num_blocks = num_blocks_for(memory, config.kv_bytes_per_token, config.block_size, max_model_len)
        config = replace(config, num_blocks=num_blocks)
        return cls(
            model,
            loaded.tokenizer,
            config,
            seed=options.seed,
            generation_defaults=loaded.generation_defaults,
            cuda_graphs=options.cuda_graphs,
        )

    # ---- requests in -----------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        stream: bool = False,
        prompt_text: str | None = None,
    ) -> None:
        """Accepts one prompt, text or token ids. `stream`: `step` reports what is new after each token,
        not everything at the end.
        `prompt_text`: of token ids that came from a text, to be repeated in the output.

        Raises ValueError, naming the field, for whatever could not be served; nothing has changed then.
        """
        params = SamplingParams() if params is None else params
        if type(params) not in (SamplingParams, BeamSearchParams):
            raise ValueError(
                f"sampling_params: expected SamplingParams or BeamSearchParams, got {type(params).__name__}"
            )
        text = prompt if isinstance(prompt, str) else prompt_text
        request = Request(
            request_id,
            self.prompt_token_ids(prompt),
            params,
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=cache_salt,
            eos_token_ids=self._eos_token_ids,
        )
        if isinstance(params, SamplingParams):
            self._check_token_rules(params, request)
        grammar = self.compile_grammar(params)
        self.scheduler.add_request(request)
        if grammar is not None:
            self._grammars.add(request, grammar)
        live = self._live[request_id] = self._make_live(request, text, stream)
        if live.wants_every_token:
            self._attentive.add(request_id)

    def _make_live(self, request: Request, text: str | None, stream: bool) -> LiveRequest | BeamSearch:
        params = request.params
        if isinstance(params, BeamSearchParams):
            return BeamSearch(request, self.scheduler, text, self._token_bytes.get(True))
        token_bytes = self._token_bytes.get(params.skip_special_tokens) if params.detokenize else None
        decode = None if token_bytes is None else self._decode_token
        return LiveRequest(request, text, stream, token_bytes, decode)

    def compile_grammar(self, params: SamplingParams | BeamSearchParams) -> "LLMatcher | None":
        """What `structured_outputs` asks for, if anything. Takes up to some seconds for a new one; `add_request` then
        finds it compiled. Touches no state of a step: safe in any thread. ValueError for what is not sound."""
        wish = params.structured_outputs if isinstance(params, SamplingParams) else None
        if wish is None:
            return None
        assert isinstance(wish, StructuredOutputsParams)
        if self._grammar_compiler is None:
            raise ValueError("structured_outputs: expected none, since this engine has no tokenizer")
        return self._grammar_compiler.compile(wish)

    def prompt_token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The checked token ids of a prompt. Touches no state: safe in any thread."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: expected token ids, since this engine has no tokenizer, got text")
            token_ids = self.tokenizer.encode(prompt)
            if not token_ids:
                raise ValueError("prompt: expected a text of at least one token, got an empty one")
            return token_ids
        token_ids = list(prompt)
        vocab_size = self.model.config.vocab_size
        for position, token_id in enumerate(token_ids):
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"prompt_token_ids: expected integers from 0 to {vocab_size - 1} (the vocabulary), "
                    f"got {token_id!r} at position {position}"
                )
        return token_ids

    def _check_token_rules(self, params: SamplingParams, request: Request) -> None:
        """Ids must exist, and the rules must leave a token to draw."""
        vocab_size = self.model.config.vocab_size
        fields: dict[str, Iterable[int]] = {
            "logit_bias": params.logit_bias or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "stop_token_ids": params.stop_token_ids,
        }
        for field, ids in fields.items():
            if (highest := max(ids, default=0)) >= vocab_size:
                raise ValueError(f"{field}: expected token ids below {vocab_size} (the vocabulary), got {highest}")
        if self.tokenizer is None and (params.bad_words or params.stop):
            field = "bad_words" if params.bad_words else "stop"
            raise ValueError(f"{field}: expected none, since this engine has no tokenizer; use token ids")
        if params.allowed_token_ids is not None:
            forbidden = set(request.ending_token_ids) if params.min_tokens else set()
            if params.bad_words and self._encode:
                forbidden |= {ids[0] for ids in bad_word_ids(params.bad_words, self._encode) if len(ids) == 1}
            if forbidden.issuperset(params.allowed_token_ids):
                raise ValueError(
                    "allowed_token_ids: expected one that min_tokens (which forbids end tokens) and bad_words leave, "
                    f"got {list(params.allowed_token_ids)[:8]}"
                )

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now; its blocks are free at once, or after the step in flight. Its last output, if any."""
        live = self._live.get(request_id)
        if live is None:
            return None
        self.scheduler.abort(request_id)
        return self._close(live)

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do; a step may still be in flight when the last request has ended."""
        return bool(self._live or self._in_flight)

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Records one step; returns what is new: every streamed request that got a token, every one that finished.

        On a GPU the next step is launched before this one's tokens are read, so that it never waits for the host.
        """
        try:
            if not self._in_flight:
                self._launch(self.scheduler.schedule())
            if self.runner.runs_ahead and (ahead := self.scheduler.schedule_ahead()) is not None:
                self._launch(ahead)
            output, step = self._in_flight.popleft()
            result = step.wait()
        except Exception:
            logger.exception("A step failed; the requests in it end with an error")
            self._in_flight.clear()
            return [self._close(self._live[request.request_id]) for request in self.scheduler.fail_step()]
        outputs = self._record(self.scheduler.update(output, result), result)
        if self._gave_up:
            outputs, self._gave_up = self._gave_up + outputs, []
        if self.memory_trace is not None:
            self.memory_trace.sample()
        return outputs

    def _launch(self, output: SchedulerOutput) -> None:
        self._in_flight.append((output, self.runner.launch(output, self._token_bitmasks(output))))

    def _token_bitmasks(self, output: SchedulerOutput) -> dict[int, torch.Tensor] | None:
        """For the sequences that have a grammar. One whose grammar gave up ends here, with an error."""
        if not self._grammars:
            return None
        masks, stuck = self._grammars.bitmasks(output.scheduled)
        for seq in stuck:
            self.scheduler.finish(seq, "error", f"structured_outputs: {GAVE_UP}")
            if seq.request.finished:
                self._gave_up.append(self._close(self._live[seq.request.request_id]))
        return {seq_id: torch.from_numpy(mask) for seq_id, mask in masks.items()}

    def _record(self, rows: list[SequenceState | None], result: StepResult) -> list[RequestOutput]:
        """Text, log probabilities and stop strings of the new tokens, for the requests that look at every token."""
        attentive, finished = self._attentive, SequenceStatus.FINISHED
        touched: dict[str, LiveRequest | BeamSearch] = {}
        for row, seq in enumerate(rows):
            if seq is None:
                continue
            self.num_generated_tokens += 1
            if seq.status is finished or (attentive and seq.request.request_id in attentive):
                live = touched[seq.request.request_id] = self._live[seq.request.request_id]
                self._attend(live, seq, row, result)
        return self._outputs(touched.values())

    def _attend(self, live: LiveRequest | BeamSearch, seq: SequenceState, row: int, result: StepResult) -> None:
        """One new token of one sequence."""
        if isinstance(live, BeamSearch):
            live.offer(seq, result.top_logprobs[row])
            return
        if not live.wants_every_token:
            return
        candidate = live.candidate(seq)
        if candidate.read() is not None:
            self.scheduler.finish(seq, "stop", candidate.stop_string)
        if candidate.logprobs is not None:
            assert result.logprobs is not None
            candidate.add_logprobs(result.token_ids[row], result.logprobs[row], result.top_logprobs[row])

    def _outputs(self, touched: Iterable[LiveRequest | BeamSearch]) -> list[RequestOutput]:
        outputs = []
        now = time.monotonic()
        for live in touched:
            live.request.metrics.last_token_time = now
            if live.request.finished:
                outputs.append(self._close(live))
            elif live.stream:
                outputs.append(live.output())
        return outputs

    def _close(self, live: LiveRequest | BeamSearch) -> RequestOutput:
        """The last output of a request that has finished; nothing of it is kept."""
        del self._live[live.request.request_id]
        self._attentive.discard(live.request.request_id)
        self._grammars.remove(live.request)
        return live.output()

    def _decode_token(self, token_id: int) -> str:
        """The text of one token alone, special ones spelt out: for the reports of log probabilities."""
        return self._token_bytes[False][token_id].decode("utf-8", "replace")

    # ---- the whole -------------------------------------------------------------------------------------------------

    def memory_report(self) -> MemoryReport:
        """Where every byte of the cache is, now."""
        return measure(self.scheduler)

    def device_memory(self) -> DeviceMemory | None:
        """Where every byte of the GPU is, now; None on a CPU."""
        if self.model.device.type != "cuda":
            return None
        return device_memory(self.model.device, weight_bytes(self.model), self.runner.kv_cache.nbytes)

    def check_integrity(self) -> None:
        """Asserts that scheduler, blocks and our own records agree; for tests, between steps."""
        self.scheduler.check_integrity()
        assert self._live.keys() == self.scheduler.requests.keys(), (
            "every live request is the scheduler's, and no other"
        )
        assert self._grammars.request_ids <= self._live.keys()
        assert self._attentive <= self._live.keys(), "nothing is kept of finished requests"


def _plain_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _load(options: EngineOptions, progress: bool) -> LoadedModel:
    path, device = options.model_path(), options.torch_device()
    if options.load_format == "auto":
        return load_model(
            path,
            dtype=options.dtype,
            device=device,
            progress=progress,
            keep_quantized=options.keep_quantized,
            skip_tokenizer=options.skip_tokenizer_init,
        )
    tokenizer = None if options.skip_tokenizer_init else read_tokenizer(path)
    model = load_dummy_model(path, dtype=options.dtype, device=device, seed=options.seed)
    return LoadedModel(model, tokenizer, model.config, {}, {"random": model.config.num_parameters})
