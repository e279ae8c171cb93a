"""Which backend serves a call, what a forced one does, and that imports stay light."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import octavo
from octavo.ops import dispatch

CPU = torch.device("cpu")


def test_a_forced_backend_that_cannot_serve_raises():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"'hopper' cannot serve this flash_fwd call.*CUDA"):
        octavo.flash_attn_func(q, q, q, backend="hopper")
    with octavo.use_backend("hopper"), pytest.raises(ValueError, match="hopper"):
        octavo.flash_attn_func(q, q, q)
    with pytest.raises(ValueError, match=r"expected one of hopper, triton, cpu, reference or None, got 'cudnn'"), \
            octavo.use_backend("cudnn"):  # fmt: skip
        pass


def test_overrides_nest_and_end():
    with octavo.use_backend("reference"):
        with octavo.use_backend(None):
            assert dispatch.forced_backend() is None
        assert dispatch.forced_backend() == "reference"
        assert dispatch.forced_backend("cpu") == "cpu"
    assert dispatch.forced_backend() is None


def test_a_kernel_that_refuses_is_passed_over_with_its_reason(monkeypatch):
    def refuses(*arguments):
        return "it is Sunday"

    real = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda b, m, op: (None, refuses) if b == "cpu" else real(b, m, op))
    monkeypatch.setattr(dispatch, "_candidates", dispatch._candidates.__wrapped__)  # not what was found before
    choice = dispatch.choose("flash_fwd", CPU, (None,) * 5)
    assert choice.backend == "reference"
    assert choice.passed_over == {"cpu.flash_fwd": "it is Sunday"}


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    backends = []
    real = dispatch.choose

    def recording(op, device, arguments, backend=None):
        choice = real(op, device, arguments, backend)
        backends.append((op, choice.backend))
        return choice

    monkeypatch.setattr(dispatch, "choose", recording)
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    with octavo.use_backend("cpu"):
        out = octavo.flash_attn_func(q, q, q)
    out.sum().backward()
    assert backends == [("flash_fwd", "cpu"), ("flash_bwd", "cpu")]


@pytest.mark.parametrize("module", ["octavo.ops", "octavo.nn"])
def test_imports_bring_neither_triton_nor_the_engine(module):
    code = (
        f"import sys, {module}; print([m for m in sys.modules if m.startswith(('triton', 'numba', 'octavo.engine'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_kernel_runs_with_the_device_of_its_tensors_current(monkeypatch):
    """Triton launches on the current device: a call on another GPU's tensors must change it, and change it back."""
    current = [0]

    @contextmanager
    def make_current(device):
        current.append(device.index)
        yield
        current.pop()

    choice = dispatch.Choice(lambda: current[-1], "triton", "triton.flash_fwd", {})
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: choice)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", make_current)
    assert [dispatch.run("flash_fwd", torch.device("cuda", i), ()) for i in (0, 1)] == [0, 1]
    assert current == [0]
