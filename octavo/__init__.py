"""Octavo: attention that fits.

Names load on first use, so that `import octavo` costs milliseconds and `octavo.nn` brings neither the engine nor Triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "octavo.llm": ["LLM"],
    "octavo.engine.sampling_params": ["SamplingParams", "BeamSearchParams"],
    "octavo.engine.outputs": ["RequestOutput", "CompletionOutput"],
    "octavo.engine.async_engine": ["AsyncLLM"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncLLM as AsyncLLM
    from octavo.engine.outputs import CompletionOutput as CompletionOutput
    from octavo.engine.outputs import RequestOutput as RequestOutput
    from octavo.engine.sampling_params import BeamSearchParams as BeamSearchParams
    from octavo.engine.sampling_params import SamplingParams as SamplingParams
    from octavo.llm import LLM as LLM


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
