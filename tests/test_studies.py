"""The studies that answer the project's questions: each overlay runs, and what its README computes.

On two texts and few tokens and strengths; a study's own numbers are in its README.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments/studies"
TEXTS = "experiments/studies/texts/prose_choose.jsonl,experiments/studies/texts/code_choose.jsonl"
SHORT = {
    "speed": ["feedback.layers=all,[0]"],
    "speed_kinds": [],
    "regimes": ["prompts.max_tokens=20,24"],
    "effect": [],
    "effect_layers": [],
    "effect_kinds": [],
    "effect_generation": ["generation.max_new_tokens=8"],
    "smollm2_texts": ["model=bundled"],
    "precision": [],
    "carried": ["generation.max_new_tokens=3"],
    "carried_slid": ["prompts.max_tokens=254", "generation.max_new_tokens=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_small_version_of_a_study(name: str, tmp_path: Path) -> None:
    words = [*SHORT[name], "feedback.strength=-0.1,0.1,0.5", f"prompts.file={TEXTS}"]
    words += ["prompts.limit=2", "tracking.mode=disabled", f"runs_dir={tmp_path}/runs"]
    if not any(word.startswith("prompts.max_tokens") for word in words):
        words.append("prompts.max_tokens=20")
    command = [sys.executable, "-m", "experiments.converge", "-m", f"experiment={name}", *words]
    _run(command)
    finished = len(list((tmp_path / "runs" / name).glob("*/summary.json")))
    assert finished >= 6
    for block in re.findall(r"```python\n(.*?)```", _readme(name), flags=re.DOTALL):
        if f'"runs/{name}"' in block or "runs/" not in block:
            block = block.replace('"runs/', f'"{tmp_path}/runs/').replace("= 64, 4,", "= 12, 1,")
            assert _run(
                [sys.executable, "-c", block], cwd=tmp_path if "figures/" in block else ROOT
            )


@pytest.mark.parametrize("name", SHORT)
def test_a_study_says_what_it_found_and_how(name: str) -> None:
    text = _readme(name)
    assert f"python -m experiments.converge -m experiment={name}" in text
    for part in ("**Question.**", "**Answer.**", "commit `", "doubtful"):
        assert part in text
    for picture in re.findall(r"\]\((\w+\.(?:png|html))\)", text):
        assert (FOLDER / name.partition("_")[0] / picture).exists()


def _readme(name: str) -> str:
    place = FOLDER / name
    return (
        (place if place.exists() else FOLDER / name.split("_")[0])
        .joinpath("README.md")
        .read_text(encoding="utf-8")
    )


def _run(words: list[str], *, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
