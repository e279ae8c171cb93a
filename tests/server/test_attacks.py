"""What hostile or careless input did to engines like ours, one test or more for each line of docs/security.md's list.

Each must get a 4xx that names the field, or an answer; every time a neighbour's request must go on unharmed, and all
blocks must come back. What belongs to files and to the engine alone is tested beside them; the table in
docs/security.md says where.
"""

import ast
import contextlib
import json
import os
import resource
import socket
import struct
import threading
import time
from pathlib import Path

import httpx
import pytest

import octavo
from octavo.engine.sampling_params import MAX_LOGIT_BIAS, MAX_N
from octavo.server.guards import MAX_HEAD

PACKAGE = Path(octavo.__file__).parent
NEIGHBOUR = {"prompt": "the hen", "temperature": 0, "max_tokens": 8}


@pytest.fixture
def neighbour(server):
    """A request whose answer must be the same before and after whatever the test does."""
    before = server.post("/v1/completions", NEIGHBOUR).json()["choices"][0]["text"]
    yield
    assert server.post("/v1/completions", NEIGHBOUR).json()["choices"][0]["text"] == before
    server.wait_until_idle()


def post(server, content):
    return server.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})


def refused(answer, *params):
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in params, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": MAX_N + 1}, "n"),
        ({"n": 10**12}, "n"),
        ({"n": 64}, "n"),  # more than this server runs at a time
        ({"best_of": 10**6}, "best_of"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": ["x" * 10**5]}, "stop"),
        ({"bad_words": ["x"] * 5000}, "bad_words"),
        ({"prompt": ["x"] * 5000}, "prompt"),
    ],
)
def test_01_huge_counts(server, fields, param):
    refused(server.post("/v1/completions", {"prompt": "a", **fields}), param)


def test_01_a_huge_max_tokens_is_bounded_by_the_context(server):
    answer = server.complete("a", max_tokens=10**9).json()
    assert answer["usage"]["total_tokens"] <= 256


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [""]}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": []}]}),
        ("/v1/responses", {"input": []}),
    ],
)
def test_02_nothing_to_answer(server, path, body):
    refused(server.post(path, body), "prompt", "messages", "messages[0].content", "input")


@pytest.mark.usefixtures("neighbour")
def test_02_a_beginning_alone_can_be_continued(server):
    """A prompt of nothing but the special token that stands between texts."""
    answer = server.complete([256], max_tokens=4, ignore_eos=True)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("token", [-1, 10**6, 2**31, 2**63, 2**64, 1.5, True, "x"])
@pytest.mark.parametrize("path", ["/v1/completions", "/detokenize"])
def test_03_token_ids_that_do_not_exist(server, token, path):
    field = "prompt" if path == "/v1/completions" else "tokens"
    answer = server.post(path, {field: [1, token]})
    if path == "/detokenize" and token == 10**6:
        assert answer.status_code in (200, 400)
        return
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(field)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-3", "true", '"0.5"', "[]"])
def test_04_numbers_that_are_none(server, field, value):
    answer = post(server, f'{{"prompt": "a", "{field}": {value}}}'.encode())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in (field, None)  # NaN and Infinity are no JSON


@pytest.mark.usefixtures("neighbour")
def test_05_prompts_that_can_never_fit(server):
    refused(server.complete("the hen " * 200), "prompt")
    refused(server.post("/v1/completions", {"prompt": [1] * 256}), "prompt")
    refused(server.chat("x" * 10**6), "prompt", "messages")


EXPLOSIVE = [
    {"json": {"type": "integer", "multipleOf": 123456789}},
    {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(9)]} for i in range(9)]}},
    {"regex": "(a+)+$" * 2000},
    {"regex": "(?=a)b"},
    {"grammar": "start: start2"},
    {"json": {"$ref": "http://127.0.0.1:1/x"}},
    {"json": {"$ref": "file:///etc/passwd"}},
]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("form", EXPLOSIVE, ids=lambda form: str(form)[:40])
def test_06_explosive_forms_stop_nobody(server, form):
    """While it is compiled, a stream beside it goes on without a pause."""
    gaps, start = [], time.monotonic()
    answers = []
    asker = threading.Thread(target=lambda: answers.append(server.complete("a", structured_outputs=form, max_tokens=4)))
    asker.start()
    with server.client.stream(
        "POST", "/v1/completions", json={**NEIGHBOUR, "max_tokens": 100, "stream": True}
    ) as lines:
        last = time.monotonic()
        for _ in lines.iter_lines():
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
    asker.join(30)
    refused(answers[0], *(f"structured_outputs.{name}" for name in form))
    assert time.monotonic() - start < 20
    assert max(gaps) < 2, "no step waited for the compiler"


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("regex", ["(a+)+$", "(a|a)*b", "(x+x+)+y", "([a-z]+)*z"])
def test_06_regexes_that_backtrack_elsewhere_are_plain_automata_here(server, regex):
    start = time.monotonic()
    assert server.complete("a", structured_outputs={"regex": regex}, max_tokens=40).status_code == 200
    assert time.monotonic() - start < 10


@pytest.mark.usefixtures("neighbour")
def test_07_no_request_brings_a_template(server):
    refused(server.chat(chat_template="{{ ''.__class__.__mro__ }}"), "chat_template")
    for name in ("messages", "tools", "eos_token", "self", "__class__", "a.b"):
        refused(server.chat(chat_template_kwargs={name: "x"}), "chat_template_kwargs")
    text = "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}"
    answer = server.post("/tokenize", {"messages": [{"role": "user", "content": text}], "return_token_strs": True})
    assert "7 * 7" in "".join(answer.json()["token_strs"]).replace("Ġ", " "), "a message is text, not a template"


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("guided_regex", "structured_outputs"),
        ("topp", "top_p"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_08_misspelt_and_retired_fields(server, path, field, near):
    content = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = server.post(path, {**content, field: 1})
    refused(answer, field)
    assert near in answer.json()["error"]["message"]


# ---- connections ---------------------------------------------------------------------------------------------------


def raw(server, data, wait=5.0):
    """What the server says to these bytes; nothing where it closes, or goes on waiting."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=wait) as sock:
        with contextlib.suppress(ConnectionError):  # it may have hung up in the middle
            sock.sendall(data)
        with contextlib.suppress(ConnectionError, TimeoutError):
            return sock.recv(1 << 16)
    return b""


@pytest.mark.usefixtures("neighbour")
def test_09_huge_heads_and_bodies(server):
    assert post(server, b'{"prompt": "' + b"x" * (9 << 20) + b'"}').status_code == 413
    huge = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * (8 << 20) + b"\r\n\r\n"
    assert b" 200 " not in raw(server, huge)  # it has hung up in the middle
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert post(server, deep).status_code == 400
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    length = head + b"Content-Length: 99999999999\r\n\r\n"
    assert b" 413 " in raw(server, length)
    smuggled = head + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert b" 200 " not in raw(server, smuggled)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("where", ["path", "query", "header", "headers"])
def test_09_a_head_is_bounded_to_the_byte(server, where, pieces):
    """However it comes, and wherever it is long."""

    def status_of(size):
        base = b"GET /health%b HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n%b\r\n"
        fill = {"path": (b"/%b", b""), "query": (b"?%b", b""), "header": (b"", b"X: %b\r\n")}
        fill["headers"] = (b"", b"Y: y\r\n" * 50 + b"X: %b\r\n")
        line, header = fill[where]
        form = base % (line, header)
        head = form % (b"x" * (size - len(form) + 2))
        assert len(head) == size
        with socket.create_connection(server.service_address, timeout=5) as sock:
            step = -(-size // pieces)
            for begin in range(0, size, step):
                sock.sendall(head[begin : begin + step])
                time.sleep(0.02 * (pieces > 1))
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        status, body = int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])
        return status, body.get("error", {}).get("message", "")

    assert status_of(MAX_HEAD)[0] == (404 if where == "path" else 200)
    assert status_of(MAX_HEAD + 1) == (431, "the request's line and headers are larger than 32,768 bytes")


@pytest.mark.parametrize(
    "words", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"hello\r\n\r\n"]
)
def test_09_what_is_no_http_gets_an_error_in_openais_shape(server, words):
    answer = raw(server, words)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_09_a_thousand_idle_connections_cost_little(command):
    """Each has asked once and is kept alive: some kilobytes, and no processor time."""
    process, address = command
    url = httpx.URL(address.removesuffix("/llm"))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def memory():
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def seconds():
        return sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().split()[13:15])) / os.sysconf("SC_CLK_TCK")

    def ask(sock):
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += sock.recv(4096)
        return answer.startswith(b"HTTP/1.1 200 ")

    with contextlib.ExitStack() as stack:
        before = memory()
        idle = [stack.enter_context(socket.create_connection((url.host, url.port), timeout=10)) for _ in range(1000)]
        assert all(map(ask, idle))
        assert memory() - before < 30e6
        used = seconds()
        time.sleep(1)
        assert seconds() - used < 0.1
        assert httpx.post(f"{url}/v1/completions", json=NEIGHBOUR, timeout=10).status_code == 200
        assert all(map(ask, idle))


def test_09_connections_are_counted(serve):
    """Those beyond the limit are told so; the others go on; room comes back with the first that leaves."""
    server = serve(max_connections=20)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(server.service_address, timeout=5)) for _ in range(20)]
        with socket.create_connection(server.service_address, timeout=5) as more:
            answer = b"".join(iter(lambda: more.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 2" in answer.lower()
        assert b"which is the limit" in answer
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[0].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        idle[1].close()
        server.wait(lambda: len(server.server.server_state.connections) < 20, "it has left", 5)
        assert server.get("/health").status_code == 200


@pytest.mark.usefixtures("neighbour")
def test_09_clients_that_vanish_give_their_blocks_back(server):
    url = httpx.URL(server.url)
    body = json.dumps({"prompt": "the hen", "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    for _ in range(5):
        sock = socket.create_connection((url.host, url.port))
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a lost machine
        sock.close()
    server.wait(lambda: server.service.doors.live == 0, "they are forgotten", 5)
    server.wait_until_idle()


def test_10_every_endpoint_asks_for_the_key(serve):
    here = serve(api_keys=("secret-key-1", "secret-key-2"))
    described = here.get("/openapi.json", headers={"Authorization": "Bearer secret-key-1"}).json()
    for path, operations in described["paths"].items():
        for method in operations:
            for wrong in ({}, {"Authorization": "Bearer secret-key-3"}, {"Authorization": "Basic secret-key-1"}):
                status = here.client.request(method, path, headers=wrong, json={}).status_code
                assert (status == 401) != (path in ("/health", "/version")), path
    assert here.client.post("/health").status_code in (401, 405)
    assert here.get("/v1/models?api_key=secret-key-1").status_code == 401, "a key in a URL ends up in logs"


def test_10_the_key_is_compared_in_constant_time():
    source = (PACKAGE / "server" / "guards.py").read_text()
    assert "hmac.compare_digest" in source


def test_11_tenants_share_no_prefix(serve):
    """Two keys, one prompt: the second tenant's request finds nothing in the cache, the first tenant's own does."""
    here = serve(api_keys=("tenant-one", "tenant-two"))

    def cached(key, **fields):
        headers = {"Authorization": f"Bearer {key}"}
        body = {"prompt": "0123456789" * 5, "max_tokens": 1, **fields}
        answer = here.post("/v1/completions", body, headers=headers).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("tenant-one") == 0
    assert cached("tenant-one") > 0
    assert cached("tenant-two") == 0
    assert cached("tenant-one", cache_salt="of one user") == 0


def test_11_blocks_are_named_by_a_collision_resistant_hash():
    source = (PACKAGE / "engine" / "prefix_cache.py").read_text()
    assert "blake2b" in source or "sha256" in source


# ---- code ----------------------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}


def nodes():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path.relative_to(PACKAGE), node


def test_12_14_nothing_is_unpickled_and_only_our_own_kernels_are_compiled():
    """`exec` stands in the CPU kernels' builder alone, for code that we wrote."""
    found = []
    for path, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{path}: imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found += [f"{path}: {node.func.id}"] * (path.parts[0] != "kernels")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{path}: torch.load"] * ((node.value.id, node.attr) == ("torch", "load"))
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"{path}: trust_remote_code")
    assert not found


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "../../etc/passwd"}},
    ],
    ids=lambda part: part["type"],
)
def test_14_urls_in_messages_are_not_fetched(server, part):
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, part]}
    answer = server.post("/v1/chat/completions", {"messages": [message]})
    assert answer.status_code == 400
    assert "content" in answer.json()["error"]["param"]


# ---- faults --------------------------------------------------------------------------------------------------------


def test_15_aborts_under_load_free_everything(server):
    """Streams that end at any moment beside others that go on: the answers are right, the blocks are back."""
    expected = server.post("/v1/completions", {**NEIGHBOUR, "max_tokens": 60}).json()["choices"][0]["text"]
    found = []

    def leave(count):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            body = {
                "prompt": "the hen and the fox",
                "max_tokens": 200,
                "stream": True,
                "ignore_eos": True,
                "seed": count,
            }
            with client.stream("POST", "/v1/completions", json=body) as lines:
                for _, number in zip(lines.iter_lines(), range(count), strict=False):
                    assert number < count

    def stay():
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.post("/v1/completions", json={**NEIGHBOUR, "max_tokens": 60})
            found.append(answer.json()["choices"][0]["text"])

    threads = [threading.Thread(target=leave, args=(i,)) for i in range(1, 9)]
    threads += [threading.Thread(target=stay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 4
    server.wait_until_idle()


def test_16_a_request_whose_grammar_gives_up_harms_nobody(server):
    """Three in a row are no reason to restart the engine."""
    restarts = server.get("/health").json()["engine_restarts"]
    for _ in range(4):
        answer = server.complete("a", structured_outputs={"regex": "((a{200}){200}){200}"}, max_tokens=20)
        assert answer.status_code in (200, 400)
    assert server.get("/health").json() == {"status": "ok", "engine_restarts": restarts}


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 6, "stop": ["e", "a", " "]},
        {"n": 3, "seed": 7},
        {"echo": True, "logprobs": 2, "max_tokens": 3},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"n": 2, "logprobs": 1, "stop": ["e"], "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"structured_outputs": {"choice": ["on"]}, "n": 3, "logprobs": 2, "stop": ["n"]},
        {"structured_outputs": {"regex": "[ab]{4}"}, "repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"structured_outputs": {"regex": "[ab]{4}"}, "logit_bias": {str(i): -100 for i in range(256)}},
        {"structured_outputs": {"regex": "[ab]{4}"}, "top_k": 1, "min_p": 1.0, "top_p": 0.01},
        {"prompt_logprobs": 1, "n": 2},
        {"stream": True, "stop": ["e"], "include_stop_str_in_output": True, "n": 2},
    ],
    ids=str,
)
def test_17_combinations(server, fields):
    answer = server.complete("the hen", **{"max_tokens": 10, **fields})
    assert answer.status_code == 200, answer.text
    if "stream" not in fields:
        choices = answer.json()["choices"]
        assert len(choices) == fields.get("n", 1)
        texts = [choice["text"] for choice in choices]
        if "seed" in fields:
            assert [c["text"] for c in server.complete("the hen", max_tokens=10, **fields).json()["choices"]] == texts
        if "regex" in fields.get("structured_outputs", {}):
            assert all(set(text) <= {"a", "b"} and len(text) == 4 for text in texts), texts
