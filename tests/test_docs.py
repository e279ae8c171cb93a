"""The prose is true: files that documents name exist, links lead somewhere, and the README's code runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# `octavo/engine/scheduler.py` or `engine/scheduler.py` in backticks; links and pictures in parentheses
_NAMED_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|sh|toml|json|png|svg))`")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_named_files_exist(document: Path) -> None:
    missing = [
        name
        for name in _NAMED_FILE.findall(document.read_text())
        if not any((base / name).exists() for base in (ROOT, ROOT / "octavo", document.parent))
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_links_lead_somewhere(document: Path) -> None:
    broken = [
        link
        for link in _LINK.findall(document.read_text())
        if "://" not in link and not (document.parent / link).exists()
    ]
    assert not broken


README_BLOCKS = _PYTHON_BLOCK.findall((ROOT / "README.md").read_text())


@pytest.mark.real_model
@pytest.mark.parametrize("block", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_readme_code_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"# (torch\.Size\(.*\))", block)
    assert all(shape in done.stdout for shape in printed)


def test_readme_has_the_code_that_is_tested() -> None:
    assert len(README_BLOCKS) >= 3
