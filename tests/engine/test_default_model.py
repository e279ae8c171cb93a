"""Real weights: greedy tokens are those of transformers, whatever the engine does with the request.

The reference (tests/data, made by tests/make_default_model_reference.py) holds the tokens of transformers in fp32 and
their margins, a margin being the distance to the runner-up's logit. The smallest is 0.013. Orders of fp32 sums move a
margin by 1e-4; weights kept in 4 bits, with activations in 16 and keys and values in fp16, by 0.002 (root mean square;
0.02 was the most in 3584 tokens of benchmarks/perplexity.py, where the whole model in fp16 gives 0.009 and 0.05). So
these tokens must agree, to the end.
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


@pytest.fixture(scope="module", params=["unpacked", "quantised"])
def loaded(request):
    return load_model(default_model_path(), progress=False, keep_quantized=request.param == "quantised")


def run(loaded, params=None, prompts=PROMPTS, num_blocks=256, **options):
    kv_bytes = 2 * 30 * 3 * 64 * loaded.model.cache_dtype.itemsize  # of a token: K and V, layers, heads, head_dim
    options = EngineOptions(kv_cache_memory=num_blocks * 16 * kv_bytes, max_model_len=512, device="cpu", **options)
    llm = LLM.from_engine(LLMEngine.from_loaded(loaded, options))
    outputs = llm.generate(prompts, params or SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    llm.engine.check_integrity()
    return llm, outputs


def test_batched_chunked_and_cached(loaded):
    """Prompts in chunks of 64 tokens beside decodes; then again, from the prefix cache."""
    llm, outputs = run(loaded, max_num_batched_tokens=64, max_num_seqs=16)
    for output, entry in zip(outputs, REFERENCE, strict=True):
        assert output.outputs[0].token_ids == entry["token_ids"]
    again = llm.generate(PROMPTS[6:], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert [output.num_cached_tokens for output in again] == [192, 32, 32, 32]
    for output, entry in zip(again, REFERENCE[6:], strict=True):
        assert output.outputs[0].token_ids == entry["token_ids"][:12]


def test_alone_and_as_one_of_many_candidates(loaded):
    for i in (0, 7):
        params = SamplingParams(temperature=0, max_tokens=20, n=2)
        _, (output,) = run(loaded, params, PROMPTS[i : i + 1], enable_prefix_caching=False)
        for candidate in output.outputs:
            assert candidate.token_ids == REFERENCE[i]["token_ids"][:20]


def test_preempted(loaded):
    """Too few blocks for all: some give theirs up and are computed again."""
    params = SamplingParams(temperature=0, max_tokens=30)
    llm, outputs = run(loaded, params, PROMPTS[:4], num_blocks=7, max_num_seqs=8)
    assert llm.engine.scheduler.num_preemptions > 0
    for output, entry in zip(outputs, REFERENCE, strict=False):
        assert output.outputs[0].token_ids == entry["token_ids"][:30]
