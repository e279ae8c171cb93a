"""What people point at the server, each as it is: the real client in a process of its own, against a real server.

The clients live in an environment of their own (`scripts/env.sh`, `octavo_clients`), whose Python is named by
OCTAVO_CLIENTS_PYTHON; without it, those that are not installed here are skipped.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PYTHON = os.environ.get("OCTAVO_CLIENTS_PYTHON", sys.executable)
HERE = Path(__file__).parent / "clients"
ROOT = Path(__file__).parents[2]


def installed(*modules):
    question = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {modules})))"
    return subprocess.run([PYTHON, "-c", question], check=False).returncode == 0


def client(command, seconds=200, expect=0, **environment):
    """What a client printed; a test fails with all of it when the client does."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    env = {**os.environ, **quiet, "PYTHONWARNINGS": "ignore", **environment}
    with tempfile.TemporaryDirectory() as away:  # some leave files where they run
        done = subprocess.run(
            [PYTHON, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=env,
            check=False,
            cwd=away,
        )
    assert done.returncode == expect, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def needs(*modules):
    missing = f"{', '.join(modules)} is not in OCTAVO_CLIENTS_PYTHON's environment (the clients extra)"
    return pytest.mark.skipif(not installed(*modules), reason=missing)


@needs("openai")
def test_openai(long_server):
    client([HERE / "with_openai.py", long_server.url])
    long_server.wait_until_idle()


@needs("langchain_openai")
def test_langchain_openai(long_server):
    client([HERE / "with_langchain.py", long_server.url])


@needs("litellm")
def test_litellm(long_server):
    client([HERE / "with_litellm.py", long_server.url], LITELLM_LOCAL_MODEL_COST_MAP="True")


# ---- lm-eval: a task of the repository's own licence ---------------------------------------------------------------

CHOOSE = """\
task: licence_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
WRITE = """\
task: licence_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path):
    """Which of two ends belongs to a sentence of the licence? And: write its end."""
    words = (ROOT / "LICENSE").read_text().split()[40:160]
    starts = [" ".join(words[i : i + 6]) for i in range(0, 60, 6)]
    ends = [words[i + 6] for i in range(0, 60, 6)]
    data = tmp_path / "licence.jsonl"
    rows = [{"start": s, "choices": [e, "zebra"]} for s, e in zip(starts, ends, strict=True)]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("choose", CHOOSE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    return tmp_path


def lm_eval(tasks, model, task, arguments):
    out = tasks / "out"
    told = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["-m", "lm_eval", "run", "--model", model, "--model_args", told, "--include_path", tasks, "--tasks", task]
    chat = ["--apply_chat_template"] if "chat" in model else []
    client([*command, *chat, "--output_path", out, "--log_samples"], HF_HOME=str(tasks / "home"), OPENAI_API_KEY="none")
    (found,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    results = json.loads(found.read_text())["results"][task]
    return results, [json.loads(line) for line in samples.read_text().splitlines()]


@needs("lm_eval")
def test_lm_eval_by_completions(long_server, long_model_dir, tasks):
    """Log likelihoods of both ends: the same as ours."""
    url = f"{long_server.url}/v1/completions"
    arguments = {"model": "tiny", "base_url": url, "tokenizer": long_model_dir, "num_concurrent": 4, "max_length": 512}
    results, samples = lm_eval(tasks, "local-completions", "licence_choose", arguments)
    assert 0 <= results["acc,none"] <= 1
    assert len(samples) == 10
    start, end = samples[0]["doc"]["start"], " " + samples[0]["doc"]["choices"][0]
    echo = long_server.complete(start + end, max_tokens=0, echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    count = next(i for i, offset in enumerate(echo["text_offset"]) if offset >= len(start))
    expected = sum(echo["token_logprobs"][count:])
    assert float(samples[0]["filtered_resps"][0][0]) == pytest.approx(expected, abs=0.05)


@needs("lm_eval")
def test_lm_eval_by_chats(long_server, tasks):
    url = f"{long_server.url}/v1/chat/completions"
    arguments = {"model": "tiny", "base_url": url, "num_concurrent": 4}
    results, samples = lm_eval(tasks, "local-chat-completions", "licence_write", arguments)
    assert results["exact_match,none"] == 0, "random weights do not know the licence"
    assert len(samples) == 10


# ---- load, fuzzing, the command line -------------------------------------------------------------------------------


def test_our_own_load_generator(long_server):
    command = [ROOT / "benchmarks" / "serving.py", "load", "--url", long_server.url, "--clients", "1", "4"]
    told = client([*command, "--seconds", "1", "--prompt-words", "5", "--max-tokens", "6"])
    rows = json.loads(told.splitlines()[-1])
    assert [row["clients"] for row in rows] == [1, 4]
    assert all(row["output_tokens_per_s"] > 0 and row["ttft_ms_p99"] >= row["ttft_ms_p50"] > 0 for row in rows)


@needs("guidellm")
def test_guidellm(long_server, long_model_dir, tmp_path):
    out = tmp_path / "report.json"
    shape = {
        "--backend": f"kind=openai_http,target={long_server.url},model=tiny",
        "--profile": "kind=concurrent,streams=3",
        "--constraint": "kind=max_requests,count=6",
        "--tokenizer": f"kind=huggingface_auto,model={long_model_dir}",
        "--data": "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
        "--output": f"kind=json,path={out}",
    }
    client(["-m", "guidellm", "run", "--disable-progress", *(part for option in shape.items() for part in option)])
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] >= 6
    assert totals["errored"] == 0


@needs("schemathesis")
def test_schemathesis_on_every_operation(server):
    """No 5xx, no status, content type or shape that /openapi.json does not tell, in about two thousand requests. Of the
    13 operations schemathesis leaves out the one that gives it the document."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = ["-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", checks]
    told = client([*command, "--max-examples", "12", "--seed", "1", "--phases", "coverage,fuzzing"])
    assert "Tested: 12" in told, told[-3000:]
    server.wait_until_idle()


@needs("llm")
def test_the_llm_command(long_server, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {long_server.url}/v1\n  api_key_name: none\n"
        "- model_id: tiny-text\n  model_name: tiny\n  completion: true\n"
        f"  api_base: {long_server.url}/v1\n  api_key_name: none\n"
    )
    home = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    for model in ("tiny", "tiny-text"):
        for stream in ([], ["--no-stream"]):
            told = client(
                ["-m", "llm", "-m", model, "the hen", "-o", "max_tokens", "6", "--key", "none", *stream], **home
            )
            assert told.strip()
