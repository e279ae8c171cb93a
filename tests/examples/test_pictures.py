"""Every example runs small and writes its picture."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAYS = {
    "why_scale.py": "var q·k",
    "kv_cache_sizes.py": "DeepSeek-V3        MLA         68.6",
    "residual_wiring.py": "ScaledResidual (ReZero)",
    "tiling_io.py": "   128      86016      20480    4.2",
}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SAYS)
def test_example_runs_and_draws(script: str, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "out.png"
    assert SAYS[script] in run(script, "--save", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_comparison_draws_and_prints_every_attention(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    out = run("train_tiny.py", "--compare", "--steps", "4", "--out", str(tmp_path / "runs"), "--save", str(picture))
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| M", "| G"))]
    # 2 layers of bf16: 2·6·8, 2·2·8, 2·1·8 and 12 + 4 numbers per token
    assert [(row[0], row[2]) for row in rows] == [("| MHA", "384"), ("| GQA", "128"), ("| MQA", "64"), ("| MLA", "64")]
    assert picture.read_bytes().startswith(b"\x89PNG")
