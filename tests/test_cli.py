"""The command line: every flag does something, every mistake is one line, Ctrl-C leaves cleanly."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from octavo.cli import build_parser, main, memory_size

SMALL = ("--kv-cache-memory", "1MiB", "--device", "cpu")


@pytest.fixture
def run(tiny_model_dir, capsys):
    """Runs a command with the tiny model: (exit code, stdout, stderr)."""

    def run(command, *arguments):
        model = [str(tiny_model_dir)] if command == "inspect" else [*SMALL, "--model", str(tiny_model_dir)]
        code = main([command, *model, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_generate_prints_text_and_speed(run):
    code, out, err = run("generate", "the hen", "--temperature", "0", "--max-tokens", "6")
    assert code == 0
    assert out.strip()
    assert "[6 tokens, the first after" in err
    assert "tokens/s" in err


def test_generate_options_reach_the_sampler(run):
    greedy = run("generate", "the hen", "--temperature", "0", "--max-tokens", "6")[1]
    seeded = [run("generate", "the hen", "--seed", seed, "--max-tokens", "6")[1] for seed in ("1", "1", "2")]
    assert seeded[0] == seeded[1] != seeded[2]
    assert run("generate", "the hen", "--top-k", "1", "--max-tokens", "6")[1] == greedy
    assert len(run("generate", "the hen", "--n", "3", "--max-tokens", "2")[1].splitlines()) >= 3
    assert run("generate", "the hen", "--temperature", "0", "--max-tokens", "6", "--stop", greedy[0])[1] == "\n"


def test_generate_reads_standard_input(run, monkeypatch):
    direct = run("generate", "the hen", "--temperature", "0", "--max-tokens", "3")[1]
    monkeypatch.setattr("sys.stdin", open_text("the hen"))
    assert run("generate", "-", "--temperature", "0", "--max-tokens", "3")[1] == direct


def test_generate_in_the_chat_template(run):
    asked = run("generate", "hi", "--chat", "--temperature", "0", "--max-tokens", "3")[1]
    assert asked == run("generate", "[user]hi\n[assistant]", "--temperature", "0", "--max-tokens", "3")[1]


def test_generate_accounts_for_memory(run):
    code, out, _ = run("generate", "the hen", "--temperature", "0", "--max-tokens", "6", "--memory")
    assert code == 0
    assert "internal" in out
    assert "reserved" in out


def open_text(text):
    import io

    return io.StringIO(text)


def test_chat_keeps_the_conversation_and_obeys_its_commands(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", open_text("hi\nhow\n/reset\nhi\n\n/exit\nnever\n"))
    code, out, err = run("chat", "--temperature", "0", "--max-tokens", "3", "--system", "be brief")
    assert code == 0
    assert err.count("tokens, the first after") == 3
    monkeypatch.setattr("sys.stdin", open_text("hi\n"))
    again = run("chat", "--temperature", "0", "--max-tokens", "3", "--system", "be brief")[1]
    assert out.startswith(again)
    assert out.endswith(again)
    assert out != again * 3


def test_chat_survives_a_question_that_is_too_long(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", open_text("x" * 300 + "\nhi\n"))
    code, _, err = run("chat", "--temperature", "0", "--max-tokens", "3")
    assert code == 0
    assert "max_model_len" in err
    assert err.count("tokens, the first after") == 1


def test_inspect_says_what_a_model_is(run):
    code, out, _ = run("inspect", "--memory", "1MiB")
    assert code == 0
    assert "LlamaForCausalLM" in out
    facts = json.loads(run("inspect", "--memory", "1MiB", "--json")[1])
    assert facts["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert facts["tokens_that_fit"] == (1 << 20) // facts["kv_bytes_per_token"]
    assert facts["full_length_requests_that_fit"] == round(facts["tokens_that_fit"] / 256, 2)
    assert sum(facts["weights"].values()) == facts["parameters"]


@pytest.mark.parametrize("workload", ["throughput", "latency"])
def test_bench_measures(run, tmp_path, workload):
    path = tmp_path / "result.json"
    sizes = ("--num-prompts", "4", "--input-len", "12", "--output-len", "5", "--range-ratio", "0.5")
    code, out, _ = run("bench", workload, *sizes, "--shared-prefix-len", "8", "--json", str(path))
    assert code == 0
    assert "output_tokens_per_s" in out
    result = json.loads(path.read_text())
    figures = result["figures"]
    assert result["workload"]["num_prompts"] == 4
    assert figures["output_tokens_per_s"] == pytest.approx(figures["output_tokens"] / figures["seconds"])
    assert figures["time_to_first_token_p50"] <= figures["time_to_first_token_p99"]
    only_json = run("bench", workload, *sizes, "--shared-prefix-len", "8", "--json", "-")[1]
    assert json.loads(only_json)["figures"]["prompt_tokens"] == figures["prompt_tokens"]


def test_bench_reports_memory(run, tmp_path):
    picture = tmp_path / "memory.svg"
    sizes = ("--num-prompts", "4", "--input-len", "12", "--output-len", "5")
    code, out, _ = run("bench", *sizes, "--memory", "--memory-plot", str(picture))
    assert code == 0
    assert "internal" in out
    assert picture.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", ""), "prompt: expected a text of at least one token"),
        (("generate", "a", "--temperature", "-1"), "temperature: expected a finite number at least 0"),
        (("generate", "a", "--max-model-len", "9999"), "max_model_len: expected at most the model's context"),
        (("generate", "a", "--device", "tpu"), "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
        (("bench", "--num-prompts", "0"), "num_prompts: expected at least 1"),
        (("bench", "--range-ratio", "2"), "range_ratio: expected"),
        (("bench", "--shared-prefix-len", "999"), "shared_prefix_len: expected 0 to input_len"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("octavo: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_not_there(capsys):
    assert main(["inspect", "/nowhere/model.gguf"]) == 2
    assert "/nowhere/model.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("bench", "--help"), ("--version",)])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    assert "octavo" in capsys.readouterr().out


def test_every_argument_has_help():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) >= {"generate", "chat", "inspect", "bench"}
    for command in commands.choices.values():
        assert [action.dest for action in command._actions if not action.help] == []


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("4GiB", 4 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("3k", 3000)]
)
def test_memory_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4TiB", "4 bananas", "nan"])
def test_no_memory_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as"):
        memory_size(text)


def test_ctrl_c_leaves_cleanly(tiny_model_dir):
    command = [sys.executable, "-m", "octavo", "bench", "latency", "--num-prompts", "100000", "--output-len", "100"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--input-len", "4", "--model", str(tiny_model_dir), *SMALL],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    seen = ""
    deadline = time.monotonic() + 60
    while "Requests" not in seen and process.poll() is None and time.monotonic() < deadline:
        seen += process.stderr.read(1)  # until the progress bar shows that it runs
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "octavo: interrupted" in err
    assert "Traceback" not in err
