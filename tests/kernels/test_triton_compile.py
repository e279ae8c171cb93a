"""The main kernels compiled for sm_90 and sm_80 without a GPU: tensor-core instructions, spills, shared memory.

Launches are captured instead of run, so what is compiled is what the launch code asks for.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from octavo.kernels.spec import AttentionSpec, AttentionTensors, HeadNorm, InputNorm, Rotary, Routing  # noqa: E402  # noqa: E402
from octavo.kernels.triton import (  # noqa: E402
    decode_launch,
    flash_bwd,
    flash_fwd,
    gated_activation,
    linear_small_batch,
    mla_decode,
    mla_projection,
    moe,
    norm,
    paged_decode,
    rotary_cache,
    sampling,
)

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),  # Triton 3.9 announces a default of 3.10
]
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
SHARED_LIMIT = {90: 227 * 1024, 80: 99 * 1024}  # of sm_86 and sm_89, which share sm_80's tiles
SM90 = 90


class Launches:
    """Stands in for kernels: `kernel[grid](…)` is noted, not run."""

    def __init__(self, monkeypatch, capability):
        self.calls = []
        for module, names in (
            (flash_fwd, ("forward_kernel", "combine_kernel")),
            (flash_bwd, ("delta_kernel", "dkdv_kernel", "dq_kernel", "dbias_kernel")),
        ):
            monkeypatch.setattr(module, "is_hopper", lambda _: capability == SM90)
            for name in names:
                monkeypatch.setattr(module, name, self._noting(getattr(module, name)))

    def _noting(self, kernel):
        calls = self.calls

        class Noting:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: calls.append((kernel, args, kwargs))

        return Noting()


def signature_entry(parameter, value):
    """The type of an argument as Triton's own launcher would specialise it, and whether 16 divides it."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True
    if type(value).__name__ == "TensorDescriptor":
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>".replace(" ", ""), False
    if isinstance(value, float):
        return "fp32", False
    wide = abs(value) >= 2**31
    return ("i64" if wide else "i32"), value % 16 == 0 and not parameter.do_not_specialize


def compile_launch(launch, capability):
    kernel, args, kwargs = launch
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name], aligned = signature_entry(parameter, value)
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(compiled, path: Path):
    """(disassembly, bytes of stack a thread) of a compiled kernel."""
    path.write_bytes(compiled.asm["cubin"])
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    usage, sass = (
        subprocess.run([cuobjdump, flag, str(path)], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    return sass, int(re.search(r"STACK:(\d+)", usage)[1])


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("head_dim", "causal", "spilling"),
    # measured with these few spills and still the fastest tile of its shape: see tiles.py
    [(64, False, ()), (64, True, ()), (128, True, ("dkdv_kernel",)), (256, False, ("dkdv_kernel",))],
)
def test_main_tiles_use_the_tensor_cores_of_sm90_without_spills(monkeypatch, tmp_path, head_dim, causal, spilling):
    launches = Launches(monkeypatch, SM90)
    x, spec, t = tensor(1, 4096, 4, head_dim), AttentionSpec(0.1, window_right=0 if causal else -1), AttentionTensors()
    flash_fwd.flash_fwd(x, x, x, spec, t)
    flash_bwd.flash_bwd(x, x, x, x, x, tensor(1, 4, 4096, dtype=torch.float32), spec, t)
    seen = set()
    for launch in launches.calls:
        name = launch[0].__name__
        if name == "delta_kernel":
            continue
        compiled = compile_launch(launch, SM90)
        sass, stack = inspect(compiled, tmp_path / "kernel.cubin")
        assert "HGMMA" in sass, name
        assert "UTMALDG" in sass, f"{name} does not load by TMA"
        assert stack == 0 or name in spilling, f"{name} spills {stack} bytes"
        assert compiled.metadata.shared <= SHARED_LIMIT[SM90], name
        seen.add(name)
    assert seen == {"forward_kernel", "dkdv_kernel", "dq_kernel"}


@pytest.mark.parametrize("capability", [80, 90])
def test_decode_pipelines_its_loads_and_fits(monkeypatch, tmp_path, capability):
    launches = Launches(monkeypatch, capability)
    table, lengths = torch.zeros(64, 256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    t = AttentionTensors(max_seqlen_q=1, max_seqlen_k=4096, block_table=table, seqused_k=lengths)
    spec = AttentionSpec(0.1, window_right=0)
    cache = tensor(100, 16, 8, 128)
    flash_fwd.launch_forward(tensor(64, 1, 32, 128), cache, cache, spec, t)
    mla_decode.mla_decode(tensor(64, 1, 16, 576), tensor(100, 64, 576), 512, spec, t)
    kernels = [launch for launch in launches.calls if launch[0].__name__ == "forward_kernel"]
    assert len(kernels) == 2
    for launch in kernels:
        compiled = compile_launch(launch, capability)
        sass, stack = inspect(compiled, tmp_path / "kernel.cubin")
        assert "LDGSTS" in sass  # asynchronous copies
        assert "HMMA" in sass
        assert stack == 0
        assert compiled.metadata.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(128, 128), (256, 256), (64, 512)])
def test_every_input_at_once_fits_the_smallest_shared_memory(monkeypatch, head_dim, head_dim_v):
    launches = Launches(monkeypatch, 80)
    x, v = tensor(1, 512, 4, head_dim), tensor(1, 512, 4, head_dim_v)
    t = AttentionTensors(qv=v, attn_bias=tensor(1, 4, 512, 512, dtype=torch.float32))
    spec = AttentionSpec(0.1, window_right=0)
    flash_fwd.flash_fwd(x, x, v, spec, t)
    flash_bwd.flash_bwd(v, x, x, v, v, tensor(1, 4, 512, dtype=torch.float32), spec, t)
    for launch in launches.calls:
        assert compile_launch(launch, 80).metadata.shared <= SHARED_LIMIT[80], launch[0].__name__


FUSED = (norm, gated_activation, rotary_cache, linear_small_batch, mla_projection, moe, sampling)


def fused_launches(monkeypatch, early):
    """A list that notes the launches of all fused kernels, launched early or not."""
    calls = []

    class Noting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append((self.kernel, args, kwargs))

    for module in FUSED:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Noting(getattr(module, name)))
        options = {"PDL": True, "launch_pdl": True} if early else {"PDL": False}
        monkeypatch.setattr(module, "early_launch_options", lambda device, options=options: options)
    return calls


def launch_small_fused_kernels():
    long, full = torch.int64, torch.float32
    norm.add_rms_norm(tensor(4, 4096), tensor(4, 4096), tensor(4096), 1e-6, False)
    gated_activation.gated_activation(tensor(4, 6144), "gelu_pytorch_tanh")
    cache, slots = tensor(10, 16, 8, 128), tensor(4, dtype=long)
    turns, norms = tensor(4, 64, dtype=full), HeadNorm(tensor(128), tensor(128), 1e-6, True)
    rotary_cache.rotate_and_store(tensor(4, 6144), 32, Rotary(turns, turns, False), norms, cache, cache, slots)
    turns = tensor(4, 32, dtype=full)
    latent, up = tensor(4, 576), tensor(16, 128, 512)
    rotary = Rotary(turns, turns, True)
    mla_projection.absorb_and_store(
        latent, tensor(4, 16, 192), up, tensor(512), 1e-6, rotary, tensor(10, 64, 576), slots
    )
    mla_projection.project_values(tensor(4, 16, 512), up)
    moe.route(tensor(4, 256, dtype=full), tensor(256, dtype=full), Routing(8, "sigmoid", 8, 4, True, 2.5))


def launch_fused_products():
    for rows in (1, 8):
        x, residual, input_norm = tensor(rows, 4096), tensor(rows, 4096), InputNorm(tensor(4096), 1e-6, False)
        linear_small_batch.linear_small_batch(x, tensor(4096, 4096), None, None, None, residual, torch.bfloat16)
        linear_small_batch.linear_small_batch(x, tensor(8192, 4096), None, input_norm, "silu", None, torch.bfloat16)
    gate_up, down = tensor(64, 2 * 1408, 2048), tensor(64, 2048, 1408)
    for tokens in (1, 32, 256, 2048):
        x, weights = tensor(tokens, 2048), tensor(tokens, 6, dtype=torch.float32)
        moe.mix_experts(x, weights, tensor(tokens, 6, dtype=torch.int64), gate_up, down, "silu", x)


@pytest.mark.parametrize("capability", [80, 90])
def test_small_fused_kernels_load_whole_lines_and_do_not_spill(monkeypatch, tmp_path, capability):
    calls = fused_launches(monkeypatch, early=capability == SM90)
    launch_small_fused_kernels()
    assert len(calls) == 6
    for launch in calls:
        sass, stack = inspect(compile_launch(launch, capability), tmp_path / "kernel.cubin")
        assert stack == 0, launch[0].__name__
        assert "STG.E" in sass
        assert ("ACQBULK" in sass) == (capability == SM90), "waits for the kernel before exactly where it may run early"


def test_fused_products_stream_their_weights_and_do_not_spill(monkeypatch, tmp_path):
    calls = fused_launches(monkeypatch, early=True)
    launch_fused_products()
    seen = set()
    for launch in calls:
        name = launch[0].__name__
        seen.add(name)
        compiled = compile_launch(launch, SM90)
        sass, stack = inspect(compiled, tmp_path / "kernel.cubin")
        assert stack <= (8 if name == "gemv_dot_kernel" else 0), name  # Triton 3.9 puts two scalars there, 3.6 none
        assert compiled.metadata.shared <= SHARED_LIMIT[SM90], name
        if name in ("gemv_kernel", "pair_gate_up_kernel", "pair_down_kernel"):
            assert "LDG.E.EF.128" in sass, "16 bytes a thread, first out of the cache"
        elif name not in ("combine_kernel", "sort_kernel", "rms_norm_kernel"):
            assert "LDGSTS" in sass, f"{name} copies asynchronously"
            assert "HGMMA" in sass or "HMMA" in sass, name
    assert seen == {
        "gemv_kernel", "gemv_dot_kernel", "pair_gate_up_kernel", "pair_down_kernel", "sort_kernel",
        "grouped_gate_up_kernel", "grouped_down_kernel", "combine_kernel", "rms_norm_kernel",
    }  # fmt: skip


def test_the_sampler_compiles(monkeypatch, tmp_path):
    calls = fused_launches(monkeypatch, early=True)
    rows = [tensor(9, dtype=dtype) for dtype in (torch.float32, torch.int32, *[torch.float32] * 2, *[torch.int64] * 2)]
    sampling.sample_on_device(tensor(9, 151936, dtype=torch.float32), *rows, True)
    assert len(calls) == 6 + sampling.PASSES - 1
    for launch in {launch[0]: launch for launch in calls}.values():
        sass, stack = inspect(compile_launch(launch, SM90), tmp_path / "kernel.cubin")
        assert "LDG.E.128" in sass or launch[0].__name__ in ("truncate_kernel", "best_kernel")
        assert stack <= 64  # a few scalars, outside of the loops over the vocabulary


@pytest.mark.parametrize(
    ("capability", "page", "head_dim", "dtype"),
    [
        (90, 16, 128, torch.bfloat16),
        (90, 64, 128, torch.float8_e4m3fn),
        (90, 16, 256, torch.int8),
        (80, 16, 128, torch.bfloat16),
        (80, 64, 256, torch.bfloat16),
        (80, 16, 128, torch.int8),
    ],
)
def test_paged_decode_copies_asynchronously_and_fits(monkeypatch, tmp_path, capability, page, head_dim, dtype):
    early = {"PDL": True, "launch_pdl": True} if capability == SM90 else {"PDL": False}
    monkeypatch.setattr(decode_launch, "early_launch_options", lambda _: early)
    monkeypatch.setattr(paged_decode, "is_hopper", lambda _: capability == SM90)
    launches = []
    monkeypatch.setattr(
        decode_launch.Launch,
        "__call__",
        lambda x, *tensors: launches.append((x.kernel, (*tensors, *x.scalars), dict(x.constants) | x.options)),
    )
    paged_decode._plan.cache_clear()
    cache, scale = tensor(64, page, 8, head_dim, dtype=dtype), tensor(8, dtype=torch.float32)
    lengths = tensor(33, dtype=torch.int32)
    scales = {} if dtype == torch.bfloat16 else {"k_scale": scale, "v_scale": scale}
    t = AttentionTensors(
        cu_seqlens_q=lengths,
        max_seqlen_q=1,
        block_table=tensor(32, 64, dtype=torch.int32),
        seqused_k=lengths[:32],
        **scales,
    )
    paged_decode.paged_attention(tensor(32, 32, head_dim), cache, cache, AttentionSpec(0.1, window_right=0), t)
    assert len(launches) == 2
    for launch in launches:
        compiled = compile_launch(launch, capability)
        sass, stack = inspect(compiled, tmp_path / "kernel.cubin")
        assert stack <= 64, launch[0].__name__
        assert compiled.metadata.shared <= SHARED_LIMIT[capability]
        if launch[0] is paged_decode.decode_kernel:
            assert "HMMA" in sass
            assert "LDGSTS" in sass
