"""Our server under load, beside llama.cpp's and transformers', and beside our own engine without a server.

    python benchmarks/serving.py load --url http://127.0.0.1:8000 --clients 1 8 32 64     # any OpenAI-style server
    python benchmarks/serving.py compare [--peer-python PATH] [--transformers DIR] [--json out.json]
    python benchmarks/serving.py idle --connections 1000                                  # what idle clients cost

`load` is closed-loop: so many clients, each with one streaming completion after another, for --seconds; then what is
still under way is read to its end. Every prompt is another one, of --prompt-words random words. Reported: output
tokens/s (by usage where the server tells it, else by events), time to first token, and time between events, p50 and
p99. `compare` starts each server in turn, on the default model with the same number of threads; ours twice, once as
`octavo serve` and once as the bare engine with the same prompts and lengths, whose ratio is the cost of serving.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

TEXT = "the a of and to in hen fox rain river stone light old small quick over under when where then who why green"
WORDS = TEXT.split()
START_SECONDS = 180


def make_prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


# ---- one client ----------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """HTTP/1.1 over one socket, as little as streams need: the load must not take the server's processor."""

    def __init__(self, url: str, key: str | None = None, wake_at: int = 1) -> None:
        """wake_at: bytes that must have come before the system wakes us; more than 1 for one answer only."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = f"Host: {self._host}\r\nContent-Type: application/json\r\n"
        if key:
            self._head += f"Authorization: Bearer {key}\r\n"
        if wake_at > 1:
            self._head += "Connection: close\r\n"  # whose end wakes us, too
        self._wake_at = wake_at
        self._transport: asyncio.Transport | None = None
        self._forget()

    def _forget(self) -> None:
        self._data = bytearray()  # that has come and is not read
        self._lost, self._ended = False, False  # the connection; the answer
        self._length: int | None = None  # of the answer; None: it comes in chunks
        self._see: Callable[[bytes], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    # ---- asyncio's side

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._see is not None:
            for piece in self._pieces():
                self._see(piece)
            if not self._ended:
                return
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _more(self) -> None:
        if self._lost:
            raise ConnectionError("the server closed the connection")
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    # ---- a client's side

    async def open(self) -> asyncio.Transport:
        if self._transport is None:
            self._forget()
            self._transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: self, self._host, self._port
            )
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self._wake_at)
        return self._transport

    def close(self) -> None:
        """At once, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()
        self._transport = None

    async def send(self, method: str, path: str, body: Any = None) -> int:
        """Sends a request and reads the answer's head: its status. A connection that the server has closed since the
        last answer is opened again."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n\r\n".encode()
        fresh = self._transport is None
        try:
            return await self._send(head + data)
        except ConnectionError:
            self.close()
            if fresh:
                raise
            return await self._send(head + data)

    async def _send(self, data: bytes) -> int:
        (await self.open()).write(data)
        while (end := self._data.find(b"\r\n\r\n")) < 0:
            await self._more()
        status, *fields = bytes(self._data[:end]).lower().split(b"\r\n")
        del self._data[: end + 4]
        told = dict(field.split(b": ", 1) for field in fields if b": " in field)
        self._ended = False
        self._length = None if b"transfer-encoding" in told else int(told.get(b"content-length", 0))
        return int(status.split()[1])

    def _pieces(self) -> Iterator[bytes]:
        """Those of the body that have come."""
        data = self._data
        if self._length is not None:
            if len(data) >= self._length:
                self._ended = True
                yield bytes(data[: self._length])
                del data[: self._length]
            return
        while not self._ended and (end := data.find(b"\r\n")) >= 0:
            size = int(bytes(data[:end]).split(b";")[0], 16)
            start, stop = end + 2, end + 2 + size
            if len(data) < stop + 2:
                return
            piece = bytes(data[start:stop])
            del data[: stop + 2]
            if size:
                yield piece
            else:
                self._ended = True

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's pieces as they come."""
        while True:
            for piece in self._pieces():
                yield piece
            if self._ended:
                return
            await self._more()

    async def read(self, see: Callable[[bytes], None]) -> None:
        """The same, each given to `see` by the event loop itself: a third of the cost."""
        self._see = see
        try:
            self.data_received(b"")
            while not self._ended:
                await self._more()
        finally:
            self._see = None

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])


# ---- load ----------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What one level of load measured; times in seconds."""

    clients: int
    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def summary(self) -> dict[str, float]:
        def quantile(values: list[float], q: float) -> float:
            return sorted(values)[min(len(values) - 1, int(q * len(values)))] * 1e3 if values else float("nan")

        return {
            "clients": self.clients,
            "requests": self.requests,
            "output_tokens_per_s": round(self.rate, 1),
            "ttft_ms_p50": round(quantile(self.first, 0.5), 1),
            "ttft_ms_p99": round(quantile(self.first, 0.99), 1),
            "between_ms_p50": round(quantile(self.between, 0.5), 2),
            "between_ms_p99": round(quantile(self.between, 0.99), 2),
        }


@dataclass(frozen=True)
class Plan:
    """How a server is asked. chat: by /v1/chat/completions. extra: fields that only this server needs. wake_at: bytes
    of an answer that a client lets come together before it reads them."""

    url: str
    seconds: float
    prompt_words: int = 48
    max_tokens: int = 64
    chat: bool = False
    model: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    wake_at: int = 1

    def body(self, prompt: str) -> dict[str, Any]:
        text = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        options = {"max_tokens": self.max_tokens, "temperature": 0.0, "stream": True}
        usage = {"stream_options": {"include_usage": True}}
        return {**text, **options, **usage, **({"model": self.model} if self.model else {}), **self.extra}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


async def run_load(plan: Plan, clients: int, requests_each: int | None = None) -> Load:
    """So many clients for plan.seconds, or for so many requests each."""
    load = Load(clients)
    start = time.perf_counter()
    await asyncio.gather(*(_client(plan, load, start, number, requests_each) for number in range(clients)))
    load.seconds = time.perf_counter() - start
    return load


async def _client(plan: Plan, load: Load, start: float, number: int, requests_each: int | None) -> None:
    rng = random.Random(f"{plan.url}{load.clients}{number}{start}")
    connection = Connection(plan.url, wake_at=plan.wake_at)
    done = 0
    try:
        while done < requests_each if requests_each else time.perf_counter() - start < plan.seconds:
            await _completion(connection, plan, make_prompt(rng, plan.prompt_words), load)
            done += 1
    finally:
        connection.close()


async def _completion(connection: Connection, plan: Plan, prompt: str, load: Load) -> None:
    asked = last = time.perf_counter()
    status = await connection.send("POST", plan.path, plan.body(prompt))
    if status != 200:
        raise RuntimeError(f"{plan.url} answered {status}: {(await connection.body())[:500]!r}")
    events, told = 0, 0

    def see(chunk: bytes) -> None:
        nonlocal events, told, last
        now = time.perf_counter()
        if b'"completion_tokens"' in chunk:
            told = _usage(chunk) or told
        if not _has_text(chunk):
            return
        (load.between if events else load.first).append(now - (last if events else asked))
        events, last = events + 1, now

    await connection.read(see)
    load.tokens += told or events
    load.requests += 1


def _has_text(chunk: bytes) -> bool:
    return b'"text":' in chunk or (b'"content":' in chunk and b'"content":""' not in chunk.replace(b" ", b""))


def _usage(chunk: bytes) -> int:
    for line in chunk.splitlines():
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage")
            if usage:
                return int(usage["completion_tokens"])
    return 0


Watch = Callable[[], AbstractContextManager[list[float]]]


def measure(plan: Plan, levels: list[int], watch: Watch = lambda: nullcontext([])) -> list[dict[str, float]]:
    """A table of load levels, after a short warm-up. watch: `others_share`, where the server is a child of ours."""
    asyncio.run(run_load(plan, 2, requests_each=1))
    rows = []
    for clients in levels:
        with watch() as share:
            rows.append(asyncio.run(run_load(plan, clients)).summary())
        if share:
            rows[-1]["others_took"] = round(share[0], 3)
        print("  ", rows[-1], flush=True)
    return rows


# ---- servers -------------------------------------------------------------------------------------------------------


@contextmanager
def server(command: list[str], url: str, path: str = "/health") -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, once it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url + path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:4]} did not start (exit code {process.poll()})")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def octavo_command(port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "octavo", "serve", "--port", str(port), *options]


LLAMA = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_parallel, p.n_ctx = sys.argv[1], int(sys.argv[2]), 64, 64 * 1024
p.kv_unified, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = True, int(sys.argv[3]), int(sys.argv[3])
server = xllamacpp.Server(p)
print(server.listening_address, flush=True)
while True: time.sleep(1)
"""

ENGINE = """
import json, sys, time, torch
from octavo import LLM, SamplingParams
torch.set_num_threads(int(sys.argv[1]))
llm = LLM(max_num_seqs=int(sys.argv[2]), max_model_len=1024, kv_cache_memory=1 << 30)
params = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
for line in sys.stdin:
    prompts = json.loads(line)
    start = time.perf_counter()
    if isinstance(prompts, str):
        next(llm.stream(prompts, params))
        print(json.dumps([time.perf_counter() - start, 1]), flush=True)
        continue
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, sum(len(o.outputs[0].token_ids) for o in outputs)]), flush=True)
"""


Generate = Callable[[list[str] | str], tuple[float, int]]


@contextmanager
def bare_engine(threads: int, clients: int, max_tokens: int) -> Iterator[tuple["subprocess.Popen[bytes]", Generate]]:
    """A process with an engine, and what asks it: seconds and tokens of `LLM.generate` with all prompts at once, or
    seconds to the first text of one prompt."""
    command = [sys.executable, "-c", ENGINE, str(threads), str(clients), str(max_tokens)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def generate(prompts: list[str] | str) -> tuple[float, int]:
        stdin.write(json.dumps(prompts).encode() + b"\n")
        stdin.flush()
        seconds, tokens = json.loads(stdout.readline())
        return seconds, tokens

    try:
        yield process, generate
    finally:
        process.kill()
        process.wait()


PARTS = ("octavo", "llama.cpp", "transformers", "first-byte", "overhead")
LATE = 8192  # bytes; about 40 tokens


@contextmanager
def others_share() -> Iterator[list[float]]:
    """The share of all processors' time that went to other processes than this one and its children, meanwhile."""
    import psutil

    def now() -> tuple[float, float, float]:
        busy = psutil.cpu_times()
        own = [psutil.Process(), *psutil.Process().children(recursive=True)]
        mine = sum(sum(process.cpu_times()[:2]) for process in own)
        return time.monotonic(), sum(busy) - busy.idle - busy.iowait - busy.guest - busy.guest_nice, mine

    share: list[float] = []
    before = now()
    yield share
    seconds, busy, mine = (after - then for after, then in zip(now(), before, strict=True))
    share.append((busy - mine) / (seconds * psutil.cpu_count()))


class Job:
    """Work whose processes run in turn with those of other jobs. work: gives its tokens. rate: tokens/s, counting the
    time of its own turns only."""

    def __init__(self, process: "subprocess.Popen[bytes]", work: Callable[[], int]) -> None:
        import psutil

        whole = psutil.Process(process.pid)
        self._processes = [whole, *whole.children(recursive=True)]
        self._work = work
        self._ended = threading.Event()
        self._tokens, self._seconds = 0, 0.0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._tokens = self._work()
        self._end = time.perf_counter()
        self._ended.set()

    def begin(self) -> None:
        for process in self._processes:
            process.suspend()
        self._thread.start()

    def turn(self, seconds: float) -> None:
        """Runs so long, or to its end."""
        start = time.perf_counter()
        for process in self._processes:
            process.resume()
        over = self._ended.wait(seconds)
        for process in self._processes:
            process.suspend()
        self._seconds += (self._end if over else time.perf_counter()) - start

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def rate(self) -> float:
        return self._tokens / self._seconds

    def leave(self) -> None:
        self._thread.join()
        for process in self._processes:
            process.resume()


TURN = 0.5  # seconds; the machine's own speed drifts by a tenth in minutes


def overhead(threads: int, port: int, clients: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """The served rate over the engine's own, for the same work: streams, one for each client, all begun at once, beside
    `LLM.generate` of as many prompts. Each has its processes; they run in turns of half a second.

    Twice, since the clients take the engine's processors, too: with clients that read each token as it comes, and with
    clients that read when LATE bytes have come, which cost next to nothing: the rest is the server's own."""
    rng = random.Random(clients)
    rates: dict[str, list[float]] = {"engine": [], "served": [], "served_read_late": []}
    plan = Plan(f"http://127.0.0.1:{port}", 0, max_tokens=max_tokens, extra={"ignore_eos": True})
    late = replace(plan, url=f"http://127.0.0.1:{port + 1}", wake_at=LATE)
    options = ("--max-model-len", "1024", "--max-num-seqs", str(clients), "--kv-cache-memory", "1GiB")

    def prompts() -> list[str]:
        return [make_prompt(rng, plan.prompt_words) for _ in range(clients)]

    def stream(how: Plan) -> int:
        return asyncio.run(run_load(how, clients, requests_each=1)).tokens

    with (
        server(octavo_command(port, *options), plan.url) as first,
        server(octavo_command(port + 1, *options), late.url) as second,
        bare_engine(threads, clients, max_tokens) as (engine, generate),
    ):
        generate(prompts()[:1])
        for how in (plan, late):
            asyncio.run(run_load(how, 2, requests_each=1))
        for _ in range(rounds):
            work = prompts()
            jobs = {
                "engine": Job(engine, lambda work=work: round(generate(work)[1])),
                "served": Job(first, lambda: stream(plan)),
                "served_read_late": Job(second, lambda: stream(late)),
            }
            with others_share() as share:
                for job in jobs.values():
                    job.begin()
                while any(not job.ended for job in jobs.values()):
                    for job in jobs.values():
                        if not job.ended:
                            job.turn(TURN)
                for job in jobs.values():
                    job.leave()
            told = {name: round(job.rate, 1) for name, job in jobs.items()}
            print("  ", told, "others took", round(share[0], 3), flush=True)
            for name, rate in told.items():
                rates[name].append(rate)
    engine_rates = rates["engine"]

    def ratio(name: str) -> float:
        return round(statistics.median(mine / own for mine, own in zip(rates[name], engine_rates, strict=True)), 3)

    return {"tokens_per_s": rates, "ratio": ratio("served"), "ratio_read_late": ratio("served_read_late")}


def first_byte(threads: int, port: int, count: int = 60) -> dict[str, float]:
    """Milliseconds to the first text of an idle engine, and to the first byte of an idle server's stream, median of
    `count` prompts each, in turn."""
    url = f"http://127.0.0.1:{port}"
    plan = Plan(url, 0, max_tokens=2, extra={"ignore_eos": True})
    rng = random.Random(count)
    engine, served = [], []

    async def ask(connection: Connection) -> float:
        start = time.perf_counter()
        await connection.send("POST", plan.path, plan.body(make_prompt(rng, plan.prompt_words)))
        seconds = time.perf_counter() - start
        await connection.body()
        return seconds

    async def alternate(generate: Generate) -> None:
        connection = Connection(url)
        for number in range(count + 5):
            told = generate(make_prompt(rng, plan.prompt_words))[0], await ask(connection)
            if number >= 5:  # everything is touched by now
                engine.append(told[0])
                served.append(told[1])
        connection.close()

    command = octavo_command(port, "--max-model-len", "1024")
    with server(command, url), bare_engine(threads, 8, plan.max_tokens) as (_, generate):
        asyncio.run(alternate(generate))
    apart = sorted(mine - theirs for mine, theirs in zip(served, engine, strict=True))
    told = {"engine_ttft_ms": engine, "served_ttfb_ms": served, "difference_ms": apart}
    return {name: round(1e3 * statistics.median(values), 2) for name, values in told.items()}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each server in turn, all levels."""
    threads, port = arguments.threads, arguments.port
    url = f"http://127.0.0.1:{port}"
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "threads": threads, "seconds": arguments.seconds}
    levels = arguments.clients
    if "octavo" in arguments.only:
        print("octavo serve", flush=True)
        with server(octavo_command(port, "--max-model-len", "1024"), url):
            report["octavo"] = measure(Plan(url, arguments.seconds, extra={"ignore_eos": True}), levels, others_share)
    if "llama.cpp" in arguments.only and arguments.peer_python:
        from octavo.models import default_model_path

        print("llama.cpp", flush=True)
        command = [arguments.peer_python, "-c", LLAMA, str(default_model_path()), str(port), str(threads)]
        with server(command, url):
            plan = Plan(url, arguments.seconds, extra={"ignore_eos": True, "cache_prompt": False})
            report["llama.cpp"] = measure(plan, levels, others_share)
    if "transformers" in arguments.only and arguments.transformers:
        print("transformers serve", flush=True)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", arguments.transformers]
        command += ["--port", str(port), "--device", "cpu", *arguments.transformers_option]
        with server(command, url):
            plan = Plan(url, arguments.seconds, model=arguments.transformers)
            report["transformers"] = measure(plan, levels, others_share)
    if "first-byte" in arguments.only:
        report["first_byte"] = first_byte(threads, port)
        print("   ", report["first_byte"], flush=True)
    if "overhead" in arguments.only:
        report["overhead"] = overhead(threads, port, max(levels), arguments.max_tokens, arguments.rounds)
        print("   ", report["overhead"], flush=True)
    return report


# ---- idle connections ----------------------------------------------------------------------------------------------


def idle(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory and throughput of our server without and with idle keep-alive connections."""
    url = f"http://127.0.0.1:{arguments.port}"
    with server(octavo_command(arguments.port, "--max-model-len", "1024"), url) as process:
        return asyncio.run(_idle(url, process.pid, arguments.connections, arguments.seconds))


async def _idle(url: str, pid: int, count: int, seconds: float) -> dict[str, Any]:
    import psutil

    plan = Plan(url, seconds, extra={"ignore_eos": True})
    await run_load(plan, 8, requests_each=1)
    rates, sizes, taken = {}, {}, {}
    connections = [Connection(url) for _ in range(count)]
    for name in ("without", "with", "without_again"):
        if name == "with":
            for connection in connections:
                await connection.send("GET", "/health")
                await connection.body()
        sizes[name] = psutil.Process(pid).memory_info().rss
        with others_share() as share:
            rates[name] = (await run_load(plan, 8)).rate
        taken[name] = round(share[0], 3)
        if name == "with":
            for connection in connections:
                connection.close()
    without = statistics.mean([rates["without"], rates["without_again"]])
    return {
        "connections": count,
        "megabytes": round((sizes["with"] - sizes["without"]) / 1e6, 1),
        "tokens_per_s_without": round(without, 1),
        "tokens_per_s_with": round(rates["with"], 1),
        "others_took": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "compare", "idle"])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each level of load")
    parser.add_argument("--prompt-words", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--chat", action="store_true", help="load: ask for chats")
    parser.add_argument("--model", help="load: the model's name, where the server wants it")
    parser.add_argument("--threads", type=int, default=2, help="of every server")
    parser.add_argument("--rounds", type=int, default=3, help="of `compare --only overhead`")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--peer-python", help="a Python with xllamacpp, for llama.cpp's server")
    parser.add_argument("--transformers", help="a directory with the default model for `transformers serve`")
    parser.add_argument("--transformers-option", action="append", default=[], help="--transformers-option=--OPTION")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.what == "load":
        lengths = {"prompt_words": arguments.prompt_words, "max_tokens": arguments.max_tokens}
        plan = Plan(arguments.url, arguments.seconds, chat=arguments.chat, model=arguments.model, **lengths)
        report: Any = measure(plan, arguments.clients)
    else:
        report = compare(arguments) if arguments.what == "compare" else idle(arguments)
    print(json.dumps(report))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
