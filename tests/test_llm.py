"""`LLM`: what a user writes, and what it answers to mistakes."""

import os
import signal
import threading

import pytest

from octavo import LLM, BeamSearchParams, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def llm(make_engine):
    return LLM.from_engine(make_engine())


@pytest.fixture
def generations(llm):
    """What is expected of the prompts "a" and "the hen"."""
    return [llm.generate(prompt, GREEDY)[0].text for prompt in ("a", "the hen")]


def test_a_model_from_a_directory(tiny_model_dir, generations):
    llm = LLM(tiny_model_dir, dtype="float32", device="cpu", kv_cache_memory=1 << 20, max_model_len=64)
    assert llm.generate("a", GREEDY)[0].text == generations[0]
    assert llm.engine.config.max_model_len == 64


def test_every_form_of_prompt(llm, generations):
    ids = llm.tokenizer.encode("a")
    for prompts in ("a", ["a"], ids, [ids], {"prompt": "a"}, {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}]):
        (output,) = llm.generate(prompts, GREEDY)
        assert output.text == output.outputs[0].text == generations[0]
        assert output.prompt_token_ids == ids


def test_outputs_come_in_the_order_of_the_prompts(llm, generations):
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=1), GREEDY]
    first, short, third = llm.generate(["a", "b", "the hen"], params)
    assert [first.text, third.text] == generations
    assert len(short.outputs[0].token_ids) == 1


def test_priority_decides_who_runs_first(make_engine):
    llm = LLM.from_engine(make_engine(max_num_seqs=1, scheduling_policy="priority"))
    slow, fast = llm.generate(["a", "b"], GREEDY, priority=[5, -1])
    assert fast.metrics.first_scheduled_time < slow.metrics.first_scheduled_time


def test_chat_uses_the_models_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert llm.tokenizer.decode(output.prompt_token_ids) == "[user]hi\n[assistant]"
    assert output.text == llm.generate("[user]hi\n[assistant]", GREEDY)[0].text
    assert [o.text for o in llm.chat([messages, messages], GREEDY)] == [output.text] * 2


def test_stream_gives_the_text_in_pieces(llm, generations):
    pieces = list(llm.stream("the hen", GREEDY))
    assert "".join(pieces) == generations[1]
    assert all(pieces)


def test_a_stream_that_is_left_early_gives_its_blocks_back(make_engine):
    llm = LLM.from_engine(make_engine(enable_prefix_caching=False))
    stream = llm.stream("the hen", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.engine.scheduler.blocks.num_free_blocks == llm.engine.config.num_blocks


def test_streams_and_calls_interleave(llm, generations):
    stream = llm.stream("the hen", GREEDY)
    pieces = [next(stream)]
    assert llm.generate("a", GREEDY)[0].text == generations[0]
    assert "".join(pieces + list(stream)) == generations[1]


def test_beam_search_gives_the_likeliest_first(llm):
    (output,) = llm.beam_search("the", BeamSearchParams(beam_width=3, max_tokens=5))
    scores = [o.cumulative_logprob / len(o.token_ids) for o in output.outputs]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    greedy = llm.generate("the", SamplingParams(temperature=0, max_tokens=5, logprobs=0))[0].outputs[0]
    assert scores[0] >= greedy.cumulative_logprob / len(greedy.token_ids) - 1e-5


def test_the_models_own_defaults_are_used_where_none_are_given(llm):
    llm.engine.generation_defaults = {"temperature": 0.0, "top_k": 3}
    assert llm.default_params() == SamplingParams(temperature=0.0, top_k=3)
    assert llm.generate("a")[0].text == llm.generate("a", SamplingParams(temperature=0))[0].text


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([], GREEDY, "prompts: expected a prompt or a list of at least one, got"),
        ("", GREEDY, "prompt: expected a text of at least one token"),
        (["a", ""], GREEDY, "prompt: expected a text"),
        ([[]], GREEDY, "prompt_token_ids: expected at least one"),
        ([3, "a"], GREEDY, "prompt_token_ids: expected integers"),
        (7, GREEDY, "prompts: expected a prompt"),
        ([None], GREEDY, "prompts: expected text or a list of token ids, got NoneType"),
        ({"promt": "a"}, GREEDY, r"prompts: expected a dict .* got \['promt'\]"),
        ({"prompt": [1]}, GREEDY, "prompt: expected text, got list"),
        ({"prompt_token_ids": "a"}, GREEDY, "prompt_token_ids: expected a list of token ids, got str"),
        (["a", "b"], [GREEDY], "sampling_params: expected one for all, or one for each of the 2 prompts, got 1"),
        ("a", {"temperature": 0}, "sampling_params: expected SamplingParams"),
        ("\ud800", GREEDY, "surrogate"),
    ],
)
def test_mistakes_name_the_field_and_run_nothing(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert llm.engine.num_unfinished == 0
    llm.engine.check_integrity()


def test_mistakes_of_other_calls(llm):
    with pytest.raises(ValueError, match="messages: expected at least one"):
        llm.chat([], GREEDY)
    with pytest.raises(ValueError, match="n=1"):
        llm.stream("a", SamplingParams(n=2))
    with pytest.raises(ValueError, match="params: expected BeamSearchParams"):
        llm.beam_search("a", GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_memry": 1}, "kv_cache_memry: unknown option; did you mean 'kv_cache_memory'"),
        ({"gpu": True}, "gpu: unknown option; known: model, dtype"),
        ({"block_size": 0}, "block_size: expected an integer of at least 1, got 0"),
        ({"block_size": True}, "block_size: expected an integer"),
        ({"max_model_len": 1000}, "max_model_len: expected at most the model's context of 256 tokens, got 1000"),
        ({"kv_cache_memory": 100}, "kv_cache_memory: expected at least one block of 16 tokens"),
        ({"kv_cache_memory": 1 << 20, "kv_cache_memory_fraction": 0.5}, "kv_cache_memory: expected this or"),
        ({"kv_cache_memory_fraction": 1.5}, "kv_cache_memory_fraction: expected a number above 0"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens: expected at least max_num_seqs"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy: expected 'fcfs' or 'priority'"),
        ({"device": "tpu"}, "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"dtype": "float8"}, "dtype must be"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"load_format": "gguf"}, "load_format: expected 'auto' or 'dummy', got 'gguf'"),
        ({"skip_tokenizer_init": 1}, "skip_tokenizer_init: expected True or False, got 1"),
    ],
)
def test_wrong_options_are_refused(tiny_model_dir, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny_model_dir, **options)


def test_random_weights_from_a_config_alone(tiny_model_dir, tmp_path):
    """What benchmarks run on: no weights, no tokenizer; the same seed gives the same tokens."""
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_memory": 1 << 20, "device": "cpu"}
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    first, second, other = (
        LLM(tmp_path, seed=seed, **options).generate([1, 2, 3], params, use_tqdm=False)[0].outputs[0].token_ids
        for seed in (0, 0, 1)
    )
    assert len(first) == 5
    assert first == second != other
    with pytest.raises(ValueError, match="expected token ids, since this engine has no tokenizer"):
        LLM(tmp_path, **options).generate("text", params)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nothing"):
        LLM(tmp_path / "nothing")


def test_the_cache_can_be_a_fraction_of_free_memory(tiny_model_dir, caplog):
    caplog.set_level("INFO", logger="octavo")
    llm = LLM(tiny_model_dir, kv_cache_memory_fraction=0.001, device="cpu")
    config = llm.engine.config
    assert 0 < config.cache_bytes < 1 << 34
    assert f"{config.num_blocks} blocks of 16 tokens: {config.cache_tokens:,} tokens" in caplog.text
    assert "requests of full length (256 tokens)" in caplog.text


def test_memory_is_accounted_for_now_and_over_a_run(make_engine):
    llm = LLM.from_engine(make_engine(enable_prefix_caching=False))
    block = llm.engine.config.block_bytes
    trace = llm.record_memory()
    stream = llm.stream("the hen", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    next(stream)
    now = llm.memory_report()
    assert now.cache == 64 * block
    assert now.used + now.internal + now.reserved == 2 * block
    assert "internal" in str(now)
    list(stream)
    assert llm.memory_report().free == llm.memory_report().cache
    assert len(trace.samples) == 4
    assert max(sample.used for sample in trace.samples) > 0


def test_an_interrupt_waits_for_the_step_and_leaves_the_engine_whole(llm, generations, monkeypatch):
    """Ctrl-C in the middle of a step: KeyboardInterrupt comes after it, and the next call works."""
    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))
    launch = llm.engine.runner.launch

    def interrupted(output, *masks):
        os.kill(os.getpid(), signal.SIGINT)
        return launch(output, *masks)

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "the hen"], GREEDY)
    monkeypatch.setattr(llm.engine.runner, "launch", launch)
    llm.engine.check_integrity()
    assert llm.engine.num_unfinished == 0
    assert [output.text for output in llm.generate(["a", "the hen"], GREEDY)] == generations


def test_a_failed_step_raises_and_the_next_call_works(llm, generations, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "launch", lambda *step: 1 / 0)
        with pytest.raises(RuntimeError, match="its log holds the reason"):
            llm.generate("a", GREEDY)
    assert llm.generate("a", GREEDY)[0].text == generations[0]
