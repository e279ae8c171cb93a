"""Is this grammar sound, and small enough to compile? Asked of a process of its own that may be killed.

A hostile schema can keep a compiler busy for hours in a few characters ({"multipleOf": 123456789}), and a thread
can't be stopped. So each new grammar is compiled once in a worker process first, under a wall-clock and a memory limit;
only one that passed is compiled for use. The worker starts at the first question and is replaced when it was killed.

The worker is `python -m octavo.engine.grammar_check`: a JSON object per line in, a JSON object per line out.
"""

import contextlib
import json
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from typing import Any

from octavo.engine.structured_output import StructuredOutputsParams

MAX_COMPILE_SECONDS = 3.0
_MAX_START_SECONDS = 30.0  # of the worker: it imports one library
_MAX_QUESTION_SECONDS = 60  # then the worker ends itself, should nobody be there any more to kill it
MAX_WORKER_BYTES = 2 << 30
_MAX_VERDICTS = 256
_MAX_MESSAGE_CHARS = 300

# Between tokens, JSON may have one space, or a line break with an indent. More would let a small model write blanks for
# ever.
_JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ ]?|\n[ ]{0,40}"}

# Of llguidance, per grammar: a mask that needs more work than this ends its request. About 0.1 s and 60 MB.
PARSER_LIMITS: dict[str, int] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 30_000,
    "max_grammar_size": 100_000,
}


class GrammarChecker:
    """Answers from memory, or asks its worker. Thread-safe; questions wait for each other. `close` ends the worker."""

    def __init__(self, max_seconds: float = MAX_COMPILE_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[tuple[str, str], dict[str, str]] = OrderedDict()
        self._worker: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None  # ends the worker: by `_stop`, or when nobody holds us

    def check(self, wish: StructuredOutputsParams) -> str:
        """The grammar in llguidance's own notation. Raises ValueError, naming the field, when it is not sound or not
        compiled within the bounds."""
        key = wish.kind, wish.source()
        with self._lock:
            verdict = self._verdicts.get(key) or self._ask(*key)
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if "error" in verdict:
            raise ValueError(f"structured_outputs.{wish.kind}: {verdict['error']}")
        return verdict["grammar"]

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, kind: str, source: str) -> dict[str, str]:
        worker = self._running_worker()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps({"kind": kind, "source": source}).encode() + b"\n")
            worker.stdin.flush()
            answer = self._answer(worker, self._max_seconds)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self._stop()
            return {"error": f"expected one that compiles within {self._max_seconds:g} s; simplify it"}
        if not answer:
            self._stop()
            return {"error": f"expected one that compiles within {MAX_WORKER_BYTES >> 20} MiB; simplify it"}
        verdict: dict[str, str] = json.loads(answer)
        return verdict

    def _answer(self, worker: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
        """One line; None if it does not come in time, empty if the worker ended."""
        assert worker.stdout is not None
        ready, _, _ = select.select([worker.stdout], [], [], seconds)
        return worker.stdout.readline() if ready else None

    def _running_worker(self) -> "subprocess.Popen[bytes]":
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            command = [sys.executable, "-m", "octavo.engine.grammar_check"]
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            self._end = weakref.finalize(self, _end_worker, self._worker)
            if not self._answer(self._worker, _MAX_START_SECONDS):
                self._stop()
                raise RuntimeError("the process that checks grammars did not start; its error is on stderr")
        return self._worker

    def _stop(self) -> None:
        self._worker = None
        if self._end is not None:
            self._end()


def _end_worker(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


# ---- in the worker -------------------------------------------------------------------------------------------------


def to_grammar(kind: str, source: str) -> str:
    """A wish in llguidance's notation. Raises ValueError for what can't be parsed."""
    from llguidance import LLMatcher, regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    if kind in ("json", "json_object"):
        return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(source))
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    if kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(source, 'dw')}/")  # \d and \w are ASCII's
    return LLMatcher.grammar_from_lark(any_to_lark(source))


def _verdict(kind: str, source: str) -> dict[str, str]:
    """Compiles, takes a first look at what may come, and tells."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    try:
        grammar = to_grammar(kind, source)
    except Exception as error:  # the converter of GBNF has its own kinds
        return {"error": _told(str(error))}
    limits = LLParserLimits(**PARSER_LIMITS, verbose_errors=False)  # type: ignore[arg-type]
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return {"error": _told(matcher.get_error())}
    return {"grammar": grammar}


def _told(message: str) -> str:
    message = " ".join(message.split())
    return f"the grammar was refused: {message[:_MAX_MESSAGE_CHARS]}"


def _bound_memory() -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system; the wall clock remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))


def _serve() -> None:
    _bound_memory()
    import llguidance  # noqa: F401  (before the clock runs)

    print("{}", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(_MAX_QUESTION_SECONDS)
        verdict = _verdict(question["kind"], question["source"])
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _serve()
