"""train_tiny: resuming changes nothing, the exported model is what was trained, and the engine can serve it."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shakespeare_text import Text, load_text
from tiny_model import END, TinyConfig, TinyDecoder, export
from tokenizers import Tokenizer
from torch import nn
from train_tiny import Plan, load_checkpoint, save_checkpoint, start, train, train_one
from transformers import AutoModelForCausalLM

from octavo import LLM, SamplingParams
from octavo.models import load_model

CONFIG = TinyConfig("gqa", dim=48, layers=2, head_dim=8, mlp_dim=64, context=64, kv_rank=12, rope_head_dim=4)
PLAN = Plan(steps=6, batch=2, eval_every=2)


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text()


def model_of(attention: str) -> TinyDecoder:
    """Random, with weights large enough for the attention to matter."""
    torch.manual_seed(0)
    model = TinyDecoder(replace(CONFIG, attention=attention))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_an_interrupted_run_ends_with_the_same_bits(text: Text, tmp_path: Path) -> None:
    whole = start(CONFIG, PLAN)
    list(train(whole, text, PLAN, PLAN.steps, "whole"))
    first = start(CONFIG, PLAN)
    list(train(first, text, PLAN, 2, "first"))
    save_checkpoint(first, PLAN, tmp_path / "c.safetensors")
    second = start(CONFIG, PLAN)
    load_checkpoint(second, PLAN, tmp_path / "c.safetensors")
    list(train(second, text, PLAN, PLAN.steps, "second"))
    assert second.train_loss == whole.train_loss
    assert second.validation == whole.validation
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss(text: Text) -> None:
    run = start(CONFIG, Plan(steps=20, batch=4, eval_every=20))
    list(train(run, text, Plan(steps=20, batch=4, eval_every=20), 20, "run"))
    assert run.train_loss[-1] < run.train_loss[0] - 0.5
    assert len(run.train_loss) == run.step == 20


def test_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(start(CONFIG, PLAN), PLAN, path)
    with pytest.raises(ValueError, match="its plan is"):
        load_checkpoint(start(CONFIG, PLAN), replace(PLAN, steps=7), path)
    other = replace(CONFIG, attention="mqa")
    with pytest.raises(ValueError, match="its config is"):
        load_checkpoint(start(other, PLAN), PLAN, path)


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa", "mla"])
def test_transformers_reads_the_export(attention: str, tmp_path: Path) -> None:
    model = model_of(attention)
    export(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa", "mla"])
def test_our_loader_reads_the_export(attention: str, tmp_path: Path) -> None:
    model = model_of(attention)
    export(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32, progress=False)
    tokens = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        logits = loaded.model.compute_logits(loaded.model(tokens)[0])
        torch.testing.assert_close(logits, model(tokens)[0], rtol=1e-4, atol=1e-4)


def test_tokens_are_the_bytes(tmp_path: Path) -> None:
    export(model_of("mha"), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Thou art – ünser\n\t€ 'tis"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.token_to_id("<|end|>") == END


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_the_engine_serves_what_was_trained(attention: str, text: Text, tmp_path: Path) -> None:
    options = argparse.Namespace(resume=False, stop_at=None, quick=True)
    run = train_one(replace(CONFIG, attention=attention), PLAN, text, tmp_path, options)
    engine = LLM(model=tmp_path / "hf", dtype=torch.float32)
    output = engine.generate(["To be, or"], SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)[0]
    tokens = list(b"To be, or")
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(run.model(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(output.outputs[0].token_ids) == tokens[9:]


def test_only_pre_norm_can_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 'pre' can be exported"):
        export(TinyDecoder(replace(CONFIG, wiring="post")), tmp_path)


def test_cached_generation_follows_the_prompt() -> None:
    out = model_of("mla").generate(b"abc", 5)
    assert out[:3] == b"abc"
    assert len(out) == 8
