"""Real servers for the tests: the application in a thread here, its engine in a process of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from octavo.server.serve import make_server
from octavo.server.settings import ServerSettings

SMALL = {"device": "cpu", "block_size": 4, "kv_cache_memory": 2 << 20, "max_num_seqs": 8}


class Running:
    """A server that answers. url: where. client: an httpx client of it. service: its insides, for a look."""

    def __init__(self, server, thread):
        self.server = server
        self.thread = thread
        self.service = server._service
        self.url = server.address
        self.service_address = ("127.0.0.1", int(self.url.rpartition(":")[2]))
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path, body, **options):
        return self.client.post(path, json=body, **options)

    def get(self, path, **options):
        return self.client.get(path, **options)

    def chat(self, text="the hen", **fields):
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def complete(self, prompt="the hen", **fields):
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def memory(self, headers=None):
        return self.get("/v1/memory", headers=headers).json()

    def wait(self, condition, what, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"timed out waiting until {what}"
            time.sleep(0.02)

    def wait_until_idle(self, headers=None):
        """All blocks are back."""
        self.wait(lambda: self.memory(headers)["used"] == 0, "all blocks are back")


@contextlib.contextmanager
def running(model, options=None, **settings):
    """A server of `model`; options of the engine, settings of the server."""
    server = make_server(ServerSettings(port=0, **settings), {"model": str(model), **SMALL, **(options or {})})
    failure = []

    def run():
        try:
            server.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    if failure:
        raise failure[0]
    here = Running(server, thread)
    try:
        yield here
    finally:
        here.client.close()
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(tiny_model_dir):
    """The tiny random model behind an open server, for every test that changes nothing of it."""
    with running(tiny_model_dir, {}, shutdown_timeout=1) as here:
        yield here


@pytest.fixture(scope="session")
def default_server():
    """The default model, for the few tests that need sense in its answers."""
    from octavo.models import default_model_path

    with running(default_model_path(), {"block_size": 16, "kv_cache_memory": 64 << 20}, shutdown_timeout=1) as here:
        yield here


@pytest.fixture(scope="session")
def long_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with a context of 4096: its tokenizer is of bytes, and descriptions of tools are long."""
    path = tmp_path_factory.mktemp("long") / "tiny-long"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return path


@pytest.fixture(scope="session")
def long_server(long_model_dir):
    """That one, served openly under the name "tiny"."""
    with running(
        long_model_dir, {"kv_cache_memory": 16 << 20}, served_model_name=("tiny",), shutdown_timeout=1
    ) as here:
        yield here


@pytest.fixture
def serve(tiny_model_dir):
    """`serve(options, **settings)`: a server of one's own."""
    with contextlib.ExitStack() as stack:
        yield lambda options=None, **settings: stack.enter_context(
            running(tiny_model_dir, options, **{"shutdown_timeout": 1, **settings})
        )


@pytest.fixture
def command(tiny_model_dir):
    """`octavo serve` as its user starts it: (process, address)."""
    flags = ("--port", "0", "--kv-cache-memory", "2MiB", "--device", "cpu", "--max-num-seqs", "8", "--shutdown-timeout")
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo", "serve", str(tiny_model_dir), *flags, "0.5", "--root-path", "/llm"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = iter(process.stderr.readline, "")
    address = next(line.split()[-1] for line in lines if "Listening at" in line)
    reading = threading.Thread(target=lambda: [None for _ in lines])  # a full pipe would stop whoever logs
    reading.start()
    try:
        yield process, address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reading.join()
        process.stderr.close()
