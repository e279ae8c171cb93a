"""Outputs take the form that was asked for, whatever the engine does with the request; hostile forms are refused."""

import asyncio
import json
import re
import time

import pytest

from octavo import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from octavo.engine.grammar_check import GrammarChecker
from octavo.engine.structured_output import MAX_CHOICES, MAX_REGEX_CHARS, MAX_SCHEMA_CHARS
from octavo.models import default_model_path

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EQUATION = 'start: NUMBER (OP NUMBER)~0..2\nNUMBER: /[1-9][0-9]?/\nOP: "+" | "-"'


def form(max_tokens=60, **fields) -> SamplingParams:
    options = {name: fields.pop(name) for name in ("n", "seed", "temperature", "logprobs") if name in fields}
    return SamplingParams(max_tokens=max_tokens, structured_outputs=fields, **({"seed": 1} | options))


def drain(engine) -> dict:
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    return outputs


def is_person(text: str) -> bool:
    person = json.loads(text)
    return list(person) == ["name", "age"] and isinstance(person["name"], str) and 0 <= person["age"] <= 99


FORMS = {
    "json": ({"json": PERSON}, is_person),
    "json as text": ({"json": json.dumps(PERSON)}, is_person),
    "regex": ({"regex": r"\d{3}-[a-f]{2}"}, re.compile(r"[0-9]{3}-[a-f]{2}", re.ASCII).fullmatch),
    "slash": ({"regex": r"a/b\w"}, re.compile(r"a/b\w", re.ASCII).fullmatch),
    "choice": ({"choice": ['say "hi"\n', "naïve \\ 漢", "b"]}, ['say "hi"\n', "naïve \\ 漢", "b"].__contains__),
    "grammar": ({"grammar": EQUATION}, re.compile(r"[1-9][0-9]?([+-][1-9][0-9]?){0,2}").fullmatch),
    "gbnf": ({"grammar": 'root ::= "yes" | "no"'}, ["yes", "no"].__contains__),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form(make_engine, name):
    fields, takes_it = FORMS[name]
    engine = make_engine(max_model_len=200, num_blocks=200)
    for i in range(4):
        engine.add_request(str(i), "a", form(160, seed=i, **fields))
    outputs = drain(engine)
    finished = [o.text for output in outputs.values() for o in output.outputs if o.finish_reason == "stop"]
    assert len(finished) == 4
    assert all(takes_it(text) for text in finished), finished


def test_neighbours_without_a_form_draw_the_same_tokens(make_engine):
    alone, beside = make_engine(), make_engine()
    for engine in (alone, beside):
        engine.add_request("free", "the hen", SamplingParams(seed=5, max_tokens=20))
        engine.add_request("greedy", "the rain", SamplingParams(temperature=0, max_tokens=20))
    for i, text in enumerate(("abc", "on")):
        beside.add_request(str(i), "a", form(choice=[text], n=2))
    free, mixed = drain(alone), drain(beside)
    for name in ("free", "greedy"):
        assert mixed[name].outputs[0].token_ids == free[name].outputs[0].token_ids
    assert [o.text for i in "01" for o in mixed[i].outputs] == ["abc", "abc", "on", "on"]


def test_candidates_keep_their_own_state(make_engine):
    """n candidates fork after their first token; each goes on by what it drew itself."""
    engine = make_engine()
    engine.add_request("0", "a", form(choice=["aa1", "ab2", "ba3", "bb4"], n=8))
    texts = {o.text for o in drain(engine)["0"].outputs}
    assert len(texts) > 1
    assert texts <= {"aa1", "ab2", "ba3", "bb4"}


def test_preempted_and_cached_prompts_go_on_in_form(make_engine):
    prompt = "0123456789" * 3
    engine = make_engine(num_blocks=20)
    for i in range(4):
        engine.add_request(str(i), prompt, form(40, seed=i, regex="[abc]{40}"))
    outputs = drain(engine)
    assert engine.scheduler.num_preemptions > 0
    assert any(output.num_cached_tokens for output in outputs.values())
    assert all(re.fullmatch("[abc]{1,40}", output.text) for output in outputs.values())


def test_an_abort_and_a_failed_step_leave_nothing_behind(make_engine, monkeypatch):
    engine = make_engine()
    for name in "ab":
        engine.add_request(name, "a", form(40, regex="[ab]{30}", n=2))
    for _ in range(4):
        engine.step()
    engine.abort("a")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda *args: 1 / 0)
        (failed,) = engine.step()
    assert {o.finish_reason for o in failed.outputs} == {"error"}
    engine.check_integrity()
    assert not engine._grammars
    assert not engine._grammars._progress
    engine.add_request("c", "a", form(choice=["ok"]))
    assert drain(engine)["c"].text == "ok"


def test_logprobs_are_the_models_own(make_engine):
    """Reported before the mask, as with every other rule."""
    engine = make_engine()
    engine.add_request("free", "the", SamplingParams(temperature=0, max_tokens=1, logprobs=3))
    engine.add_request("formed", "the", form(temperature=0, choice=["zq"], logprobs=3))
    outputs = drain(engine)
    likeliest = dict(list(outputs["free"].outputs[0].logprobs[0].items())[:3])
    assert outputs["formed"].text == "zq"
    assert outputs["formed"].outputs[0].logprobs[0].items() >= likeliest.items()


def test_max_tokens_may_cut_a_form_short(make_engine):
    engine = make_engine()
    engine.add_request("0", "a", form(3, regex="[ab]{30}"))
    output = drain(engine)["0"].outputs[0]
    assert (len(output.text), output.finish_reason) == (3, "length")


def test_streams_and_the_asynchronous_engine(make_engine):
    llm = LLM.from_engine(make_engine())
    assert "".join(llm.stream("a", form(choice=["streamed"]))) == "streamed"

    async def ask():
        async with AsyncLLM.from_engine(make_engine()) as llm:
            async for output in llm.generate("a", form(choice=["later"])):
                text = output.text
            with pytest.raises(ValueError, match=r"structured_outputs\.regex"):
                await anext(llm.generate("a", form(regex="(")))
        return text

    assert asyncio.run(ask()) == "later"


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
        ({"jsn": {}}, "did you mean 'json'"),
        ({"json": "{"}, r"structured_outputs\.json: .* not JSON"),
        ({"json": [1]}, r"structured_outputs\.json: expected a JSON schema"),
        ({"json": {"a": {1, 2}}}, r"structured_outputs\.json: expected plain JSON"),
        ({"json": {"description": "x" * MAX_SCHEMA_CHARS}}, r"structured_outputs\.json: expected at most"),
        ({"regex": ""}, r"structured_outputs\.regex: expected a text"),
        ({"regex": "x" * (MAX_REGEX_CHARS + 1)}, r"structured_outputs\.regex: expected at most"),
        ({"choice": "abc"}, r"structured_outputs\.choice: expected a list"),
        ({"choice": [""]}, r"structured_outputs\.choice: expected a text"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, r"structured_outputs\.choice: expected at most"),
        ({"json_object": 1}, r"structured_outputs\.json_object: expected True"),
    ],
)
def test_malformed_wishes(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(structured_outputs=fields)


@pytest.mark.parametrize(
    "option", [{"allowed_token_ids": [1]}, {"bad_words": ["a"]}, {"min_tokens": 2}, {"ignore_eos": True}]
)
def test_rules_that_could_leave_no_token_are_refused_beside_a_form(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected .* beside structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, **option)


def deep(levels: int) -> dict:
    schema: dict = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


REFUSED = {
    "unclosed group": {"regex": "(a"},
    "back-reference": {"regex": r"(a)\1"},
    "look-around": {"regex": "(?=a)b"},
    "unknown rule": {"grammar": "start: foo"},
    "unknown type": {"json": {"type": "bogus"}},
    "unknown keyword": {"json": {"type": "array", "uniqueItems": True}},
    "reference to a host": {"json": {"$ref": "http://127.0.0.1:9/x"}},
    "depth": {"json": deep(300)},
    "nothing satisfies it": {"json": {"type": "string", "minLength": 3, "maxLength": 2}},
    "wide combination": {
        "json": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(10)
            ]
        }
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsound_and_explosive_forms_are_refused_at_once(make_engine, name):
    fields = REFUSED[name]
    engine = make_engine()
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"structured_outputs\.{next(iter(fields))}: "):
        engine.add_request("0", "a", form(**fields))
    assert time.monotonic() - start < 10
    assert not engine.has_unfinished()


@pytest.fixture
def checker():
    checker = GrammarChecker(max_seconds=1.0)
    yield checker
    checker.close()


def test_a_form_that_never_compiles_is_given_up_in_time(checker):
    endless = StructuredOutputsParams(json={"type": "integer", "multipleOf": 123456789})
    fine = StructuredOutputsParams(json=PERSON)
    checker.check(fine)
    start = time.monotonic()
    with pytest.raises(ValueError, match="expected one that compiles within 1 s"):
        checker.check(endless)
    assert time.monotonic() - start < 3
    start = time.monotonic()
    with pytest.raises(ValueError, match="within 1 s"):
        checker.check(endless)
    assert time.monotonic() - start < 0.1, "known by now"
    assert "PERSON" not in checker.check(fine)
    assert checker.check(StructuredOutputsParams(choice=["after"])), "a new worker took over"


def test_a_worker_that_dies_refuses_one_form_and_is_replaced(checker):
    checker.check(StructuredOutputsParams(choice=["a"]))
    checker._worker.kill()
    checker._worker.wait()
    assert checker.check(StructuredOutputsParams(choice=["b"]))


def test_a_grammar_that_gives_up_on_the_way_ends_only_its_request(make_engine, monkeypatch):
    engine = make_engine()
    engine.add_request("bad", "a", form(30, regex="[ab]{20}"))
    engine.add_request("good", "a", form(30, seed=2, regex="[ab]{20}"))
    engine.step()
    (seq,) = engine.scheduler.requests["bad"].sequences
    engine._grammars._progress[seq.seq_id].matcher.consume_token(engine.tokenizer.encode("z")[0])  # into an error
    outputs = drain(engine)
    bad = outputs["bad"].outputs[0]
    assert bad.finish_reason == "error"
    assert "more work than is allowed" in bad.stop_reason
    assert re.fullmatch("[ab]{20}", outputs["good"].text)


def test_no_tokenizer_no_form(make_engine):
    engine = make_engine()
    engine._grammar_compiler = None
    with pytest.raises(ValueError, match="structured_outputs: expected none"):
        engine.add_request("0", [1], form(choice=["a"]))


# ---- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_default_model_fills_a_schema():
    llm = LLM(default_model_path(), max_model_len=512, kv_cache_memory=100 << 20, progress=False)
    prompt = llm.chat_prompt([{"role": "user", "content": "Describe Bob, who is 30 years old, as JSON."}])
    params = SamplingParams(temperature=0, max_tokens=80, structured_outputs={"json": PERSON})
    assert json.loads(llm.generate(prompt, params, use_tqdm=False)[0].text)["name"] == "Bob"
    with pytest.raises(ValueError, match="more work than is allowed"):  # its vocabulary has runs of "aaaa…"
        llm.generate("a", form(regex="((a{100}){100}){100}"))
    params = SamplingParams(temperature=0, max_tokens=80, structured_outputs={"choice": ["Paris", "Rome"]})
    assert llm.generate("The capital of France is ", params, use_tqdm=False)[0].text == "Paris"
