"""A run's folder is named by what can change its result, and by nothing else."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stateful_gpt.checkpoint import save_checkpoint
from stateful_gpt.model import GPT

Identify = Callable[..., str]

FAST = ("prompts.limit=1", "prompts.max_tokens=5", "recompute.iterations=2")


@pytest.fixture
def identify(compute: Callable[..., Path]) -> Identify:
    """Run with these settings; the name of the folder that came of it."""

    def call(*overrides: str) -> str:
        folder = compute(*FAST, *overrides)
        assert (folder / "trajectory.parquet").exists()
        return folder.name

    return call


@pytest.fixture
def plain(identify: Identify) -> str:
    return identify()


@pytest.mark.parametrize(
    "override",
    [
        "device=auto",
        "runs_dir={tmp}/another/place",
        "study=another",
        "tracking.project=another",
        "tracking.entity=somebody",
        "model.name=another",
    ],
)
def test_what_changes_no_result_changes_no_name(
    identify: Identify, plain: str, override: str, tmp_path: Path
) -> None:
    if override == "device=auto" and torch.cuda.is_available():
        override = "device=cuda"
    assert identify(override.format(tmp=tmp_path)) == plain


@pytest.mark.parametrize(
    "override",
    [
        "feedback.kind=logit",
        "feedback.strength=0.25",
        "feedback.strength=-0.5",
        "feedback.layers=[0]",
        "recompute.iterations=3",
        "recompute.tolerance=0.01",
        "recompute.damping=0.5",
        "recompute.start=carried",
        "generation.strategy=sample",
        "generation.max_new_tokens=1",
        "generation.temperature=0.5",
        "generation.top_k=3",
        "generation.seed=1",
        "prompts.max_tokens=6",
        "prompts.limit=2",
        "device.dtype=float64",
        "seed=1",
        "reporting_tolerance=0.01",
    ],
)
def test_what_can_change_a_result_changes_the_name(
    identify: Identify, plain: str, override: str
) -> None:
    assert identify(override) != plain


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("feedback.strength=1e-1", "feedback.strength=0.1"),
        ("feedback.strength=1", "feedback.strength=1.0"),
        ("feedback.strength=-0.0", "feedback.strength=0.0"),
        ("recompute.damping=1", "recompute.damping=1.00"),
        ("recompute.tolerance=1e-3", "recompute.tolerance=0.001"),
        ("recompute.tolerance=-0.0", "recompute.tolerance=0"),
        ("feedback.layers=[0,1]", "feedback.layers=[0, 1]"),
    ],
)
def test_two_ways_to_write_a_number_are_one_run(identify: Identify, one: str, other: str) -> None:
    assert identify(one) == identify(other)


def test_the_command_line_gives_the_same_name(
    in_process: Callable[..., tuple[int, str, str]], settings: list[str], identify: Identify
) -> None:
    code, out, _ = in_process(
        "converge", "-m", *settings, *FAST, "feedback.strength=1e-1,0.1,1.0e-01"
    )
    assert code == 0
    assert out.startswith("1 run\n")
    assert f"{identify('feedback.strength=0.1')}  log_prob β=0.1" in out


def test_a_prompt_counts_by_its_content_not_by_its_file(identify: Identify, tmp_path: Path) -> None:
    entries = [{"id": "a", "text": "One."}, {"id": "b", "text": "Two."}]
    first, second, third = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "third"))
    first.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    second.write_text("".join(json.dumps(entry, indent=None) + "\n\n" for entry in entries[:1]))
    third.write_text(json.dumps({"id": "a", "text": "One!"}) + "\n")
    names = [identify(f"prompts.file={path}") for path in (first, second, third)]
    assert names[0] == names[1], "limited to its first prompt, the first file says the same"
    assert names[2] != names[0]
    as_text = tmp_path / "a.txt"
    as_text.write_text("One.")
    assert identify(f"prompts.file={as_text}") == names[0]


def test_a_model_counts_by_its_content_not_by_its_folder(
    identify: Identify, plain: str, checkpoint_folder: Path, make_gpt: Callable[..., GPT],
    tmp_path: Path,
) -> None:  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint_folder, copy)
    assert identify(f"model.path={copy}") == plain
    (copy / "README.md").write_text("A card is not part of the model.")
    assert identify(f"model.path={copy}") == plain
    other = tmp_path / "other"
    save_checkpoint(
        make_gpt(8, block_size=32, vocab_size=257, dtype=torch.float32), other, tokenizer="byte"
    )
    assert identify(f"model.path={other}") != plain


def test_another_tokenizer_is_another_run(identify: Identify, plain: str, tmp_path: Path) -> None:
    def ranks(path: Path, shift: int) -> Path:
        """A tokenizer of bytes whose ids are moved around."""
        lines = [f"{base64.b64encode(bytes([(i + shift) % 256])).decode()} {i}" for i in range(256)]
        path.write_text("\n".join(lines) + "\n")
        return path

    one, other = ranks(tmp_path / "one.tiktoken", 1), ranks(tmp_path / "other.tiktoken", 2)
    first = identify(f"model.tokenizer={one}")
    assert len({plain, first, identify(f"model.tokenizer={other}")}) == 3
    assert identify(f"model.tokenizer={one.rename(tmp_path / 'renamed.tiktoken')}") == first
