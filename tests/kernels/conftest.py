"""One attention call per option, dense and packed, with prime sizes: what every backend is tested with."""

from dataclasses import replace

import pytest
import torch

from octavo.kernels.spec import AttentionSpec, AttentionTensors

CU_SEQLENS_Q = [0, 5, 5, 30, 37]  # one sequence without queries
CU_SEQLENS_K = [0, 20, 25, 25, 53]  # one without keys, one with fewer keys than queries
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V = 6, 2, 23, 41

OPTIONS = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 7, "window_right": 3},
    "causal window": {"window_left": 4, "window_right": 0},
    "softcap": {"softcap": 2.0, "window_right": 0},
    "alibi": {"alibi_slopes": (NUM_HEADS,)},
    "alibi of each sequence": {"alibi_slopes": ("B", NUM_HEADS), "window_right": 0},
    "sink": {"learnable_sink": (NUM_HEADS,), "window_right": 0},
    "qv": {"qv": True, "softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "window_right": 0},
    "bias": {"attn_bias": ("B", NUM_HEADS, "Sq", "Sk")},
    "bias of keys": {"attn_bias": ("B", 1, 1, "Sk"), "window_right": 0},
    "bias of rows": {"attn_bias": (1, NUM_HEADS, "Sq", 1)},
    "used": {"seqused_q": True, "seqused_k": True, "window_right": 0, "attn_bias": (1, 1, "Sq", "Sk")},
    "leftpad": {"leftpad_k": True, "window_left": 9, "alibi_slopes": (NUM_HEADS,), "dropout_p": 0.2},
    "all": {
        "softcap": 2.0,
        "window_left": 20,
        "window_right": 1,
        "dropout_p": 0.1,
        "alibi_slopes": (NUM_HEADS,),
        "learnable_sink": (NUM_HEADS,),
        "qv": True,
        "attn_bias": ("B", 1, "Sq", "Sk"),
        "seqused_k": True,
    },
}


def make_call(options, packed, dtype=torch.float64, head_dim_v=HEAD_DIM_V):
    """`(q, k, v, spec, t)` with random tensors for the named options."""
    torch.manual_seed(1)
    scalars = {n: x for n, x in options.items() if n in AttentionSpec.__dataclass_fields__}
    tensors = {n: x for n, x in options.items() if n in AttentionTensors.__dataclass_fields__}
    batch, sq, sk = (4, 25, 28) if packed else (2, 37, 53)
    leading_q, leading_k = ((40,), (55,)) if packed else ((batch, sq), (batch, sk))  # packed: 3 and 2 rows of no one
    q = torch.randn(*leading_q, NUM_HEADS, HEAD_DIM).to(dtype)
    k = torch.randn(*leading_k, NUM_KV_HEADS, HEAD_DIM).to(dtype)
    v = torch.randn(*leading_k, NUM_KV_HEADS, head_dim_v).to(dtype)
    sizes = {"B": batch, "Sq": sq, "Sk": sk}
    for name in ("alibi_slopes", "learnable_sink", "attn_bias"):
        if name in tensors:
            shape = [sizes.get(size, size) for size in tensors[name]]
            tensors[name] = torch.rand(shape) if name == "alibi_slopes" else torch.randn(shape, dtype=torch.float64)
    if "qv" in tensors:
        tensors["qv"] = torch.randn(*leading_q, NUM_HEADS, head_dim_v).to(dtype)
    lengths = {
        "seqused_q": [3, 0, 25, 1] if packed else [31, 1],
        "seqused_k": [20, 1, 0, 11] if packed else [47, 0],
        "leftpad_k": [3, 5, 0, 0] if packed else [3, 53],
    }
    for name, values in lengths.items():
        if name in tensors:
            tensors[name] = torch.tensor(values, dtype=torch.int32)
    t = AttentionTensors(max_seqlen_q=sq, max_seqlen_k=sk, dropout_seed=123456789012, **tensors)
    if packed:
        cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (CU_SEQLENS_Q, CU_SEQLENS_K))
        t = replace(t, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    return q, k, v, AttentionSpec(softmax_scale=0.3, **scalars), t


@pytest.fixture(params=["dense", "packed"])
def packed(request):
    return request.param == "packed"


@pytest.fixture(params=list(OPTIONS))
def attention_call(request, packed):
    """fp64 calls, one for each option."""
    return make_call(OPTIONS[request.param], packed)


@pytest.fixture
def build_call():
    """`make_call`, for tests that choose dtype and options: `build_call("causal", packed=False, dtype=…)`."""
    return lambda name, **settings: make_call(OPTIONS[name], **settings)
