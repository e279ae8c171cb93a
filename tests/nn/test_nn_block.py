"""TransformerBlock in a model: sharded by FSDP2, traced, under autocast, and reachable from the top."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import octavo
from octavo.nn import GatedMLP, MultiHeadAttention, MultiHeadLatentAttention, RotaryEmbedding, TransformerBlock


@pytest.fixture
def model() -> nn.Sequential:
    """Every kind of parameter: merged matrices, norms, sinks, and the one α of ReZero."""
    torch.manual_seed(0)
    mha = MultiHeadAttention(16, 4, 2, causal=True, rope=RotaryEmbedding(4), sinks=True)
    mla = MultiHeadLatentAttention(16, 2, 8, 8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4)
    return nn.Sequential(
        TransformerBlock(16, mha, GatedMLP(16, 24), wiring="rezero+pre"),
        TransformerBlock(16, mla, GatedMLP(16, 24), wiring="layerscale+pre+branch"),
    )


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp_shards_every_parameter(model: nn.Sequential, mesh: DeviceMesh) -> None:
    x = torch.randn(2, 5, 16)
    want = model(x)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    out = model(x)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_torch_compile_traces_one_graph(model: nn.Sequential) -> None:
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_runs_in_bf16_near_fp32(model: nn.Sequential) -> None:
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05)


def test_modules_are_exported_at_the_top() -> None:
    assert octavo.MultiHeadAttention is MultiHeadAttention
    assert octavo.MultiHeadLatentAttention is MultiHeadLatentAttention
