"""attn_implementation="octavo" in transformers: the same logits, gradients and tokens as its own eager attention."""

import copy

import pytest
import torch
import transformers

from octavo.integrations.transformers import register


@pytest.fixture(scope="module")
def models():
    """`(eager, octavo)`: one tiny random Llama with grouped heads, its weights twice."""
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return with_both(transformers.LlamaForCausalLM(config))


def with_both(model):
    ours = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    ours.set_attn_implementation("octavo")
    return model.eval(), ours.eval()


def logits_and_gradients(model, **inputs):
    model.zero_grad()
    result = model(**inputs, labels=inputs["input_ids"])
    result.loss.backward()
    return result.logits, [p.grad for p in model.parameters()]


@pytest.fixture
def padded_batch():
    """Three sequences of 11, 5 and 2 tokens: `(ids, mask)` padded on the right."""
    torch.manual_seed(1)
    ids = torch.randint(1, 97, (3, 11))
    mask = torch.arange(11) < torch.tensor([11, 5, 2])[:, None]
    return ids * mask, mask.long()


def test_training_without_padding(models):
    ids = torch.randint(1, 97, (2, 13))
    torch.testing.assert_close(*(logits_and_gradients(m, input_ids=ids) for m in models), atol=2e-5, rtol=1e-4)


def test_training_with_padding(models, padded_batch):
    ids, mask = padded_batch
    eager, ours = (m(input_ids=ids, attention_mask=mask).logits for m in models)
    torch.testing.assert_close(ours[mask.bool()], eager[mask.bool()], atol=2e-5, rtol=1e-4)


def test_packed_sequences_do_not_see_each_other(models):
    ids = torch.randint(1, 97, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = models[1](input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = [models[0](input_ids=part).logits for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_left_padding(models, padded_batch, cache):
    ids, mask = (x.flip(1) for x in padded_batch)
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    eager, ours = (m.generate(ids, attention_mask=mask, disable_compile=True, **settings) for m in models)
    assert torch.equal(ours, eager)


def test_sliding_window_softcap_and_sinks_go_to_the_kernel():
    register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
    gemma = transformers.Gemma2Config(**sizes, **heads, sliding_window=4, attn_logit_softcapping=1.0)
    oss = transformers.GptOssConfig(**sizes, **heads, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    for model in (transformers.Gemma2ForCausalLM(gemma), transformers.GptOssForCausalLM(oss)):
        ids = torch.randint(1, 97, (2, 13))
        eager, ours = (m(input_ids=ids).logits for m in with_both(model))
        torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_smollm2_says_the_same():
    """The default model through transformers' GGUF reader: tokens, loss and gradients as with its own attention."""
    from octavo.models import default_model_path

    register()
    path = default_model_path()
    eager, ours = with_both(transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name))
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    tokens = [m.generate(ids, max_new_tokens=24, do_sample=False) for m in (eager, ours)]
    assert torch.equal(*tokens)
    losses, gradients = zip(*(real_loss_and_gradients(m, tokens[0]) for m in (eager, ours)), strict=True)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


def real_loss_and_gradients(model, ids):
    """Of the first, a middle and the last layer's attention."""
    layers = model.model.layers
    weights = [layers[i].self_attn.q_proj.weight for i in (0, len(layers) // 2, -1)]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss.detach(), torch.autograd.grad(loss, weights)
