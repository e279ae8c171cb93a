"""Compiled kernels on disk: loaded without Numba, made anew when damaged, never shared between different CPUs."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

# a product whose result does not depend on the CPU, printed with what had to be imported for it
PRODUCT = """
import sys, numpy as np, torch
from octavo.ops.linear import QuantizedWeight, linear
rng = np.random.default_rng(0)
raw = rng.integers(0, 256, (48, 4, {size}), dtype=np.uint8)
raw[..., :4].view(np.float16)[:] = 0.01
weight = QuantizedWeight.from_gguf(raw, "{qtype}", (48, 128))
y = linear(torch.from_numpy(rng.standard_normal((7, 128), dtype=np.float32)), weight)
print("numba" in sys.modules, *[f"{{x:.4e}}" for x in y.flatten()[:40].tolist()])
"""
Q4_1 = PRODUCT.format(qtype="Q4_1", size=20)


def run(code: str, cache: pathlib.Path, **environment: str) -> tuple[bool, list[str], str]:
    """(Numba was imported, printed values, messages) of a fresh process that keeps its kernels in `cache`."""
    env = {**os.environ, "OCTAVO_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    imported, *values = done.stdout.split()
    return imported == "True", values, done.stderr


def test_a_warm_start_needs_no_numba_and_a_damaged_file_is_replaced(tmp_path: pathlib.Path) -> None:
    imported, values, messages = run(Q4_1, tmp_path)
    assert imported
    assert "compiling the CPU kernel quant-linear-4m16 (once" in messages
    assert run(Q4_1, tmp_path) == (False, values, "")
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    imported, again, _ = run(Q4_1, tmp_path)
    assert imported
    assert again == values
    assert run(Q4_1, tmp_path) == (False, values, "")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 CPUs")
@pytest.mark.parametrize(("qtype", "size"), [("Q4_1", 20), ("Q8_0", 34)])
def test_older_cpus_get_their_own_code_and_the_same_numbers(tmp_path: pathlib.Path, qtype: str, size: int) -> None:
    code = PRODUCT.format(qtype=qtype, size=size)
    _, here, _ = run(code, tmp_path)
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.1,+avx,+avx2,+fma,+f16c"}
    nehalem = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.1,+sse4.2"}
    for environment in (haswell, nehalem):
        imported, values, _ = run(code, tmp_path, **environment)
        assert imported
        assert [float(v) for v in values] == pytest.approx([float(v) for v in here], rel=2e-4, abs=1e-5)
    assert len(list(tmp_path.iterdir())) == 3
    assert run(code, tmp_path, **haswell)[0] is False


def test_an_unwritable_folder_is_reported_not_fatal(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    _, _, messages = run(Q4_1, tmp_path / "file")
    assert "cannot keep compiled kernels" in messages


def test_of_each_kernel_the_last_used_objects_stay(tmp_path: pathlib.Path) -> None:
    names = [f"quant-linear-4m16-{digit * 32}.o" for digit in "0123456"]
    for age, name in enumerate([*names, f"quant-linear-8z16-{'0' * 32}.o"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    run(Q4_1, tmp_path)
    kept = {p.name for p in tmp_path.iterdir()}
    assert len(kept) == 4 + 1
    assert {*names[:3], f"quant-linear-8z16-{'0' * 32}.o"} < kept


def test_a_kernel_is_made_of_its_own_sources() -> None:
    from octavo.kernels.cpu import jit, paged_attention, quant_linear

    linear, attention = (jit._sources(module.__file__) for module in (quant_linear, paged_attention))
    for needed in ("quant_linear.py", "quant_linear_code.py", "simd.py", "jit.py"):
        assert (pathlib.Path(jit.__file__).parent / needed).read_bytes() in linear
    assert b"def make_attention" in attention
    assert b"def make_attention" not in linear
