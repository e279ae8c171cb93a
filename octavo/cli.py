"""`octavo`: generate, chat, inspect, bench, serve.

Nothing heavy is imported before a command runs, so that `octavo --help` answers at once. What a user got wrong is one
line on stderr and exit code 2; Ctrl-C is exit code 130; neither shows a traceback.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo import __version__

if TYPE_CHECKING:
    from octavo.engine.sampling_params import SamplingParams
    from octavo.llm import LLM

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SAMPLING_FIELDS = {
    "temperature": (float, "randomness; 0 takes the likeliest token"),
    "top_p": (float, "draw from the likeliest tokens that have this probability together"),
    "top_k": (int, "draw from this many of the likeliest tokens; 0 is all"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest"),
    "presence_penalty": (float, "subtract from the logits of tokens that were produced"),
    "frequency_penalty": (float, "the same, times how often"),
    "repetition_penalty": (float, "divide the logits of tokens seen in prompt or output"),
    "seed": (int, "same seed, same tokens, whatever else runs"),
    "n": (int, "number of candidates"),
}


def memory_size(text: str) -> int:
    """ "4GiB", "512MB", "1000000" in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB, 512MB or 1000000, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


_SECONDS: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
_PATH: dict[str, Any] = {"metavar": "FILE"}
_MANY: dict[str, Any] = {"action": "append"}
_SERVER_FIELDS: dict[str, dict[str, Any]] = {
    "host": {"metavar": "ADDRESS", "help": "where to listen (default 127.0.0.1; 0.0.0.0 is every network)"},
    "port": {"type": int, "metavar": "N", "help": "0 takes a free one (default 8000)"},
    "api_key": {
        **_MANY,
        "metavar": "KEY",
        "help": "clients must send this; may be repeated. OCTAVO_API_KEY in the environment is another way",
    },
    "served_model_name": {**_MANY, "metavar": "NAME", "help": "what clients call the model; may be repeated"},
    "root_path": {"metavar": "PATH", "help": "prefix that a proxy in front takes away"},
    "ssl_certfile": {**_PATH, "help": "certificate, for HTTPS"},
    "ssl_keyfile": {**_PATH, "help": "its key"},
    "ssl_keyfile_password": {"metavar": "TEXT", "help": "of the key"},
    "ssl_ca_certs": {**_PATH, "help": "authorities; clients then need a certificate of theirs"},
    "allowed_origin": {**_MANY, "metavar": "URL", "help": "pages of this origin may call the API; may be repeated"},
    "max_connections": {"type": int, "metavar": "N", "help": "open at a time; more get 503 (default 8192)"},
    "max_queue": {"type": int, "metavar": "N", "help": "sequences that may wait before 429 (default 1024)"},
    "max_body": {"type": memory_size, "metavar": "SIZE", "help": "of a request (default 8MiB)"},
    "max_prompts": {"type": int, "metavar": "N", "help": "prompts in one request (default 256)"},
    "header_timeout": {**_SECONDS, "help": "for a client to send a request's head (default 20)"},
    "body_timeout": {**_SECONDS, "help": "for a client to send a request's body (default 30)"},
    "idle_timeout": {**_SECONDS, "help": "that a connection may rest between requests (default 75)"},
    "send_timeout": {**_SECONDS, "help": "that a client may leave a stream unread (default 60)"},
    "request_timeout": {**_SECONDS, "help": "for a whole answer (default 3600)"},
    "shutdown_timeout": {**_SECONDS, "help": "that answers may take to end after a signal (default 30)"},
    "stall_timeout": {**_SECONDS, "help": "without a step, after which a busy engine is unhealthy (default 120)"},
    "otlp_traces_endpoint": {"metavar": "URL", "help": "OpenTelemetry collector for traces (needs octavo[otel])"},
}


# ---- arguments -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing of the engine."""
    parser = argparse.ArgumentParser(
        prog="octavo", description="Attention that fits: run language models over a paged KV cache, on CPU or GPU."
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine decides")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_chat(commands)
    _add_inspect(commands)
    _add_bench(commands)
    _add_serve(commands)
    return parser


def _add_generate(commands: Any) -> None:
    command = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    command.set_defaults(run=run_generate)
    command.add_argument("prompt", help="the text to continue; - reads it from standard input")
    command.add_argument("--chat", action="store_true", help="ask it as a question, in the model's chat template")
    command.add_argument("--memory", action="store_true", help="print how the cache's memory was used, to the byte")
    _add_sampling(command)
    _add_engine(command)


def _add_chat(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model. "
        "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer.",
    )
    command.set_defaults(run=run_chat)
    command.add_argument("--system", metavar="TEXT", help="instructions that open the conversation")
    _add_sampling(command, leave_out=("n",))
    _add_engine(command)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="what a model is made of and what its cache costs",
        description="Architecture, parameters, types and cache of a model, and how many tokens fit in a given memory.",
    )
    command.set_defaults(run=run_inspect)
    command.add_argument("model", nargs="?", help="directory or .gguf file; the default model if left out")
    command.add_argument("--memory", type=memory_size, metavar="SIZE", help="how many tokens fit in this, e.g. 4GiB")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_engine(command, only=("dtype", "device"))


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed and memory",
        description="Measure speed: many requests at once (throughput), or one after the other (latency). "
        "Prompts are random tokens, answers are greedy and don't stop early.",
    )
    command.set_defaults(run=run_bench)
    workloads = "many requests at once, or one after the other (default throughput)"
    choices = ("throughput", "latency")
    command.add_argument("workload", nargs="?", choices=choices, default="throughput", help=workloads)
    command.add_argument("--num-prompts", type=int, default=32, metavar="N", help="requests (default 32)")
    command.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens in a prompt (default 128)")
    command.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens in an answer (default 64)")
    command.add_argument(
        "--range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths vary uniformly by this share both ways (default 0)",
    )
    command.add_argument(
        "--shared-prefix-len", type=int, default=0, metavar="N", help="tokens that half of the prompts begin with"
    )
    command.add_argument("--seed", type=int, default=0, help="of the random prompts (default 0)")
    command.add_argument("--json", metavar="FILE", help="also write the result as JSON; - prints only that")
    command.add_argument("--memory", action="store_true", help="also print the memory report of the run")
    command.add_argument("--memory-plot", metavar="FILE", help="also draw it: the block map over time (.png or .svg)")
    _add_engine(command)


def _add_serve(commands: Any) -> None:
    command = commands.add_parser(
        "serve",
        help="answer OpenAI's API over HTTP, with a page to look at",
        description="Serve a model: OpenAI's API over HTTP, and at / a page with a chat beside the live block map.",
    )
    command.set_defaults(run=run_serve)
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or .gguf file; the default model if left out"
    )
    group = command.add_argument_group("server")
    for name, fields in _SERVER_FIELDS.items():
        group.add_argument(_flag(name), **fields)
    _add_engine(command, leave_out=("model",))


def _add_sampling(command: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    group = command.add_argument_group("sampling (defaults are those of the model)")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    for name, (kind, text) in _SAMPLING_FIELDS.items():
        if name not in leave_out:
            group.add_argument(_flag(name), type=kind, metavar=kind.__name__.upper(), help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end-of-sequence token")


def _add_engine(
    command: argparse.ArgumentParser, only: Sequence[str] | None = None, leave_out: Sequence[str] = ()
) -> None:
    group = command.add_argument_group("engine")
    fields: dict[str, dict[str, Any]] = {
        "model": {"metavar": "PATH", "help": "directory of safetensors, or .gguf file (default SmolLM2-135M-Instruct)"},
        "dtype": {"choices": ("auto", "float32", "bfloat16", "float16"), "help": "of activations (default auto)"},
        "device": {"metavar": "NAME", "help": "auto, cpu, cuda, cuda:1, … (default auto)"},
        "max_model_len": {"type": int, "metavar": "N", "help": "longest prompt and answer together, in tokens"},
        "block_size": {"type": int, "metavar": "N", "help": "tokens in a block of the cache (default 16)"},
        "kv_cache_memory": {"type": memory_size, "metavar": "SIZE", "help": "memory of the cache, e.g. 2GiB"},
        "max_num_seqs": {"type": int, "metavar": "N", "help": "most sequences in a step (default 256)"},
        "max_num_batched_tokens": {"type": int, "metavar": "N", "help": "most new tokens in a step"},
        "scheduling_policy": {"choices": ("fcfs", "priority"), "help": "who runs first (default fcfs)"},
    }
    for name in fields if only is None else only:
        if name not in leave_out:
            group.add_argument(_flag(name), **fields[name])
    if only is None:
        group.add_argument(
            "--no-prefix-caching",
            dest="enable_prefix_caching",
            action="store_false",
            default=None,
            help="don't reuse the blocks of equal prompt beginnings",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_ENGINE_FIELDS = (
    *("model", "dtype", "device", "max_model_len", "block_size", "kv_cache_memory", "max_num_seqs"),
    *("max_num_batched_tokens", "scheduling_policy", "enable_prefix_caching"),
)


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those that the user said; the rest keep the library's defaults."""
    values = vars(arguments)
    return {name: values[name] for name in names if values.get(name) is not None}


def _load(arguments: argparse.Namespace) -> "LLM":
    from octavo.llm import LLM

    return LLM(**_given(arguments, _ENGINE_FIELDS))


def _sampling_params(llm: "LLM", arguments: argparse.Namespace) -> "SamplingParams":
    from octavo.engine.sampling_params import SamplingParams

    said = _given(arguments, (*_SAMPLING_FIELDS, "max_tokens", "stop", "ignore_eos"))
    return SamplingParams.from_dict({**llm.engine.generation_defaults, **said})


# ---- commands ------------------------------------------------------------------------------------------------------


def run_generate(arguments: argparse.Namespace) -> None:
    """Prints the continuation as it grows, then its speed on stderr."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    llm = _load(arguments)
    params = _sampling_params(llm, arguments)
    content = llm.chat_prompt([{"role": "user", "content": prompt}]) if arguments.chat else prompt
    recorder = llm.record_memory() if arguments.memory else None
    if params.n == 1:
        print_stream(llm, content, params)
    else:
        for candidate in llm.generate(content, params)[0].outputs:
            print(f"[{candidate.index}] {candidate.text}")
    if recorder is not None:
        print(f"\n{recorder.report()}")


def print_stream(llm: "LLM", prompt: Any, params: "SamplingParams") -> str:
    """Prints an answer as it grows, its speed on stderr; returns the answer."""
    pieces: list[str] = []
    start = first = time.perf_counter()
    before = llm.engine.num_generated_tokens
    try:
        for piece in llm.stream(prompt, params):
            if not pieces:
                first = time.perf_counter()
            pieces.append(piece)
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    tokens, end = llm.engine.num_generated_tokens - before, time.perf_counter()
    rate = f", then {(tokens - 1) / (end - first):.1f} tokens/s" if tokens > 1 and end > first else ""
    print(f"[{tokens} tokens, the first after {first - start:.2f} s{rate}]", file=sys.stderr)
    return "".join(pieces)


def run_chat(arguments: argparse.Namespace) -> None:
    """A conversation, line by line, until /exit or the end of input."""
    llm = _load(arguments)
    params = _sampling_params(llm, arguments)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print("/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            _answer(llm, messages, params)


def _answer(llm: "LLM", messages: list[dict[str, str]], params: "SamplingParams") -> None:
    """Appends the answer; an interrupted or refused question is forgotten."""
    try:
        answer = print_stream(llm, llm.chat_prompt(messages), params)
    except KeyboardInterrupt:
        messages.pop()
        print("[stopped; this question is forgotten]", file=sys.stderr)
    except ValueError as error:
        messages.pop()
        print(f"octavo: {error}", file=sys.stderr)
    else:
        messages.append({"role": "assistant", "content": answer})


def run_inspect(arguments: argparse.Namespace) -> None:
    """Prints what a model is and what its cache costs."""
    from octavo.engine.kv_cache import available_host_memory
    from octavo.engine.options import EngineOptions
    from octavo.models import load_model

    options = EngineOptions.from_dict(_given(arguments, ("model", "dtype", "device")))
    path = options.model_path()
    loaded = load_model(path, dtype=options.dtype, device=options.torch_device())
    facts: dict[str, Any] = {"path": str(path), **loaded.describe()}
    memory = available_host_memory() // 4 if arguments.memory is None else arguments.memory
    facts["cache_memory"] = memory
    facts["tokens_that_fit"] = memory // facts["kv_bytes_per_token"]
    facts["full_length_requests_that_fit"] = round(facts["tokens_that_fit"] / facts["context_length"], 2)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        for i, line in enumerate(_lines(value)):
            print(f"{name.replace('_', ' ') if i == 0 else '':<{width}}  {line}")


def _lines(value: Any) -> list[str]:
    """One fact as lines of text."""
    if isinstance(value, dict):
        return [f"{count:>13,}  {kind}" for kind, count in value.items()]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [f"{value:,}" if isinstance(value, int) else str(value)]


def run_bench(arguments: argparse.Namespace) -> None:
    """Runs a workload and prints its figures."""
    from octavo.bench import Workload, run_workload

    workload = Workload(
        concurrent=arguments.workload == "throughput",
        num_prompts=arguments.num_prompts,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        range_ratio=arguments.range_ratio,
        shared_prefix_len=arguments.shared_prefix_len,
        seed=arguments.seed,
    )
    llm = _load(arguments)
    recorder = llm.record_memory() if arguments.memory or arguments.memory_plot else None
    result = run_workload(llm, workload)
    if recorder is not None:
        result["memory"] = recorder.report().to_dict()
    if arguments.json != "-":
        for name, value in result["figures"].items():
            print(f"{name:<26} {value:>12,.4g}")
        if arguments.memory and recorder is not None:
            print(f"\n{recorder.report()}")
    if arguments.json == "-":
        print(json.dumps(result, indent=2))
    elif arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    if arguments.memory_plot and recorder is not None:
        from octavo.engine.memory_plot import plot_memory

        plot_memory(recorder, arguments.memory_plot)


def run_serve(arguments: argparse.Namespace) -> None:
    """Serves until a signal."""
    from octavo.server.serve import run
    from octavo.server.settings import ServerSettings

    said = _given(arguments, [name for name in _SERVER_FIELDS if "action" not in _SERVER_FIELDS[name]])
    keys = [*(arguments.api_key or ()), *filter(None, [os.environ.get("OCTAVO_API_KEY")])]
    settings = ServerSettings(
        api_keys=tuple(keys),
        served_model_name=tuple(arguments.served_model_name or ()),
        allowed_origins=tuple(arguments.allowed_origin or ()),
        **said,
    )
    run(settings, _given(arguments, _ENGINE_FIELDS))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("octavo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        sys.stderr.close()
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
