"""The library as people use it, on the GPU: modules, autograd's company, flash-attn's and transformers' callers.

In fp32, against the same call on a CPU: the kernels' own errors are the business of the other files.
"""

import copy

import pytest
import torch
import transformers

import octavo
from octavo import ops
from octavo.compat.flash_attn import bert_padding
from octavo.compat.flash_attn.layers import rotary
from octavo.integrations.transformers import register
from octavo.nn import (
    GatedMLP,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    RMSNorm,
    RotaryEmbedding,
    TransformerBlock,
    make_caches,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
    # torch says so when a backward's thread makes the first matmul of the process
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
DIM = 128
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def latent(q_rank=None):
    return MultiHeadLatentAttention(
        DIM, n_heads=4, q_rank=q_rank, kv_rank=64, nope_head_dim=32, rope_head_dim=16, v_head_dim=32
    )


ATTENTIONS = {
    "mha": lambda: MultiHeadAttention(DIM, 4, causal=True, rope=RotaryEmbedding(32), bias=True),
    "gqa, qk norm": lambda: MultiHeadAttention(DIM, 4, 2, causal=True, rope=RotaryEmbedding(32), qk_norm=RMSNorm),
    "mqa, window": lambda: MultiHeadAttention(DIM, 4, 1, causal=True, window_size=(20, 0)),
    "mla": latent,
    "mla, q compressed": lambda: latent(48),
}


def on_both(module):
    """The module on the CPU, and its copy on the GPU."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return module, copy.deepcopy(module).cuda()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_module_trains_as_on_a_cpu(name):
    modules = on_both(ATTENTIONS[name]())
    x = torch.randn(2, 83, DIM)
    results = []
    for module in modules:
        leaf = x.to(next(module.parameters()).device).requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])
        results.append([t.detach().cpu() for t in (out, *grads)])
    for ours, wanted in zip(*results, strict=True):
        scale = max(wanted.abs().max().item(), 1.0)
        assert (ours - wanted).abs().max().item() <= 2e-5 * scale
    assert octavo.explain(modules[1], x.cuda()).backend in ("triton", "hopper")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_module_generates_what_it_computes_without_a_cache(name):
    """Through a paged cache that is NaN where nothing was written: a prompt, a chunk and single tokens."""
    _, module = on_both(ATTENTIONS[name]())
    x = torch.randn(2, 60, DIM, device="cuda")
    rows, (cache,) = make_caches(module, 2, 60, block_size=16)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))
    parts = []
    with torch.no_grad():
        for part in x.split([37, 20, 1, 1, 1], dim=1):
            step = rows.append(part.shape[1])
            parts.append(module(part.flatten(0, 1), step.positions, cache, step.metadata).view_as(part))
        torch.testing.assert_close(torch.cat(parts, dim=1), module(x), **CLOSE)


@pytest.mark.parametrize("wiring", ["pre", "post", "branch", "rezero", "layerscale+pre"])
def test_a_block_of_each_wiring_learns(wiring):
    torch.manual_seed(0)
    block = TransformerBlock(DIM, ATTENTIONS["gqa, qk norm"](), GatedMLP(DIM, 256), wiring=wiring).cuda().bfloat16()
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
    x, wanted = (torch.randn(4, 50, DIM, device="cuda", dtype=torch.bfloat16) for _ in "xy")
    losses = []
    for _ in range(30):
        loss = (block(x) - wanted).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def qkv(*, grad=True, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (2, 70, 4, 64), (2, 90, 2, 64), (2, 90, 2, 64)
    return [torch.randn(s, device="cuda", generator=generator).to(dtype).detach().requires_grad_(grad) for s in shapes]


def test_checkpointing_replays_dropout():
    leaves = qkv()

    def attend(q, k, v):
        return ops.flash_attn_func(q, k, v, dropout_p=0.4, causal=True)

    torch.manual_seed(5)
    expected = torch.autograd.grad(attend(*leaves).sum(), leaves)
    torch.manual_seed(5)
    out = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)
    torch.manual_seed(99)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), expected)


def test_autocast_runs_in_bf16_and_returns_gradients_in_fp32():
    leaves = qkv()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = ops.flash_attn_func(*leaves)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)
    torch.testing.assert_close(out.float(), ops.flash_attn_func(*leaves), atol=2e-2, rtol=2e-2)


def test_exports_with_dynamic_shapes():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.flash_attn_func(q, k, v, causal=True)

    example = tuple(qkv(grad=False))
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(Attention(), example, dynamic_shapes=[{}, {1: length}, {1: length}])
    q, k, v = example
    longer = q, torch.cat([k, k], dim=1), torch.cat([v, v], dim=1)
    torch.testing.assert_close(program.module()(*longer), ops.flash_attn_func(*longer, causal=True))


def test_gradients_and_second_derivatives_on_the_reference_path():
    torch.manual_seed(0)
    shapes = (1, 3, 2, 2), (1, 4, 1, 2), (1, 4, 1, 3)
    leaves = [torch.randn(s, device="cuda", dtype=torch.float64, requires_grad=True) for s in shapes]

    def attend(q, k, v):
        return ops.flash_attn_func(q, k, v, causal=True, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)
    q, k, v = qkv()
    (dq,) = torch.autograd.grad(ops.flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"use_backend\('reference'\)"):
        dq.sum().backward()


def test_the_longest_length_may_be_a_tensor():
    q, k, v = (x.flatten(0, 1) for x in qkv(grad=False))
    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device="cuda") for n in (70, 90))
    longest_q, longest_k = torch.tensor(70), torch.tensor(90, device="cuda")
    out = ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, causal=True)
    assert torch.equal(out, ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 70, 90, causal=True))


def test_padding_helpers_and_rotary_of_flash_attns_callers():
    x = torch.randn(3, 50, 4, 64)
    mask = torch.arange(50) < torch.tensor([50, 17, 0])[:, None]
    angles = torch.rand(50, 16) * 6
    results = []
    for device in ("cpu", "cuda"):
        turned = rotary.apply_rotary_emb(x.to(device), angles.cos().to(device), angles.sin().to(device))
        tokens, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(turned, mask.to(device))
        out = ops.flash_attn_varlen_func(*[tokens] * 3, cu_seqlens, cu_seqlens, longest, longest, causal=True)
        results.append(bert_padding.pad_input(out, indices, 3, 50).cpu())
    torch.testing.assert_close(*results, **CLOSE)


@pytest.fixture(scope="module")
def llamas():
    """`(eager, octavo)` of transformers on the GPU: the same random weights."""
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    eager = transformers.LlamaForCausalLM(config).cuda().eval()
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("octavo")
    return eager, ours


def test_transformers_trains(llamas):
    ids = torch.randint(1, 97, (2, 60), device="cuda")
    results = []
    for model in llamas:
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append((output.logits, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, **CLOSE)


def test_transformers_generates(llamas):
    ids = torch.randint(1, 97, (3, 30), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :11] = mask[2, :25] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    eager, ours = (model.generate(ids * mask, **options) for model in llamas)
    assert torch.equal(ours, eager)
