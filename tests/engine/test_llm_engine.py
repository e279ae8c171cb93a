"""The engine answers as transformers does, whatever happens around a request; and what it refuses, it says why."""

import pytest
import torch

from octavo import BeamSearchParams, SamplingParams

PROMPTS = ["the hen in the rain", "a", "on and on and on she ran, then other things", "0123456789" * 4, "äöü 漢字"]


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, **({"max_tokens": 12} | options))


def run(engine, prompts, params) -> dict:
    """Runs prompts to their end with integrity checked after every step; the outputs by request id."""
    params = params if isinstance(params, list) else [params] * len(prompts)
    for i, (prompt, its) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, its)
    return drain(engine)


def drain(engine) -> dict:
    outputs = {}
    while engine.has_unfinished():
        for output in engine.step():
            assert output.request_id not in outputs
            outputs[output.request_id] = output
        engine.check_integrity()
    return outputs


def tokens_of(outputs) -> list[list[int]]:
    return [outputs[str(i)].outputs[0].token_ids for i in range(len(outputs))]


@pytest.fixture(scope="module")
def reference_tokens(tiny_reference, tiny_loaded):
    """transformers' greedy tokens of each prompt, 12 at most."""

    def generate(prompt: str) -> list[int]:
        ids = torch.tensor([tiny_loaded.tokenizer.encode(prompt)])
        out = tiny_reference.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        return out[0, ids.shape[1] :].tolist()

    return [generate(prompt) for prompt in PROMPTS]


# ---- right ---------------------------------------------------------------------------------------------------------


def test_greedy_tokens_alone(make_engine, reference_tokens):
    for prompt, expected in zip(PROMPTS, reference_tokens, strict=True):
        assert tokens_of(run(make_engine(), [prompt], greedy())) == [expected]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 8},  # prompts in chunks of at most 8, mixed with decodes
        {"num_blocks": 20},  # too few for all: some are preempted
        {"block_size": 1, "num_blocks": 300},
        {"block_size": 7},
        {"max_num_seqs": 2},
    ],
    ids=str,
)
def test_greedy_tokens_in_a_batch(make_engine, reference_tokens, options):
    engine = make_engine(**options)
    assert tokens_of(run(engine, PROMPTS, greedy())) == reference_tokens
    again = run(engine, PROMPTS, greedy())
    assert tokens_of(again) == reference_tokens
    cached = again["2"].num_cached_tokens
    assert (cached > 0) == engine.config.enable_prefix_caching if engine.config.num_blocks > 20 else True
    assert (engine.scheduler.num_preemptions > 0) == (options == {"num_blocks": 20})


def test_all_candidates_of_a_greedy_request_are_the_same(make_engine, reference_tokens):
    output = run(make_engine(), PROMPTS[:1], greedy(n=3))["0"]
    assert [o.token_ids for o in output.outputs] == [reference_tokens[0]] * 3
    assert [o.index for o in output.outputs] == [0, 1, 2]


def test_candidates_share_the_blocks_of_the_prompt(make_engine):
    engine = make_engine()
    engine.add_request("0", "0123456789ab", SamplingParams(n=4, max_tokens=4, seed=1))
    engine.step()
    assert engine.config.num_blocks - engine.scheduler.blocks.num_free_blocks == 3
    assert len({tuple(o.token_ids) for o in drain(engine)["0"].outputs}) > 1


SAMPLED = [
    SamplingParams(seed=7, max_tokens=9),
    SamplingParams(seed=8, max_tokens=9, top_p=0.8, temperature=1.5, n=2),
    SamplingParams(seed=-3, max_tokens=9, top_k=5, min_p=0.01),
    SamplingParams(seed=7, max_tokens=9, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(seed=0, max_tokens=9, logprobs=2, min_tokens=5),
]


@pytest.mark.parametrize("options", [{}, {"num_blocks": 14}, {"max_num_batched_tokens": 8}], ids=str)
def test_a_seed_gives_the_same_tokens_in_any_company(make_engine, options):
    alone = [run(make_engine(), [p], s)["0"] for p, s in zip(PROMPTS, SAMPLED, strict=True)]
    together = run(make_engine(**options), PROMPTS, SAMPLED)
    for i, output in enumerate(alone):
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in together[str(i)].outputs]


def test_a_request_without_a_seed_follows_the_engines(make_engine):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first, same, other = (run(make_engine(seed=s), ["the"], params)["0"].text for s in (1, 1, 2))
    assert first == same != other


def test_logprobs_are_those_of_transformers(make_engine, tiny_reference):
    """Also after penalties and temperature: what is reported is the model's own distribution."""
    params = SamplingParams(
        seed=5, max_tokens=6, logprobs=3, prompt_logprobs=2, temperature=0.7, repetition_penalty=1.5
    )
    for options in ({}, {"max_num_batched_tokens": 8}, {"num_blocks": 9}):
        outputs = run(make_engine(**options), PROMPTS[:2] * 2, params)
        for output in outputs.values():
            prompt, completion = output.prompt_token_ids, output.outputs[0]
            with torch.inference_mode():
                expected = tiny_reference(torch.tensor([prompt + completion.token_ids])).logits[0].log_softmax(-1)
            assert output.prompt_logprobs[0] is None
            reported = output.prompt_logprobs[1:] + completion.logprobs
            assert len(reported) == len(prompt) - 1 + len(completion.token_ids)
            for position, entry in enumerate(reported):
                row = expected[position]
                token = (prompt + completion.token_ids)[position + 1]
                count = 2 if position < len(prompt) - 1 else 3
                assert set(entry) == {token, *row.topk(count).indices.tolist()}
                for token_id, logprob in entry.items():
                    assert logprob.logprob == pytest.approx(row[token_id].item(), abs=2e-4)
                    assert logprob.rank == int((row > row[token_id]).sum()) + 1
            total = sum(
                entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
            )
            assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_carry_the_tokens_text(make_engine):
    output = run(make_engine(), ["the"], greedy(logprobs=1, max_tokens=1))["0"]
    token = output.outputs[0].token_ids[0]
    assert output.outputs[0].logprobs[0][token].decoded_token == make_engine().tokenizer.decode([token])


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_text_is_the_decoded_tokens(make_engine):
    outputs = run(make_engine(), PROMPTS, greedy())
    for output in outputs.values():
        assert output.text == make_engine().tokenizer.decode(output.outputs[0].token_ids)
        assert output.outputs[0].finish_reason == ("length" if len(output.outputs[0].token_ids) == 12 else "stop")


def test_a_stop_string_ends_the_text(make_engine):
    whole = run(make_engine(), PROMPTS[:1], greedy())["0"].text
    assert "\ufffd" not in whole[:4]
    stop = whole[1:4]
    cut = run(make_engine(), PROMPTS[:1], greedy(stop=stop))["0"].outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
    kept = run(make_engine(), PROMPTS[:1], greedy(stop=stop, include_stop_str_in_output=True))["0"]
    assert kept.text == whole[: whole.index(stop) + 3]


def test_a_stop_token_ends_the_text(make_engine, reference_tokens):
    token = reference_tokens[0][4]
    output = run(make_engine(), PROMPTS[:1], greedy(stop_token_ids=[token]))["0"].outputs[0]
    assert output.stop_reason == token
    assert output.token_ids == reference_tokens[0][: reference_tokens[0].index(token) + 1]
    assert output.text == make_engine().tokenizer.decode(output.token_ids[:-1])


def test_end_of_sequence_waits_for_min_tokens(make_engine):
    end = {256: 100.0}
    assert run(make_engine(), ["a"], greedy(logit_bias=end))["0"].outputs[0].token_ids == [256]
    output = run(make_engine(), ["a"], greedy(logit_bias=end, min_tokens=4))["0"].outputs[0]
    assert len(output.token_ids) == 5
    assert output.token_ids[4] == 256
    assert 256 not in output.token_ids[:4]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert len(run(make_engine(), ["a"], greedy(logit_bias=end, ignore_eos=True))["0"].outputs[0].token_ids) == 12


def test_special_tokens_are_hidden_unless_asked_for(make_engine):
    bias = {256: 100.0}
    shown = greedy(logit_bias=bias, ignore_eos=True, max_tokens=2, skip_special_tokens=False)
    assert run(make_engine(), ["a"], shown)["0"].text == "<end><end>"
    hidden = greedy(logit_bias=bias, ignore_eos=True, max_tokens=2)
    assert run(make_engine(), ["a"], hidden)["0"].text == ""


def test_the_context_ends_a_request(make_engine):
    engine = make_engine(max_model_len=16)
    output = run(engine, [[1] * 10], greedy(max_tokens=None, ignore_eos=True))["0"].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_no_text_without_detokenize(make_engine, reference_tokens):
    output = run(make_engine(), PROMPTS[:1], greedy(detokenize=False))["0"]
    assert (output.text, output.outputs[0].token_ids) == ("", reference_tokens[0])


# ---- streams and aborts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.0, "seed": 5}, {"logprobs": 2, "stop": ["\x00"]}])
def test_a_stream_reports_every_token_once(make_engine, options):
    engine = make_engine()
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12} | options)
    engine.add_request("s", PROMPTS[0], params, stream=True)
    engine.add_request("w", PROMPTS[0], params)
    seen = []
    while engine.has_unfinished():
        seen += engine.step()
    streamed = [output for output in seen if output.request_id == "s"]
    (whole,) = (output for output in seen if output.request_id == "w")
    assert all(len(piece.token_ids) == 1 for output in streamed for piece in output.outputs)
    assert [output.finished for output in streamed] == [False] * (len(streamed) - 1) + [True]
    together = streamed[0]
    for piece in streamed[1:]:
        assert piece.prompt_token_ids == []
        together.extend(piece)
    for got, expected in zip(together.outputs, whole.outputs, strict=True):
        assert (got.index, got.text, got.token_ids) == (expected.index, expected.text, expected.token_ids)
        assert (got.finish_reason, got.stop_reason) == (expected.finish_reason, expected.stop_reason)
        assert [list(entry) for entry in got.logprobs or []] == [list(entry) for entry in expected.logprobs or []]
    assert together.prompt_token_ids == whole.prompt_token_ids


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_abort_gives_the_blocks_back_at_once(make_engine, reference_tokens, steps):
    engine = make_engine(enable_prefix_caching=False, max_num_batched_tokens=8)
    engine.add_request("doomed", PROMPTS[3], greedy(n=2))
    engine.add_request("0", PROMPTS[0], greedy())
    for _ in range(steps):
        engine.step()
    output = engine.abort("doomed")
    assert output.finished
    assert {o.finish_reason for o in output.outputs} == {"abort"}
    engine.check_integrity()
    assert engine.abort("doomed") is None
    assert tokens_of(drain(engine)) == reference_tokens[:1]
    assert engine.scheduler.blocks.num_free_blocks == engine.config.num_blocks


def test_a_failing_step_ends_its_requests_and_no_others(make_engine, reference_tokens, monkeypatch, caplog):
    engine = make_engine(max_num_seqs=1)
    engine.add_request("bad", PROMPTS[1], greedy())
    engine.add_request("0", PROMPTS[0], greedy())
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda *step: 1 / 0)
        (failed,) = engine.step()
    assert (failed.request_id, failed.outputs[0].finish_reason) == ("bad", "error")
    assert "ZeroDivisionError" in caplog.text
    assert tokens_of(drain(engine)) == reference_tokens[:1]


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: expected a text of at least one token"),
        ([], {}, "prompt_token_ids: expected at least one"),
        ([1, -1], {}, r"prompt_token_ids: expected integers from 0 to 266 .*got -1 at position 1"),
        ([1, 267], {}, r"prompt_token_ids: .*got 267 at position 1"),
        ([1, 2.0], {}, r"prompt_token_ids: .*got 2.0"),
        ([True], {}, r"prompt_token_ids: .*got True"),
        ([1, "a"], {}, r"prompt_token_ids: .*got 'a'"),
        ([1] * 64, {}, r"prompt_token_ids: expected fewer than max_model_len \(64\)"),
        ([1] * 50, {}, r"prompt_token_ids: 50 tokens need 13 blocks .* has 12"),
        ("a", {"n": 9}, r"n: expected at most max_num_seqs \(8\), got 9"),
        ("a", {"logit_bias": {267: 1.0}}, r"logit_bias: expected token ids below 267"),
        ("a", {"allowed_token_ids": [3, 300]}, r"allowed_token_ids: expected token ids below 267 .*got 300"),
        ("a", {"stop_token_ids": [267]}, r"stop_token_ids: expected token ids below 267"),
        ("a", {"allowed_token_ids": [256], "min_tokens": 1}, r"allowed_token_ids: expected one that min_tokens"),
        ("a", {"allowed_token_ids": [97], "bad_words": ["a"]}, r"allowed_token_ids: expected one that"),
    ],
)
def test_what_cannot_be_served_is_refused_and_changes_nothing(make_engine, reference_tokens, prompt, options, message):
    engine = make_engine(num_blocks=12, max_model_len=64)
    engine.add_request("0", PROMPTS[0], greedy())
    with pytest.raises(ValueError, match=message):
        engine.add_request("refused", prompt, greedy(**options))
    engine.check_integrity()
    assert tokens_of(drain(engine)) == reference_tokens[:1]


def test_an_id_in_use_is_refused(make_engine):
    engine = make_engine()
    engine.add_request("x", "a", greedy())
    with pytest.raises(ValueError, match="request_id: 'x' is in use"):
        engine.add_request("x", "b", greedy())
    drain(engine)
    engine.add_request("x", "b", greedy())
    drain(engine)


# ---- beam search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 13, "max_num_batched_tokens": 8}], ids=str)
def test_beams_are_those_of_transformers(make_engine, tiny_reference, width, length_penalty, options):
    engine = make_engine(**options)
    params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=length_penalty)
    outputs = run(engine, PROMPTS[:3], params)
    for output in outputs.values():
        ids = torch.tensor([output.prompt_token_ids])
        expected = tiny_reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=10,
            do_sample=False,
            length_penalty=length_penalty,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=256,
        )
        for beam, tokens, i in zip(
            output.outputs, expected.sequences[:, ids.shape[1] :].tolist(), range(width), strict=True
        ):
            assert beam.token_ids == tokens[: len(beam.token_ids)]
            assert set(tokens[len(beam.token_ids) :]) <= {256}
            if width > 1:
                score = beam.cumulative_logprob / len(beam.token_ids) ** length_penalty
                assert score == pytest.approx(expected.sequences_scores[i].item(), abs=1e-4)


def test_beams_fork_copy_on_write(make_engine):
    """4 beams of a 3-block prompt never hold 4 copies of it."""
    engine = make_engine(enable_prefix_caching=False)
    engine.add_request("b", [65] * 12, BeamSearchParams(beam_width=4, max_tokens=3))
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.config.num_blocks - engine.scheduler.blocks.num_free_blocks)
    assert 3 <= most <= 3 + 4


def test_an_aborted_beam_search_says_so(make_engine):
    engine = make_engine()
    engine.add_request("b", "the", BeamSearchParams(beam_width=3, max_tokens=9))
    for _ in range(4):
        engine.step()
    assert [o.finish_reason for o in engine.abort("b").outputs] == ["abort"]
    engine.check_integrity()
    assert engine.scheduler.blocks.num_free_blocks == engine.config.num_blocks
