"""The server among people and accidents: leavers, dead engines, full queues, wrong keys, slow clients, the end."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.guards import log_line

LONG = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}


def chunks(response):
    """The stream's events as they come."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def streaming(server, count=1, **fields):
    """A completion's stream, after its first event."""
    body = {"prompt": "the hen", **LONG, "stream": True, **fields}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        events = chunks(response)
        for _ in range(count):
            next(events)
        yield events


@contextlib.contextmanager
def stopped(pid):
    """The process rests meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# ---- leavers -------------------------------------------------------------------------------------------------------


def num_live(server):
    return server.service.doors.live


@pytest.mark.parametrize("stream", [True, False])
def test_blocks_of_a_client_that_leaves_are_free_at_once(server, stream):
    body = json.dumps({"prompt": "the hen", **LONG, "n": 4, "stream": stream}).encode()
    with socket.create_connection(server.service_address) as connection:
        connection.sendall(head(len(body)) + body)
        server.wait(lambda: num_live(server) == 4, "it runs", 5)
    server.wait(lambda: num_live(server) == 0, "it is forgotten", 5)
    server.wait_until_idle()


def head(length, path="/v1/completions"):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_many_at_once_all_get_their_own(server):
    def ask(number):
        seeded = {"temperature": 1, "seed": number % 3, "max_tokens": 8}
        with streaming(server, count=0, **seeded) as events:
            return "".join(event["choices"][0]["text"] for event in events)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(ask, range(24)))
    assert len(set(texts)) == 3
    assert all(texts[number] == texts[number % 3] for number in range(24))
    server.wait_until_idle()


def test_what_is_written_goes_out_without_delay(server):
    server.get("/health")
    (connection, *_) = server.server.server_state.connections
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # else each stream's first event waits for 40 ms


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_stream_has_the_form_of_its_http(server, version):
    """HTTP/1.0 knows no chunks; its end is the connection's."""
    body = json.dumps({"prompt": "the hen", "max_tokens": 5, "ignore_eos": True, "stream": True}).encode()
    asked = (
        head(len(body)).replace(b"HTTP/1.1", b"HTTP/" + version).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    )
    with socket.create_connection(server.service_address, timeout=10) as connection:
        connection.sendall(asked + body)
        fields, _, stream = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert (b"transfer-encoding: chunked" in fields.lower()) is (version == b"1.1")
    if version == b"1.1":
        pieces, rest = [], stream
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            pieces.append(rest[: int(size, 16)])
            rest = rest[len(pieces[-1]) + 2 :]
        assert pieces.pop() == b""
        assert all(piece.startswith(b"data: ") and piece.endswith(b"\n\n") for piece in pieces)
        stream = b"".join(pieces)
    *events, last, nothing = stream.split(b"\n\n")
    assert (last, nothing) == (b"data: [DONE]", b"")
    assert json.loads(events[-1].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"


def test_requests_sent_at_once_are_answered_in_turn(server):
    """Pipelined: a stream, a stream, and a head that is too large."""
    body = json.dumps({"prompt": "the hen", "max_tokens": 3, "ignore_eos": True, "stream": True}).encode()
    stream = head(len(body)) + body
    large = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (32 << 10) + b"\r\n\r\n"
    with socket.create_connection(server.service_address, timeout=10) as connection:
        connection.sendall(stream + stream + large)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))  # the last closes it
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200", b"200", b"431"]
    assert answers.count(b"data: [DONE]") == 2


# ---- a dead engine -------------------------------------------------------------------------------------------------


def test_a_dead_engine_is_seen_at_once_told_to_all_and_replaced(serve):
    server = serve()
    first = server.service.engine.pid
    with streaming(server) as events:
        os.kill(first, signal.SIGKILL)
        *_, last = events
    assert "engine died" in last["error"]["message"]
    health = server.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "engine restarting")
    refused = server.complete()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert refused.json()["error"]["code"] == "engine_unavailable"
    server.wait(lambda: server.get("/health").status_code == 200, "the engine is back", 60)
    assert server.get("/health").json()["engine_restarts"] == 1
    assert server.service.engine.pid != first
    assert server.complete(max_tokens=2).status_code == 200
    assert 'octavo:engine_restarts_total{model_name="' in server.get("/metrics").text


def test_a_silent_engine_is_unhealthy_until_it_speaks(serve):
    server = serve(stall_timeout=0.5)
    pid = server.service.engine.pid
    with streaming(server) as events:
        with stopped(pid):
            server.wait(lambda: server.get("/health").json()["status"] == "engine stalled", "it is seen", 5)
        assert list(events)[-1]["choices"][0]["finish_reason"] == "length"
    assert server.get("/health").status_code == 200


# ---- limits --------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(serve):
    server = serve({"max_num_seqs": 2}, max_queue=1)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        with stopped(server.service.engine.pid):
            answers = [pool.submit(server.complete, max_tokens=4) for _ in range(3)]
            server.wait(lambda: num_live(server) == 3, "all are in", 5)
            refused = server.complete()
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert server.complete(max_tokens=1).status_code == 200
    too_many = server.complete(["a"] * 4)
    assert too_many.status_code == 400


def test_slow_and_oversized_clients_are_let_go(serve):
    server = serve(header_timeout=0.4, body_timeout=0.4, max_body=2000)

    def answer_to(*pieces, pause=0.0):
        with socket.create_connection(server.service_address, timeout=5) as connection:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
            with contextlib.suppress(ConnectionError):
                return connection.recv(65536)
        return b""

    assert answer_to() == b""
    assert answer_to(b"GET /health HTT", b"P/1.1\r\n", b"Host:", b" x", pause=0.15) == b""
    assert answer_to(b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 200_000)[:13] in (
        b"",
        b"HTTP/1.1 400 ",
        b"HTTP/1.1 431 ",
    )
    assert b" 408 " in answer_to(head(100) + b'{"prompt"')[:20]
    assert b" 413 " in answer_to(head(5000) + b" " * 5000)[:20]
    expecting = head(5000).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    assert b" 413 " in answer_to(expecting)[:20]
    chunked = head(1).replace(b"Content-Length: 1", b"Transfer-Encoding: chunked")
    assert b" 413 " in answer_to(chunked + b"1000\r\n" + b" " * 4096 + b"\r\n0\r\n\r\n")[:20]
    assert b" 200 " in answer_to(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[:20]


def test_a_client_that_never_reads_costs_no_blocks_and_is_let_go(serve):
    server = serve(send_timeout=1.0)
    listener = server.server.servers[0].sockets[0]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else the system would take the whole answer
    body = json.dumps({"prompt": "the hen", **LONG, "n": 8, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.service_address)
        connection.sendall(head(len(body)) + body)
        server.wait(lambda: num_live(server) == 8, "it runs", 5)
        server.wait_until_idle()  # the engine has gone on without it
        server.wait(lambda: num_live(server) == 0, "it is let go", 10)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in received


def test_an_answer_that_takes_too_long_is_ended(serve):
    server = serve(request_timeout=0.3)
    with stopped(server.service.engine.pid):
        response = server.complete(**LONG)
    assert response.status_code == 504
    server.wait_until_idle()


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_keys_open_everything_but_health_version_and_the_page(serve):
    from octavo.server.app import ENDPOINTS

    server = serve(api_keys=("first-key-0", "second-key"))
    for endpoint in ENDPOINTS:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key-0"}):
            response = server.client.request(endpoint.method, endpoint.path, headers=headers, json={})
            assert (response.status_code == 401) is not endpoint.open, endpoint.path
            if not endpoint.open:
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.get("/").status_code == 200
    assert server.get("/page.js").status_code == 200
    assert server.get("/nothing").status_code == 401
    keys = [{"Authorization": f"Bearer {key}"} for key in ("first-key-0", "second-key")]
    assert all(server.get("/v1/models", headers=key).status_code == 200 for key in keys)

    def cached(headers, **fields):
        body = {"prompt": "a beginning that could be shared", "max_tokens": 1, **fields}
        usage = server.post("/v1/completions", body, headers=headers).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached(keys[0]) == 0
    assert cached(keys[0]) > 0
    assert cached(keys[1]) == 0  # nobody can tell by time what another key has sent
    assert cached(keys[0], cache_salt="own") == 0


def test_pages_of_other_origins_are_let_in_by_name_only(server, serve):
    origin = {"Origin": "https://app.example"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=origin).headers
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert server.client.options("/v1/completions", headers=preflight).status_code == 405
    allowing = serve(allowed_origins=("https://app.example",), api_keys=("long-enough",))
    answer = allowing.client.options("/v1/completions", headers=preflight)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    other = {**preflight, "Origin": "https://evil.example"}
    assert allowing.client.options("/v1/completions", headers=other).status_code == 400


def test_without_a_key_a_foreign_name_for_this_machine_opens_nothing(server):
    def status(host):
        return server.get("/health", headers={"Host": host}).status_code

    assert [status(host) for host in ("localhost:8000", "127.0.0.1:1", "[::1]:2", "a.localhost")] == [200] * 4
    assert [status(host) for host in ("rebound.example", "rebound.example:8000", "[x")] == [403, 403, 403]


def test_names_priorities_and_tls(serve, tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([openssl, *request, *names], check=True, capture_output=True)
    server = serve(
        {"scheduling_policy": "priority"},
        served_model_name=("small", "tiny"),
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
    )
    assert server.url.startswith("https://127.0.0.1:")
    with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=str(certificate))) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small", "tiny"]
        body = {"prompt": "the hen", "max_tokens": 2, "model": "tiny", "priority": -3}
        assert client.post("/v1/completions", json=body).json()["model"] == "tiny"


@given(st.text(), st.text())
def test_no_value_forges_a_line_or_a_field_of_the_log(path, name):
    line = log_line("request", path=path, name=name)
    assert line.isprintable() or not (path + name).isprintable()
    assert "\n" not in line
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"]+)(?: |$)', line)
    assert [pair[0] for pair in pairs] == ["event", "path", "name"]


# ---- the page's side -----------------------------------------------------------------------------------------------


def test_the_page_comes_with_its_policy(server):
    from octavo.server.app import POLICY

    page = server.get("/")
    assert page.headers["content-security-policy"] == POLICY
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "<title>" in page.text


def test_statistics_follow_the_cache(server):
    import base64

    with server.client.stream("GET", "/v1/stats") as response:
        snapshots = chunks(response)
        idle = next(snapshots)
        assert idle["running"] == idle["waiting"] == 0
        assert len(base64.b64decode(idle["map"])) == server.service.facts.num_blocks
        with streaming(server, n=4, prompt="the hen and"):
            busy = next(snapshot for snapshot in snapshots if snapshot["running"])
        cells = base64.b64decode(busy["map"])
        assert {cell for cell in cells if cell >= 2}
        assert len(busy["tails"]) <= 4
        for block, owner, filled in busy["tails"]:
            assert cells[block] == 3
            assert 0 <= filled <= 4
            assert str(owner) in busy["owners"]
        assert busy["memory"]["used"] > 0
        after = next(snapshot for snapshot in snapshots if not snapshot["running"])
        assert after["owners"] == {}
    server.wait_until_idle()


# ---- the process ---------------------------------------------------------------------------------------------------


def test_the_servers_process_does_without_torch(tiny_model_dir):
    """A third of the memory, and there two seconds sooner: only the engine computes."""
    code = (
        "import sys; from octavo.server.serve import make_server; from octavo.server.settings import ServerSettings; "
        f"make_server(ServerSettings(), {{'model': {str(tiny_model_dir)!r}}}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_signal_ends_the_streams_in_words_and_leaves_nobody(command):
    process, address = command
    assert address.endswith("/llm")
    base = address.removesuffix("/llm")
    assert httpx.get(f"{base}/health").status_code == 200
    body = {"prompt": "the hen", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8}
    engine = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[0])
    with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=30) as response:
        events = chunks(response)
        next(events)
        with stopped(engine):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(1)  # more than --shutdown-timeout
        *_, last = events
    assert last["error"]["message"] == "the server is shutting down"
    assert process.wait(20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def is_running(pid):
    """Neither gone nor a zombie that nobody has buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_an_engine_does_not_outlive_its_server(command):
    process, _ = command
    engine = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[0])
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while is_running(engine):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def silent_log(monkeypatch):
    """The server's log stays away from a stderr that pytest closes."""
    monkeypatch.setattr("octavo.server.serve._log_to_stderr", lambda: None)


def test_a_port_that_is_taken_is_said_before_the_model_loads(server, tiny_model_dir, capsys, silent_log):
    from octavo.cli import main

    started = time.monotonic()
    assert main(["serve", str(tiny_model_dir), "--port", str(server.service_address[1])]) == 2
    assert "in use" in capsys.readouterr().err
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("stream", [True, False])
def test_the_same_request_id_twice_is_no_conflict(server, stream):
    headers = {"X-Request-Id": "twin"}
    body = {"prompt": "the hen", **LONG, "stream": stream}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.post, "/v1/completions", body, headers=headers) for _ in range(4)]
        assert [answer.result().status_code for answer in asked] == [200] * 4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--api-key", "short"], "api_key: expected at least 8"),
        (["--port", "70000"], "port: expected 0 to 65535"),
        (["--max-model-len", "9999999"], "max_model_len: expected at most"),
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile: expected ssl_certfile"),
        (["--root-path", "llm"], "root_path: expected it to begin with /"),
    ],
)
def test_what_the_operator_got_wrong_is_one_line(tiny_model_dir, capsys, silent_log, flags, says):
    from octavo.cli import main

    assert main(["serve", str(tiny_model_dir), "--device", "cpu", *flags]) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
