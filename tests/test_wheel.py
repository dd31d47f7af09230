"""What is installed without the checkout is whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_sweep_runs_from_a_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"  # which is built in
    for name in ("stateful_gpt", "experiments", "analysis", "scripts", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    for words in (
        ["wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        ["install", "--no-deps", "--target", str(tmp_path / "site"), "stateful_gpt"],
    ):
        where = ["--no-index", "--find-links", str(tmp_path)] if words[0] == "install" else []
        subprocess.run([*pip, *words, *where], check=True, capture_output=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.converge", "-m", "feedback=log_prob,prob"),
            *("prompts.limit=1", "prompts.max_tokens=8", "device=cpu", "tracking.mode=disabled"),
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 finished" in done.stdout
    for status in (tmp_path / "runs" / "default").glob("*/status.json"):
        assert '"commit": null' in status.read_text(), "nothing of the checkout took part"
