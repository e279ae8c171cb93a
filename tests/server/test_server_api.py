"""The API as its clients see it: what is answered, in OpenAI's shapes, and what is refused, by the field's name."""

import json

import pytest

from octavo.server.protocol import Memory

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def events(response):
    """The data of each event of a stream; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- completions ---------------------------------------------------------------------------------------------------


def test_a_completion_says_what_the_engine_says(server, tiny_model_dir):
    from octavo.llm import LLM, SamplingParams

    llm = LLM(tiny_model_dir, kv_cache_memory=1 << 20, device="cpu", progress=False)
    expected = llm.generate("the hen", SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)[0]
    answer = server.complete(**GREEDY).json()
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    num_prompt = len(expected.prompt_token_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["total_tokens"] == num_prompt + 6


def test_a_stream_is_the_whole_in_pieces(server):
    whole = server.complete(**GREEDY, logprobs=2).json()["choices"][0]
    chunks = events(server.complete(**GREEDY, logprobs=2, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == whole["logprobs"]["tokens"]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
    assert len({piece["id"] for piece in chunks}) == 1


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("the", 1), ([116, 104], 1), (["the", "a hen"], 2), ([[116, 104], [97], [98, 99]], 3)],
    ids=["text", "ids", "texts", "lists of ids"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_come_as_texts_or_ids_one_or_many(server, prompt, count, stream):
    body = {**GREEDY, "temperature": 1, "seed": 3, "n": 2, "stream": stream}
    response = server.complete(prompt, **body)
    answers = events(response) if stream else [response.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    ended = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ended) == list(range(2 * count))
    if not stream:
        assert ended == sorted(ended)


def test_echo_repeats_the_prompt_with_its_log_probabilities(server):
    plain = server.complete("the hen", **GREEDY, logprobs=1).json()["choices"][0]
    echoed = server.complete("the hen", **GREEDY, logprobs=1, echo=True).json()["choices"][0]
    assert echoed["text"] == "the hen" + plain["text"]
    logprobs = echoed["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in logprobs["token_logprobs"][1:])
    assert "".join(logprobs["tokens"]).startswith("the hen")
    assert logprobs["tokens"][-6:] == plain["logprobs"]["tokens"]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(logprobs["top_logprobs"])


def test_echo_alone_generates_nothing(server):
    choice = server.complete("the hen", max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    assert choice["text"] == "the hen"
    assert "".join(choice["logprobs"]["tokens"]) == "the hen"
    assert choice["finish_reason"] == "length"


def test_a_stop_string_ends_the_text_and_is_named(server):
    text = server.complete(**GREEDY).json()["choices"][0]["text"]
    stop = text[2:4]
    choice = server.complete(**GREEDY, stop=[stop]).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_prompt_log_probabilities_are_those_of_an_echo(server):
    echoed = server.complete("the hen", max_tokens=0, echo=True, logprobs=2).json()["choices"][0]["logprobs"]
    choice = server.complete("the hen", max_tokens=1, prompt_logprobs=2).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for entry, logprob, token in zip(others, echoed["token_logprobs"][1:], echoed["tokens"][1:], strict=True):
        own = next(told for told in entry.values() if told["decoded_token"] == token)
        assert own["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert sorted(told["rank"] for told in entry.values())[:2] == [1, 2]
    assert len(server.chat(max_tokens=1, prompt_logprobs=0).json()["prompt_logprobs"]) > len(others)
    assert "prompt_logprobs" not in server.chat(max_tokens=1).json()


# ---- chats ---------------------------------------------------------------------------------------------------------


def test_a_chat_is_a_completion_of_its_template(server):
    rendered = "[user]the hen\n[assistant]"
    expected = server.complete(rendered, **GREEDY).json()["choices"][0]["text"]
    answer = server.chat("the hen", **GREEDY).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "hen"}]
    assert server.chat(parts, **GREEDY).json()["choices"][0]["message"]["content"] == expected


def test_a_chat_streams_role_then_content_then_end(server):
    whole = server.chat(**GREEDY, logprobs=True, top_logprobs=2).json()["choices"][0]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(server.chat(**GREEDY, logprobs=True, top_logprobs=2, **stream))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == "length"
    told = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert [token["token"] for token in told] == [token["token"] for token in whole["logprobs"]["content"]]
    assert all(len(token["top_logprobs"]) == 2 for token in told)
    assert all(bytes(token["bytes"]).decode("utf-8", "replace") for token in told)
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_a_chat_without_a_limit_goes_to_the_contexts_end(server):
    answer = server.chat("x" * 200, temperature=0, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 256


def test_seeds_make_candidates_repeatable(server):
    bodies = [server.chat(n=3, seed=seed, max_tokens=6, temperature=1).json() for seed in (1, 1, 2)]
    texts = [[choice["message"]["content"] for choice in body["choices"]] for body in bodies]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 3


def test_the_cache_tells_how_much_of_a_prompt_it_knew(server):
    prompt = "a prompt that nobody else in these tests sends"
    details = [server.complete(prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert details[0]["cached_tokens"] == 0
    assert details[1]["cached_tokens"] > 0


# ---- refusals ------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("completions", {"prompt": "a", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("completions", {"prompt": "a", "guided_regex": "a+"}, "guided_regex", "structured_outputs"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "cannot fill gaps"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature", "at least 0"),
        ("completions", {"prompt": "a", "top_p": 0}, "top_p", "above 0"),
        ("completions", {"prompt": "a", "max_tokens": True}, "max_tokens", "bool"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "from 1"),
        ("completions", {"prompt": "a", "n": "2"}, "n", "str"),
        ("completions", {"prompt": "a", "n": 9}, "n", "max_num_seqs"),
        ("completions", {"prompt": "a", "n": 10**9}, "n", "from 1 to 1024"),
        ("completions", {"prompt": "a", "logprobs": 10**6}, "logprobs", "from 0 to 20"),
        ("completions", {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ("completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "at most"),
        ("completions", {"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", "vocabulary"),
        ("completions", {"prompt": "a", "priority": 1}, "priority", "scheduling-policy"),
        ("completions", {"prompt": "a", "priority": 21}, "priority", "-20 to 20"),
        ("completions", {"prompt": "a", "priority": -(2**70)}, "priority", "-20 to 20"),
        ("completions", {"prompt": "a", "seed": 2**64}, "seed", "integer from"),
        ("completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ("completions", {"prompt": "a " * 10000}, "prompt", "cannot fit"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": []}, "prompt", "empty"),
        ("completions", {"prompt": [[]]}, "prompt", "at least one token"),
        ("completions", {"prompt": ["a"] * 300}, "prompt", "at most 256"),
        ("completions", {"prompt": ["a", 1]}, "prompt", "texts or a list of token ids"),
        ("completions", {"prompt": [1, -1]}, "prompt", "got -1"),
        ("completions", {"prompt": [1, 267]}, "prompt", "got 267"),
        ("completions", {"prompt": [1] * 256}, "prompt", "fewer than 256 tokens"),
        ("completions", {"prompt": "q" * 300}, "prompt", "fewer than 256 tokens"),
        ("completions", {"prompt": "a", "model": "gpt-4"}, "model", "not served"),
        ("completions", {}, "prompt", "missing"),
        ("chat/completions", {"messages": []}, "messages", "at least one message"),
        ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "empty"),
        ("chat/completions", {"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role", "bot"),
        ("chat/completions", {"messages": [{"role": "user", "kontent": "a"}]}, "messages[0].kontent", "'content'"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs", "logprobs"),
        ("chat/completions", {"messages": MESSAGES, "functions": []}, "functions", "use tools"),
        ("chat/completions", {"messages": MESSAGES, "chat_template": "x"}, "chat_template", "own template"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content",
            "text only",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_by_name(server, path, body, param, says):
    response = server.post(f"/v1/{path}", body)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400), error
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json", 400),
        (b"{", "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"metadata":' + b'{"a":' * 100_000, "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', "application/json", 413),
    ],
    ids=["NaN", "infinite", "cut", "not UTF-8", "deep", "surrogate", "another type", "large"],
)
def test_bodies_that_are_no_request(server, content, kind, status):
    response = server.client.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert response.json()["error"]["message"]


# ---- tokens and the rest -------------------------------------------------------------------------------------------


def test_tokens_and_back(server):
    tokens = server.post("/tokenize", {"prompt": "the hen", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 256
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "the hen"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "the hen"}]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json() == {"prompt": "[user]the hen\n[assistant]"}
    assert server.post("/detokenize", {"tokens": [999]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400


def test_the_model_has_its_directorys_name(server, tiny_model_dir):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == tiny_model_dir.name
    assert model["max_model_len"] == 256
    assert server.complete(model=model["id"], max_tokens=1).json()["model"] == model["id"]


def test_unknown_paths_and_methods_have_openais_shape(server):
    for response in (server.get("/v1/nothing"), server.get("/v1/completions")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["message"]


def test_every_answer_has_a_request_id_the_clients_if_it_is_plain(server):
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.get("/health", headers={"X-Request-Id": 'a" forged=1'}).headers["x-request-id"].isalnum()
    named = server.complete(max_tokens=1)
    assert named.headers["x-request-id"] in named.json()["id"]


def test_the_description_covers_every_endpoint(server):
    from octavo.server.app import ENDPOINTS

    document = server.get("/openapi.json").json()
    for endpoint in ENDPOINTS:
        operation = document["paths"][endpoint.path][endpoint.method.lower()]
        assert operation["summary"]
        if endpoint.body is not None:
            name = endpoint.body.__name__
            properties = document["components"]["schemas"][name]["properties"]
            assert set(properties) == set(endpoint.body.__struct_fields__)


def test_metrics_have_vllms_names_and_the_wastes(server):
    server.complete(**GREEDY)
    text = server.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_success_total",
        'octavo:kv_cache_bytes{part="internal"}',
        "octavo:kv_cache_waste_ratio",
    ):
        assert name in text
    assert float(text.split("vllm:generation_tokens_total{")[1].split("} ")[1].split("\n")[0]) >= 6


def test_clients_cannot_make_up_labels_of_the_metrics(server):
    for number in range(3):
        server.client.request(f"METHOD{number}", f"/path{number}")
    text = server.get("/metrics").text
    assert 'method="other",path="other"' in text
    assert "METHOD" not in text
    assert "/path" not in text


def test_the_memory_report_sums_to_the_cache(server):
    report = server.memory()
    assert set(report) == set(Memory.__struct_fields__)
    assert (
        sum(report[part] for part in ("used", "reserved", "internal", "external", "cached", "free")) == report["cache"]
    )
