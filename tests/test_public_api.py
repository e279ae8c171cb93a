"""The names that users import, what they cost, and which of them must not bring the others."""

import importlib
import subprocess
import sys

import pytest

import octavo


def python(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_after(code: str) -> set[str]:
    return set(python(f"{code}; import sys; print(*sys.modules)").split())


@pytest.mark.parametrize("name", octavo.__all__)
def test_every_public_name_is_there(name):
    assert getattr(octavo, name) is not None
    assert name in dir(octavo)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        octavo.LLMM  # noqa: B018


def test_the_engines_names_are_public():
    for name in ("LLM", "AsyncLLM", "SamplingParams", "BeamSearchParams", "RequestOutput", "CompletionOutput"):
        assert name in octavo.__all__


def test_import_octavo_is_light():
    """Under 0.3 s, since it loads nothing but itself."""
    assert not {"torch", "numpy", "triton", "numba", "octavo.engine", "octavo.nn"} & modules_after("import octavo")


def test_the_command_line_loads_no_torch_until_it_needs_it():
    code = "from octavo.cli import build_parser; build_parser().format_help()"
    assert not {"torch", "numpy", "octavo.llm"} & modules_after(code)


def test_sampling_params_need_no_torch():
    assert "torch" not in modules_after("from octavo import SamplingParams, RequestOutput")


def test_nn_brings_neither_the_engine_nor_triton():
    loaded = modules_after("import octavo.nn")
    assert not any(name.startswith(("octavo.engine", "octavo.models", "octavo.llm", "triton")) for name in loaded)


@pytest.mark.parametrize("module", ["octavo.llm", "octavo.cli", "octavo.bench", "octavo.engine.async_engine"])
def test_importing_has_no_side_effect_on_logging(module):
    importlib.import_module(module)
    assert python(f"import {module}, logging; print(len(logging.getLogger().handlers))") == "0"
