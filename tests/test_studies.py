"""The studies that answer the project's questions: each overlay runs, and what its README computes.

On two texts and few tokens and strengths; a study's own numbers are in its README.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments/studies"
TEXTS = "experiments/studies/texts/prose_choose.jsonl,experiments/studies/texts/code_choose.jsonl"
READMES = ("speed", "regimes", "effect", "carried", "precision", "smollm2")
SHORT = {  # of an overlay
    "speed": ["feedback.layers=all,[0]"],
    "regimes": ["prompts.max_tokens=20,24"],
    "effect_generation": ["generation.max_new_tokens=8"],
    "carried": ["generation.max_new_tokens=3"],
    "carried_slid": ["prompts.max_tokens=254", "generation.max_new_tokens=3"],
    "smollm2_texts": ["prompts.max_tokens=20,24"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READMES)
def test_the_commands_and_the_lines_of_a_study_on_less(name: str, tmp_path: Path) -> None:
    for words in _commands(name):
        overlay = words[0].removeprefix("experiment=")
        study = next((w.removeprefix("study=") for w in words if w.startswith("study=")), overlay)
        less = [*SHORT.get(overlay, []), "feedback.strength=-0.1,0.1,0.5", f"prompts.file={TEXTS}"]
        less += ["prompts.limit=2", "tracking.mode=disabled", f"runs_dir={tmp_path}/runs"]
        if not any(word.startswith("prompts.max_tokens") for word in less):
            less.append("prompts.max_tokens=20")
        if "smollm2" in study:
            less.append("model=bundled")  # layers beyond its own are none of it
        _run([sys.executable, "-m", "experiments.converge", "-m", *words, *less])
        assert len(list((tmp_path / "runs" / study).glob("*/summary.json"))) >= 6
    for block in re.findall(r"```python\n(.*?)```", _readme(name), flags=re.DOTALL):
        block = block.replace('"runs/', f'"{tmp_path}/runs/').replace(", 64, 22 ", ", 12, 1 ")
        assert ", 64, 22" not in block
        drawn = "savefig(" in block
        said = _run([sys.executable, "-c", block], cwd=tmp_path if drawn else ROOT)
        assert any((tmp_path / "figures" / name).iterdir()) if drawn else said


@pytest.mark.slow
def test_the_study_of_trained_feedback_on_less(tmp_path: Path) -> None:
    lines = (FOLDER / "texts" / "prose_choose.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    novel = "\n".join(json.loads(line)["text"] for line in lines)
    for part in ("train", "validation", "test"):
        folder = tmp_path / "data" / "austen" / part
        folder.mkdir(parents=True)
        (folder / "novel.txt").write_text(novel)
    less = ["training.steps=2", "training.batch_size=2", "training.evaluate_every=2"]
    less += ["training.evaluate_windows=2", "training.final_windows=2", "tracking.mode=disabled"]
    for words in _commands("stateful", "train"):
        _run([sys.executable, "-m", "experiments.train", *words, *less], cwd=tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", _readme("stateful"), flags=re.DOTALL)
    assert "stateful, depth 1 - plain" in _run([sys.executable, "-c", block], cwd=tmp_path)


def test_every_overlay_of_a_study_is_in_its_readme() -> None:
    shown = {words[0] for name in READMES for words in _commands(name)}
    assert shown >= {f"experiment={overlay}" for overlay in SHORT}


@pytest.mark.parametrize("name", READMES)
def test_a_study_says_what_it_found_and_how(name: str) -> None:
    text = _readme(name)
    for part in ("**Question.**", "**Answer.**", "commit `", "doubtful"):
        assert part in text
    for picture in re.findall(r"\]\((\w+\.(?:png|html))\)", text):
        assert (FOLDER / name / picture).exists()


def _readme(name: str) -> str:
    return (FOLDER / name / "README.md").read_text(encoding="utf-8")


def _commands(name: str, runner: str = "converge -m") -> list[list[str]]:
    """What a runner is told in a study's README."""
    text = _readme(name).replace("\\\n", "")
    pattern = rf"^python -m experiments\.{runner} (.+?)(?: +#.*)?$"
    found = re.findall(pattern, text, re.MULTILINE)
    return [shlex.split(words) for words in found]


def _run(words: list[str], *, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
