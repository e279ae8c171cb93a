"""Many callers, one engine: answers arrive, leavers are forgotten at once, and nobody waits for a dead engine."""

import asyncio

import pytest

from octavo.engine.async_engine import AsyncLLM, EngineDeadError
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def run_async(make_engine):
    """Runs `test(llm, engine)` around a fresh engine, then closes it."""

    def run(test, **options):
        engine = make_engine(**options)

        async def main():
            async with AsyncLLM.from_engine(engine) as llm:
                return await test(llm, engine)

        return asyncio.run(asyncio.wait_for(main(), 60))

    return run


async def collect(llm, *args, **options):
    return [output async for output in llm.generate(*args, **options)]


async def free_blocks(llm) -> int:
    def check(engine):
        engine.check_integrity()
        return engine.scheduler.blocks.num_free_blocks

    return await llm.call(check)


def test_callers_get_what_the_synchronous_engine_gives(run_async, make_engine):
    prompts = ["the hen", "a", "on and on"]
    engine = make_engine()
    expected = []
    for prompt in prompts:
        engine.add_request("x", prompt, SHORT)
        while engine.has_unfinished():
            outputs = engine.step()
        expected.append(outputs[0].text)

    async def test(llm, engine):
        outputs = await asyncio.gather(*(collect(llm, prompt, SHORT) for prompt in prompts))
        assert [output[-1].text for output in outputs] == expected
        assert [output[-1].prompt for output in outputs] == prompts
        assert all(output[-1].finished and not any(o.finished for o in output[:-1]) for output in outputs)
        for output in outputs:
            lengths = [len(o.outputs[0].token_ids) for o in output]
            assert lengths == sorted(set(lengths))

    run_async(test)


def test_a_stream_brings_each_token_once_however_slow_its_reader(run_async):
    async def test(llm, engine):
        whole = (await collect(llm, "the hen", LONG))[-1]
        for pause in (0, 0.02):
            pieces = []
            async for piece in llm.stream("the hen", LONG):
                pieces.append(piece)
                await asyncio.sleep(pause)
            token_ids = [token for piece in pieces for output in piece.outputs for token in output.token_ids]
            assert token_ids == whole.outputs[0].token_ids
            assert "".join(piece.text for piece in pieces) == whole.text
            assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]

    run_async(test)


def test_without_stream_only_the_last_output_comes(run_async):
    async def test(llm, engine):
        (output,) = await collect(llm, [1, 2, 3], SHORT, stream=False)
        assert output.finished
        (beams,) = await collect(llm, "the", BeamSearchParams(beam_width=2, max_tokens=4))
        assert len(beams.outputs) == 2

    run_async(test)


@pytest.mark.parametrize("leave", ["cancel", "break", "abort"])
def test_a_caller_that_leaves_frees_its_blocks(run_async, leave):
    async def read(llm, started):
        async for output in llm.generate("the hen", LONG, "leaver"):
            started.set()
            if leave == "break":
                break
            last = output
        return None if leave == "break" else last

    async def test(llm, engine):
        started = asyncio.Event()
        task = asyncio.create_task(read(llm, started))
        other = asyncio.create_task(collect(llm, "a", SHORT))
        await started.wait()
        if leave == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif leave == "abort":
            llm.abort("leaver")
            assert (await task).outputs[0].finish_reason == "abort"
        else:
            await task
        assert (await other)[-1].finished
        for _ in range(3):  # the async generator is closed by the event loop, soon
            await asyncio.sleep(0)
        assert await free_blocks(llm) == engine.config.num_blocks

    run_async(test, enable_prefix_caching=False)


def test_a_refused_request_harms_nobody(run_async):
    async def test(llm, engine):
        good = asyncio.create_task(collect(llm, "a", SHORT, "same"))
        await asyncio.sleep(0)
        for prompt, message in (("", "prompt: expected"), ([999], "got 999"), ([1] * 400, "max_model_len")):
            with pytest.raises(ValueError, match=message):
                await collect(llm, prompt, SHORT)
        with pytest.raises(ValueError, match="request_id: 'same' is in use"):
            await asyncio.gather(collect(llm, "a", LONG, "same"), collect(llm, "a", LONG, "same"))
        assert (await good)[-1].finished

    run_async(test)


def test_a_slow_reader_sees_merged_steps_and_the_end(run_async):
    async def test(llm, engine):
        lengths = []
        async for output in llm.generate("a", LONG):
            lengths.append(len(output.outputs[0].token_ids))
            await asyncio.sleep(0.05)
        assert lengths[-1] == 200
        assert len(lengths) < 100

    run_async(test)


def test_a_dead_engine_tells_everyone(run_async, monkeypatch, caplog):
    async def test(llm, engine):
        waiting = [asyncio.create_task(collect(llm, "a", LONG)) for _ in range(3)]
        await asyncio.sleep(0.05)

        def die(*args):
            raise MemoryError("out")

        monkeypatch.setattr(engine, "step", die)
        for task in waiting:
            with pytest.raises(EngineDeadError, match="MemoryError"):
                await task
        assert not llm.is_running
        with pytest.raises(EngineDeadError, match="MemoryError"):
            await collect(llm, "a", SHORT)
        with pytest.raises(EngineDeadError):
            await llm.check_health()

    run_async(test)
    assert "The engine died" in caplog.text


def test_closing_ends_what_runs(make_engine):
    async def main():
        llm = AsyncLLM.from_engine(make_engine())
        task = asyncio.create_task(collect(llm, "a", LONG))
        await llm.check_health()
        await asyncio.to_thread(llm.close)
        assert (await task)[-1].outputs[0].finish_reason == "abort"
        llm.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await collect(llm, "a", SHORT)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_call_that_raises_raises_in_its_caller(run_async):
    async def test(llm, engine):
        with pytest.raises(ZeroDivisionError):
            await llm.call(lambda engine: 1 / 0)
        await llm.check_health()

    run_async(test)
