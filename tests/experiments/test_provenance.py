"""What a run stores of the source that computed it: a real repository, changed in known ways."""

import hashlib
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.runs import compute_once, provenance

Git = Callable[..., str]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own in the place of this one."""
    folder = tmp_path / "checkout"
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments" / "run.py").write_text("print(1)\n", encoding="utf-8")
    (folder / ".gitignore").write_text("data/\n", encoding="utf-8")
    monkeypatch.setattr(provenance, "ROOT", folder)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "Begin"],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    forget()
    yield folder
    forget()


def forget() -> None:
    """What a process finds at its start is kept for its life."""
    provenance.changes.cache_clear()
    provenance._status.cache_clear()
    provenance._commit.cache_clear()


def found() -> dict[str, Any]:
    forget()
    return provenance.provenance(torch.device("cpu"))


def git(folder: Path, *words: str, content: bytes = b"") -> bytes:
    done = subprocess.run(["git", *words], cwd=folder, input=content, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    origin = found()
    assert origin["commit"] == git(checkout, "rev-parse", "HEAD").decode().strip()
    assert origin["dirty"] is False
    assert origin["changes"] is None
    assert {"python", "stateful_gpt", "torch", "numpy", "matplotlib"} <= set(origin["versions"])


def test_every_package_is_source() -> None:
    settings = tomllib.loads((provenance.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.removesuffix("*") for name in packages} < set(provenance.SOURCE_FOLDERS)


def test_the_patch_gives_back_changed_and_new_source_but_no_data(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / "experiments" / "run.py").write_text("print(2)\n", encoding="utf-8")
    (checkout / "experiments" / "né w.py").write_text("new = 1", encoding="utf-8")
    (checkout / "experiments" / "private.jsonl").write_text("SECRET", encoding="utf-8")
    (checkout / "notes.py").write_text("SECRET", encoding="utf-8")
    (checkout / "data").mkdir()
    (checkout / "data" / "text.py").write_text("SECRET", encoding="utf-8")
    index = (checkout / ".git" / "index").read_bytes()
    origin = found()
    changes = provenance.changes()
    assert origin["dirty"] is True
    assert origin["changes"] == {
        "sha256": hashlib.sha256(changes.patch).hexdigest(),
        "bytes": len(changes.patch),
        "kept_bytes": len(changes.patch),
        "new_files_left_out": 2,
    }
    assert b"SECRET" not in changes.patch
    assert b"private" not in changes.patch
    assert (checkout / ".git" / "index").read_bytes() == index, "git's own index is left alone"

    git(tmp_path, "clone", "-q", str(checkout), "clone")
    git(tmp_path / "clone", "apply", "-", content=changes.patch)
    for name in ("run.py", "né w.py"):
        restored = (tmp_path / "clone" / "experiments" / name).read_bytes()
        assert restored == (checkout / "experiments" / name).read_bytes()


def test_a_patch_that_is_too_large_is_cut_after_a_whole_file_and_says_so(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "LARGEST_PATCH", 2000)
    (checkout / "experiments" / "a.py").write_text("a = 1\n", encoding="utf-8")
    (checkout / "experiments" / "b.py").write_text("b = 1\n" * 1000, encoding="utf-8")
    origin = found()["changes"]
    patch = provenance.changes().patch
    assert origin["kept_bytes"] == len(patch) < 2000 < origin["bytes"]
    git(tmp_path, "clone", "-q", str(checkout), "clone")
    git(tmp_path / "clone", "apply", "-", content=patch)
    assert (tmp_path / "clone" / "experiments" / "a.py").exists()
    assert not (tmp_path / "clone" / "experiments" / "b.py").exists()


def test_changes_that_only_data_makes_are_told_apart_by_nothing(checkout: Path) -> None:
    (checkout / "text.txt").write_text("x", encoding="utf-8")
    assert found()["dirty"] is True
    assert provenance.changes().patch == b""


def test_where_git_does_not_answer_nobody_calls_the_source_clean(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = shutil.which("git"), tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1" = status ] && exit 1\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    origin = found()
    assert origin["commit"] == git(checkout, "rev-parse", "HEAD").decode().strip()
    assert (origin["dirty"], origin["changes"]) == (None, None)


def test_a_folder_inside_another_repository_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", checkout / "experiments")
    origin = found()
    assert (origin["commit"], origin["dirty"], origin["changes"]) == (None, None, None)


def test_a_run_keeps_the_patch_and_a_later_clean_attempt_removes_it(
    checkout: Path, compute: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute_once, "changes", provenance.changes)
    (checkout / "experiments" / "run.py").write_text("print(3)\n", encoding="utf-8")
    forget()
    folder = compute()
    patch = (folder / "changes.patch").read_bytes()
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert status["dirty"] is True
    assert status["changes"]["sha256"] == hashlib.sha256(patch).hexdigest()
    assert b"+print(3)" in patch
    git(checkout, "checkout", "-q", ".")
    forget()
    (folder / "status.json").unlink()
    assert compute() == folder
    assert not (folder / "changes.patch").exists()


def test_a_run_names_its_model_with_the_revision_that_the_hub_gave(
    compute: Callable[..., Path],
    checkpoint_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    snapshot = tmp_path / "snapshots" / "0a1b2c"
    settings = {"vocab_size": 257, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**settings)
    transformers.GPT2LMHeadModel(config).save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    for path, name in (("us/gpt", "us/gpt@0a1b2c"), (str(checkpoint_folder),) * 2):
        folder = compute(f"model.path={path}", "model.tokenizer=byte")
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        assert status["model"] == name


def test_each_run_of_a_sweep_stores_the_command_of_that_run_alone(
    in_process: Callable[..., Any], settings: list[str], runs: Callable[[], list[Path]]
) -> None:
    assert in_process("converge", "-m", *settings, "feedback.strength=0,1")[0] == 0
    commands = {
        json.loads((folder / "status.json").read_text(encoding="utf-8"))["command_of_this_run"]
        for folder in runs()
    }
    beginning = f"python -m experiments.converge {settings[0]} "
    assert len(commands) == 2
    assert all(command.startswith(beginning) for command in commands)
    assert {command.split()[-1] for command in commands} == {
        "feedback.strength=0",
        "feedback.strength=1",
    }
