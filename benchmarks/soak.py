"""Hours of ordinary and hostile traffic against one server: does it leak, lose blocks, or answer 5xx?

    python benchmarks/soak.py --minutes 30 [--clients 6] [--pause 0.2] [--restarts 3] [--model PATH] [--json out.json]

A server of its own runs the engine's integrity check every 5 s. Clients send completions, chats, streams, candidates,
forms, tools and wrong input, leave in mid-stream, and read slowly. In the first third the engine's process is killed
`--restarts` times; only until /health tells of the next one, which is timed, may an answer be 5xx. At the end all
blocks must be back, and the memory of both processes must be flat: the median of the last quarter at most 3 % above
that of the second half's beginning. Exits with 1 if any of this fails.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from typing import Any

import psutil
from serving import WORDS, Connection, make_prompt, server

LAST_WORDS = 2.0  # seconds after a restart in which the answers to earlier requests may still come
SLOWEST_RESTART = 120.0  # seconds
CHECK_EVERY = 5.0
SAMPLE_EVERY = 5.0
MAX_GROWTH = 0.03
BAD = [
    {"prompt": ""},
    {"prompt": []},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "temprature": 1},
    {"prompt": "a", "n": 10**9},
    {"prompt": [-1, 10**9]},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "structured_outputs": {"regex": "("}},
    {"prompt": "a", "structured_outputs": {"json": {"type": "bogus"}}},
    {"prompt": "word " * 5000},
    {"prompt": "a", "logit_bias": {"x": 1}},
    {"prompt": "a", "cache_salt": 5},
]
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
FORMS: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "[a-z]{3,12}"}},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"response_format": {"type": "json_object"}},
]


class Soak:
    """The traffic and what it met."""

    def __init__(self, url: str, seconds: float, pause: float) -> None:
        self.url = url
        self.end = time.monotonic() + seconds
        self.pause = pause
        self.statuses: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.faults: list[str] = []
        self.down_until = -1e9  # of time.monotonic; infinite while the engine is being restarted
        self.restart_seconds: list[float] = []

    def in_grace(self) -> bool:
        """5xx and broken streams are expected now."""
        return time.monotonic() < self.down_until

    async def client(self, number: int) -> None:
        rng = random.Random(number)
        connection = Connection(self.url)
        kinds = [self.plain, self.stream, self.leave, self.bad, self.form, self.tool, self.slow, self.broken]
        while time.monotonic() < self.end:
            kind = rng.choices(kinds, [3, 4, 3, 3, 2, 1, 1, 1])[0]
            self.kinds[kind.__name__] += 1
            try:
                await asyncio.wait_for(kind(connection, rng), 120)
            except (ConnectionError, asyncio.IncompleteReadError, OSError, TimeoutError) as error:
                connection.close()
                if not self.in_grace() and kind is not self.broken:
                    self.faults.append(f"{kind.__name__}: {error!r}")
            await asyncio.sleep(rng.random() * 2 * self.pause)
        connection.close()

    async def ask(self, connection: Connection, path: str, body: Any) -> int:
        status = await connection.send("POST", path, body)
        self.statuses[f"{status}"] += 1
        if status >= 500 and not self.in_grace():
            self.faults.append(f"{path} answered {status} to {json.dumps(body)[:120]}")
        return status

    def body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        shared = " ".join(WORDS) if rng.random() < 0.5 else ""
        prompt = f"{shared} {make_prompt(rng, rng.randint(2, 60))}"
        options = {"max_tokens": rng.randint(1, 48), "temperature": rng.choice([0, 0.7, 1.2])}
        return {"prompt": prompt, **options, **fields}

    async def plain(self, connection: Connection, rng: random.Random) -> None:
        extra = rng.choice([{}, {"n": 3}, {"logprobs": 2}, {"echo": True}, {"stop": ["e"]}, {"seed": 1, "top_k": 5}])
        await self.ask(connection, "/v1/completions", self.body(rng, **extra))
        await connection.body()

    async def stream(self, connection: Connection, rng: random.Random) -> None:
        await self.ask(connection, "/v1/completions", self.body(rng, stream=True))
        await connection.body()

    async def leave(self, connection: Connection, rng: random.Random) -> None:
        """Goes away in mid-stream, or before the first token."""
        await self.ask(connection, "/v1/completions", self.body(rng, stream=True, max_tokens=200, n=rng.choice([1, 2])))
        count = rng.randint(0, 12)
        async for _ in connection.chunks():
            count -= 1
            if count < 0:
                break
        connection.close()

    async def slow(self, connection: Connection, rng: random.Random) -> None:
        await self.ask(connection, "/v1/completions", self.body(rng, stream=True))
        async for _ in connection.chunks():
            await asyncio.sleep(0.05)

    async def bad(self, connection: Connection, rng: random.Random) -> None:
        status = await self.ask(connection, "/v1/completions", rng.choice(BAD))
        answer = await connection.body()
        if status < 400:
            self.faults.append(f"bad input was served: {answer[:100]!r}")

    async def form(self, connection: Connection, rng: random.Random) -> None:
        await self.ask(connection, "/v1/completions", self.body(rng, **rng.choice(FORMS)))
        await connection.body()

    async def tool(self, connection: Connection, rng: random.Random) -> None:
        message = {"role": "user", "content": make_prompt(rng, 5)}
        body = {"messages": [message], "tools": [CLOCK], "tool_choice": rng.choice(["auto", "required"])}
        await self.ask(connection, "/v1/chat/completions", {**body, "max_tokens": 40, "stream": rng.random() < 0.5})
        await connection.body()

    async def broken(self, connection: Connection, rng: random.Random) -> None:
        """What is no JSON, or no HTTP."""
        if rng.random() < 0.5:
            await self.ask(connection, "/v1/completions", rng.choice([b"{", b"[" * 10000, b"\xff\xfe", b"null"]))
            await connection.body()
            return
        connection.close()
        transport = await connection.open()
        transport.write(rng.choice([b"\x16\x03\x01 TLS?\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/comp"]))
        await asyncio.sleep(0.1)
        connection.close()

    async def get(self, path: str) -> Any:
        connection = Connection(self.url)
        try:
            await connection.send("GET", path)
            return json.loads(await connection.body())
        finally:
            connection.close()

    async def restart(self, process: psutil.Process, times: list[float]) -> None:
        """Kills the engine's process at these times, as a crash would."""
        for at in times:
            await asyncio.sleep(max(0, at - time.monotonic()))
            start, self.down_until = time.monotonic(), float("inf")
            num_restarts = (await self.get("/health"))["engine_restarts"]
            for child in engine_of(process):
                child.kill()
            while (seconds := time.monotonic() - start) < SLOWEST_RESTART:
                if (await self.get("/health"))["engine_restarts"] > num_restarts:
                    break
                await asyncio.sleep(0.1)
            else:
                self.faults.append(f"the engine was not back after {SLOWEST_RESTART:g} s")
            self.restart_seconds.append(round(seconds, 1))
            self.down_until = time.monotonic() + LAST_WORDS


def engine_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "octavo.server.engine_process" in " ".join(child.cmdline()):
                found.append(child)
    return found


async def sample(soak: Soak, process: psutil.Process, series: list[tuple[float, float, float]]) -> None:
    """(time, bytes of the server, bytes of the engine) every few seconds."""
    start = time.monotonic()
    while time.monotonic() < soak.end:
        with contextlib.suppress(psutil.Error):
            engine = sum(child.memory_info().rss for child in engine_of(process))
            series.append((time.monotonic() - start, process.memory_info().rss, engine))
        await asyncio.sleep(SAMPLE_EVERY)


async def run(arguments: argparse.Namespace, pid: int, url: str) -> dict[str, Any]:
    seconds = arguments.minutes * 60
    soak = Soak(url, seconds, arguments.pause)
    process = psutil.Process(pid)
    series: list[tuple[float, float, float]] = []
    now = time.monotonic()
    restarts = [now + seconds / 3 * (i + 1) / (arguments.restarts + 1) for i in range(arguments.restarts)]
    clients = [soak.client(number) for number in range(arguments.clients)]
    await asyncio.gather(*clients, soak.restart(process, restarts), sample(soak, process, series))
    await asyncio.sleep(3)
    memory, health = await soak.get("/v1/memory"), await soak.get("/health")
    if memory["used"]:
        soak.faults.append(f"{memory['used']} bytes of blocks are not back")
    growth = {name: _growth(series, column) for column, name in ((1, "server"), (2, "engine"))}
    soak.faults += [f"{name} grew by {100 * value:.1f} %" for name, value in growth.items() if value > MAX_GROWTH]
    return {
        "minutes": arguments.minutes,
        "requests": dict(soak.kinds),
        "statuses": dict(soak.statuses),
        "engine_restarts": health["engine_restarts"],
        "restart_seconds": soak.restart_seconds,
        "growth": {name: round(value, 4) for name, value in growth.items()},
        "server_mb": round(series[-1][1] / 1e6, 1),
        "engine_mb": round(series[-1][2] / 1e6, 1),
        "faults": soak.faults,
    }


def _growth(series: list[tuple[float, float, float]], column: int) -> float:
    """Of the last quarter's median over the third quarter's."""
    half = series[len(series) // 2 :]
    early, late = half[: len(half) // 2], half[len(half) // 2 :]
    return statistics.median(s[column] for s in late) / statistics.median(s[column] for s in early) - 1


# ---- the server's process ------------------------------------------------------------------------------------------


def serve(port: int, model: str | None, max_model_len: int) -> None:
    """A server that checks its engine's integrity all the time, and ends when that fails."""
    from octavo.server.serve import make_server
    from octavo.server.settings import ServerSettings

    options = {"model": model, "max_model_len": max_model_len, "kv_cache_memory": 64 << 20, "max_num_seqs": 16}
    running = make_server(ServerSettings(port=port), {k: v for k, v in options.items() if v is not None})
    failed: list[BaseException] = []

    async def check() -> None:
        from octavo.server.engine_client import EngineDeadError

        while True:
            await asyncio.sleep(CHECK_EVERY)
            with contextlib.suppress(EngineDeadError):
                try:
                    await running._service.engine.ask("integrity")
                except EngineDeadError:
                    raise
                except Exception as error:
                    failed.append(error)
                    running.should_exit = True

    async def both() -> None:
        checking = asyncio.create_task(check())
        await running.serve()
        checking.cancel()

    asyncio.run(both())
    if failed:
        raise SystemExit(f"integrity: {failed[0]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between a client's requests")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--model", help="the default model if not given")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.port, arguments.model, arguments.max_model_len)
        return
    url = f"http://127.0.0.1:{arguments.port}"
    command = [sys.executable, __file__, "--serve", "--port", str(arguments.port)]
    command += ["--max-model-len", str(arguments.max_model_len)]
    command += ["--model", arguments.model] if arguments.model else []
    with server(command, url) as process:
        report = asyncio.run(run(arguments, process.pid, url))
        if process.poll() is not None:
            report["faults"].append(f"the server ended with {process.returncode}")
    print(json.dumps(report, indent=1))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    sys.exit(bool(report["faults"]))


if __name__ == "__main__":
    main()
