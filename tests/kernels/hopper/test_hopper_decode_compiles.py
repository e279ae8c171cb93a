"""The decode kernels compile for sm_90 without a GPU, with what their schedules need; which calls they take.

Read from the assembler's report and output: products on the tensor cores that run on while the warpgroup goes on, no
spills with pages that hold a block, registers handed from warpgroup to warpgroup as planned, shared memory that fits.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Hopper kernels are written in Triton's Gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from octavo.kernels.hopper import mla_decode, paged_decode  # noqa: E402
from octavo.kernels.hopper.gluon_compat import KEEPS_LOOP_OPERANDS  # noqa: E402
from octavo.kernels.spec import AttentionSpec, AttentionTensors  # noqa: E402
from octavo.kernels.triton import decode_launch  # noqa: E402
from octavo.kernels.triton.decode_launch import Launch  # noqa: E402

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int8: "*i8",
}  # fmt: skip
SHARED_MEMORY = 227 * 1024  # bytes that one block of sm_90 may have
CAUSAL = AttentionSpec(0.07, window_right=0)


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def capture(monkeypatch, page, heads, dtype):
    """The launch that `mla_decode` would make."""
    launches = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: launches.append((launch, tensors)))
    mla_decode._plan.cache_clear()
    monkeypatch.setattr(mla_decode, "early_launch_options", lambda _: {"PDL": True, "launch_pdl": True})
    monkeypatch.setattr(mla_decode, "num_processors", lambda _: 132)
    mla_decode.mla_decode(*call(page, heads, dtype))
    return launches[0]


def call(page=64, heads=16, dtype=torch.bfloat16, width=576, queries=1, batch=4, **tensors):
    t = AttentionTensors(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32) * queries, max_seqlen_q=queries,
        block_table=torch.zeros(batch, 8, dtype=torch.int32), seqused_k=torch.ones(batch, dtype=torch.int32), **tensors,
    )  # fmt: skip
    q = torch.empty(batch * queries, heads, width, dtype=dtype)
    return q, torch.empty(32, page, width, dtype=dtype), width - 64, CAUSAL, t


def divides_16(value):
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def type_of(value):
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32"
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[value.base.dtype]
    return f"tensordesc<{dtype}{value.block_shape},{value.layout!r}>"


def compile_launch(launch, folder: Path):
    launch, tensors = launch
    arguments = (*tensors, *launch.scalars)
    names = [parameter.name for parameter in launch.kernel.params]
    constants = dict(launch.constants) | {name: x for name, x in zip(names, arguments, strict=False) if x is None}
    signature = dict(zip(names, map(type_of, arguments), strict=False)) | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(arguments) if divides_16(x)}
    options = {name: launch.options[name] for name in ("num_warps", "maxnreg") if name in launch.options}
    compiled = triton.compile(
        GluonASTSource(launch.kernel, signature, values, aligned), target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": True} | options,
    )  # fmt: skip
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.asm["ptx"])
    cubin.write_bytes(compiled.asm["cubin"])
    report = output(get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(folder / "again.cubin"))
    return compiled.metadata.shared, report, output(triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin))


@pytest.mark.parametrize(
    ("page", "heads", "dtype"), [(64, 16, torch.bfloat16), (256, 128, torch.float16), (16, 128, torch.bfloat16)]
)
def test_latent_decode_compiles_to_what_the_design_needs(monkeypatch, tmp_path, page, heads, dtype):
    shared, report, sass = compile_launch(capture(monkeypatch, page, heads, dtype), tmp_path)
    assert shared <= SHARED_MEMORY
    assert "serialized" not in report, "ptxas made the products wait for each other"
    assert "setmaxnreg" not in report, "ptxas ignored the registers asked for"
    if page >= 64 and KEEPS_LOOP_OPERANDS:  # Triton 3.9 spills a few bytes
        assert re.search(r"\b0 bytes spill stores", report)
    assert len(re.findall(r"HGMMA\.64x256x16", sass)) == 8
    assert re.search(r"HGMMA\.64x64x16", sass)
    assert not re.search(r"\bHMMA\b", sass), "a product left the warpgroup instructions"
    assert "UTMALDG" in sass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"width": 320}, "not 256 in 320"),
        ({"page": 24}, "not 24"),
        ({"queries": 70}, "1024 rows"),
        ({"seqused_q": torch.ones(4, dtype=torch.int32)}, "seqused_q"),
    ],
)
def test_refuses_what_it_cannot_take_and_says_why(change, says):
    assert mla_decode.refuses_mla_decode(*call()) is None
    assert says in mla_decode.refuses_mla_decode(*call(**change))


def paged_call(dtype=torch.bfloat16, page=16, heads=8, kv_heads=2, head_dim=128, queries=1, spec=CAUSAL, **tensors):
    scales = {} if dtype == torch.bfloat16 else {"k_scale": torch.ones(kv_heads), "v_scale": torch.ones(kv_heads)}
    t = AttentionTensors(
        cu_seqlens_q=torch.arange(5, dtype=torch.int32) * queries, max_seqlen_q=queries,
        block_table=torch.zeros(4, 8, dtype=torch.int32), seqused_k=torch.ones(4, dtype=torch.int32),
        **scales, **tensors,
    )  # fmt: skip
    q = torch.empty(4 * queries, heads, head_dim, dtype=torch.bfloat16)
    cache = torch.empty(32, page, kv_heads, head_dim, dtype=dtype)
    return q, cache, cache, spec, t


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.int8},
        {"page": 64, "head_dim": 64, "heads": 16, "queries": 2, "learnable_sink": torch.zeros(16)},
        {"page": 2**16, "spec": AttentionSpec(0.1, 100, 0, softcap=5.0)},
    ],
    ids=str,
)
def test_paged_decode_needs_neither_shared_memory_nor_barriers_in_its_loop(monkeypatch, tmp_path, change):
    launches = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: launches.append((launch, tensors)))
    monkeypatch.setattr(decode_launch, "early_launch_options", lambda _: {"PDL": True, "launch_pdl": True})
    monkeypatch.setattr(decode_launch, "num_processors", lambda _: 132)
    paged_decode._plan.cache_clear()
    paged_decode.paged_attention(*paged_call(**change))
    _, _, sass = compile_launch(launches[0], tmp_path)
    loop = loop_with("HMMA", sass)
    assert len(re.findall(r"LDG\.E[.A-Z]*\.128", loop)) >= 2
    for absent in ("BAR", "LDS", "STS", "LDL", "STL"):
        assert not re.search(rf"\b{absent}\b", loop), absent


def loop_with(instruction, sass):
    """The smallest loop that has this instruction."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    backwards = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"BRA[^0]* 0x([0-9a-f]+)", text))]
    bodies = ["\n".join(text for at, text in code if first <= at <= last) for first, last in backwards if first < last]
    return min((body for body in bodies if instruction in body), key=len)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"page": 24}, "not 24"),
        ({"head_dim": 96}, "not 96"),
        ({"head_dim": 64, "dtype": torch.int8}, "head_dim 64"),
        ({"heads": 34}, "not 17"),
        ({"queries": 5}, "not 20"),
        ({"queries": 2, "spec": AttentionSpec(0.1)}, "causal"),
        ({"alibi_slopes": torch.ones(8)}, "alibi_slopes"),
    ],
)
def test_paged_decode_refuses_the_rest_and_says_why(change, says):
    assert paged_decode.refuses_paged_attention(*paged_call()) is None
    assert says in paged_decode.refuses_paged_attention(*paged_call(**change))
