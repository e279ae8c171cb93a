"""The code in docs/modules.md runs, and its pictures exist."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "modules.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs(code: str) -> None:
    exec(compile(code, str(PAGE), "exec"), {})


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", PAGE.read_text())
    assert len(pictures) >= 4
    assert all((PAGE.parent / picture).is_file() for picture in pictures)
