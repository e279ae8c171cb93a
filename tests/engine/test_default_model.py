"""Real weights: greedy tokens are those of transformers, whatever the engine does with the request.

The reference (tests/data, made by tests/make_default_model_reference.py) holds tokens and margins, a margin being the
distance to the runner-up's logit. Weights unpacked to fp32 must agree to the end (the smallest margin is 0.013).
Weights kept in 4 bits are multiplied with activations rounded to 8 bits, which moves logits by some tenths. They should
agree up to the first margin below NEAR_TIE and do not always (seen to differ at 0.32): an open fault, marked as such
where it shows.
"""

import json
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.engine.llm_engine import LLMEngine
from octavo.engine.options import EngineOptions
from octavo.models import default_model_path, load_model

pytestmark = pytest.mark.real_model

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "default_model_greedy.json").read_text())["entries"]
PROMPTS = [entry["prompt_token_ids"] for entry in REFERENCE]
NEAR_TIE = 0.25
KV_BYTES = 2 * 30 * 3 * 64 * 4  # per token: keys and values, layers, heads, head_dim, fp32
ROUNDED = "activations rounded to int8 move a greedy token at a margin of 0.32: open, see docs/log.md"


@pytest.fixture
def known_fault(request, loaded):
    """The test fails with weights kept in 4 bits, and says so when it no longer does."""
    if is_quantised(loaded):
        request.applymarker(pytest.mark.xfail(reason=ROUNDED, strict=True, raises=AssertionError))


@pytest.fixture(scope="module", params=["unpacked", "quantised"])
def loaded(request):
    return load_model(default_model_path(), progress=False, keep_quantized=request.param == "quantised")


def run(loaded, params=None, prompts=PROMPTS, num_blocks=256, **options):
    options = EngineOptions(kv_cache_memory=num_blocks * 16 * KV_BYTES, max_model_len=512, device="cpu", **options)
    llm = LLM.from_engine(LLMEngine.from_loaded(loaded, options))
    outputs = llm.generate(prompts, params or SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    llm.engine.check_integrity()
    return llm, outputs


def is_quantised(loaded):
    return "kept quantised" in " ".join(loaded.held)


def assert_agrees(loaded, token_ids, entry):
    expected, margins = entry["token_ids"], entry["margins"]
    near_ties = (i for i, m in enumerate(margins) if m < NEAR_TIE)
    sure = next(near_ties, len(expected)) if is_quantised(loaded) else len(expected)
    assert token_ids[:sure] == expected[:sure]


@pytest.mark.usefixtures("known_fault")
def test_batched_chunked_and_cached(loaded):
    """Prompts in chunks of 64 tokens beside decodes; then again, from the prefix cache."""
    llm, outputs = run(loaded, max_num_batched_tokens=64, max_num_seqs=16)
    for output, entry in zip(outputs, REFERENCE, strict=True):
        assert_agrees(loaded, output.outputs[0].token_ids, entry)
    again = llm.generate(PROMPTS[6:], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert [output.num_cached_tokens for output in again] == [192, 32, 32, 32]
    for output, entry in zip(again, REFERENCE[6:], strict=True):
        assert_agrees(loaded, output.outputs[0].token_ids, {key: value[:12] for key, value in entry.items()})


def test_alone_and_as_one_of_many_candidates(loaded):
    for i in (0, 7):
        params = SamplingParams(temperature=0, max_tokens=20, n=2)
        _, (output,) = run(loaded, params, PROMPTS[i : i + 1], enable_prefix_caching=False)
        for candidate in output.outputs:
            assert_agrees(loaded, candidate.token_ids, {key: value[:20] for key, value in REFERENCE[i].items()})


@pytest.mark.usefixtures("known_fault")
def test_preempted(loaded):
    """Too few blocks for all: some give theirs up and are computed again."""
    params = SamplingParams(temperature=0, max_tokens=30)
    llm, outputs = run(loaded, params, PROMPTS[:4], num_blocks=7, max_num_seqs=8)
    assert llm.engine.scheduler.num_preemptions > 0
    for output, entry in zip(outputs, REFERENCE, strict=False):
        assert_agrees(loaded, output.outputs[0].token_ids, {key: value[:30] for key, value in entry.items()})
