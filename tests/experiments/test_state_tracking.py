"""``python -m experiments.state_tracking``: whole runs, the same numbers again, refusals."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from experiments.runs import compute_once
from experiments.runs.provenance import Changes
from experiments.state_tracking import run as contest
from experiments.state_tracking.run import accuracy_by_depth, locate
from experiments.state_tracking.settings import (
    ContestantSettings,
    RecipeSettings,
    StateTrackingSettings,
    TaskSettings,
    TrackingSettings,
)
from experiments.state_tracking.tasks import Task, make_task, word_batch
from stateful_gpt.depth import HIDDEN_STATES
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import LeftToRight
from stateful_gpt.train import TrainingConfig, make_optimizers, training_step
from tests.forked import Forked

Called = tuple[int, str, str]
TABLES = ("accuracy.parquet", "history.parquet")
DEADLINE = 120.0  # seconds; nothing here should take a tenth of it


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A contest of a few hundredths of a second, into ``tmp_path / "runs"``."""
    return [
        "device=cpu",
        "tracking.mode=disabled",
        "task.trained_level=3",
        "task.tested_level=5",
        "size.n_embd=8",
        "training.steps=4",
        "training.batch_size=4",
        "training.record_every=3",
        "test_words=16",
        f"runs_dir={tmp_path / 'runs'}",
        "study=s",
    ]


@pytest.fixture
def compete(in_process: Callable[..., Called], words: list[str]) -> Callable[..., Called]:
    def call(*overrides: str, sweep: bool = False) -> Called:
        flag = ("-m",) if sweep else ()
        return in_process("state_tracking", *flag, *words, *overrides)

    return call


def numbers(folder: Path) -> list[object]:
    """Everything a run has found, but for its time."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"], summary["study"]
    return [summary, *(pq.read_table(folder / name).to_pylist() for name in TABLES)]


def test_training_words_depend_on_seed_and_step_and_all_are_tested_on_the_same(
    compete: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    tested: list[int] = []

    def seen(task: Task, *, seed: int, size: int, level: int, length: int) -> tuple[Tensor, Tensor]:
        (tested if level == length else trained).append(seed)
        return word_batch(task, seed=seed, size=size, level=level, length=length)

    monkeypatch.setattr(contest, "word_batch", seen)
    assert compete("seed=1,2", "contestant.layers=1,2", sweep=True)[0] == 0
    assert (len(trained), len(set(trained))) == (4 * 4, 2 * 4), "the same for any contestant"
    assert (len(tested), len(set(tested))) == (4, 1)
    assert not {*tested} & {*trained}


def test_a_sweep_of_contestants_leaves_whole_runs_and_is_not_run_again(
    compete: Callable[..., Called], runs: Callable[[], list[Path]]
) -> None:
    contestants = "contestant={layers: 2, times: 2},{passes: 3, through: true}"
    code, out, err = compete(contestants, sweep=True)
    assert (code, err) == (0, "")
    assert "Draw it:  python -m analysis figures" in out
    folders = runs()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert {one["contestant"]: one["layer_passes"] for one in summaries} == {
        "plain, 2 layers, 2 x steps": 2 * 8,
        "stateful, 1 layer, 3 passes through": 3 * 4,
    }
    for folder, summary in zip(folders, summaries, strict=True):
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        rows = pq.read_table(folder / "accuracy.parquet").to_pylist()
        depths = range(5) if summary["contestant"].startswith("stateful") else range(1)
        assert [(row["depth"], row["level"]) for row in rows] == [
            (depth, level) for depth in depths for level in range(1, 6)
        ]
        assert summary["accuracy_tested"] == rows[-1]["accuracy"]
        assert summary["accuracy_trained"] == rows[-3]["accuracy"]
        steps = [row["step"] for row in pq.read_table(folder / "history.parquet").to_pylist()]
        assert steps == ([3, 4] if len(depths) == 5 else [3, 6, 8])
    before = [path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()]
    code, out, _ = compete(contestants, sweep=True)
    assert code == 0
    assert "2 runs, 2 finished already" in out
    assert before == [path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()]


def test_the_same_settings_find_the_same_numbers_elsewhere(
    compete: Callable[..., Called], tmp_path: Path
) -> None:
    for place in ("one", "other"):
        code, _, _ = compete(f"runs_dir={tmp_path / place}", "contestant.passes=2")
        assert code == 0
    (one,), (other,) = (list((tmp_path / p / "s").iterdir()) for p in ("one", "other"))
    assert one.name == other.name
    assert numbers(one) == numbers(other)


def test_a_killed_run_starts_afresh_and_finds_the_same_numbers(
    compete: Callable[..., Called],
    words: list[str],
    start: Callable[..., Forked],
    runs: Callable[[], list[Path]],
    tmp_path: Path,
) -> None:
    longer = ["training.steps=60", "contestant.passes=2"]
    process = start([sys.executable, "-m", "experiments.state_tracking", *words, *longer])
    deadline = time.monotonic() + DEADLINE
    while not any(tmp_path.glob("runs/s/*/status.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = runs()
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    assert not (folder / "summary.json").exists()
    assert compete(*longer)[0] == 0
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert compete(*longer, f"runs_dir={tmp_path / 'elsewhere'}")[0] == 0
    assert numbers(folder) == numbers(tmp_path / "elsewhere" / "s" / folder.name)


def test_a_run_keeps_the_changes_of_its_source(
    compete: Callable[..., Called], runs: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = Changes(b"diff", {})
    monkeypatch.setattr(compute_once, "changes", lambda: patch)
    assert compete()[0] == 0
    (folder,) = runs()
    assert (folder / "changes.patch").read_bytes() == b"diff"


def test_a_run_that_cannot_be_written_says_so(
    compete: Callable[..., Called], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = compete(f"runs_dir={tmp_path / 'file'}")
    assert code == 1
    assert re.fullmatch(r"error: runs_dir: .+ cannot be written \(.+\)\n", err)
    assert "Traceback" not in out


def test_too_many_words_for_the_memory_are_named_as_what_to_make_smaller(
    compete: Callable[..., Called],
) -> None:
    code, _, err = compete(f"test_words={10**17}")  # no address space holds them
    assert code == 1
    said = "the machine's memory does not hold the run: use a smaller task.tested_level or"
    assert err == f"error: {said} test_words\n"


def test_a_training_that_diverges_is_one_sentence_and_no_result(
    compete: Callable[..., Called], runs: Callable[[], list[Path]]
) -> None:
    code, out, err = compete("training.learning_rate=1e30")
    assert code == 1
    assert re.fullmatch(r"error: the training diverged: .+ at step [2-4]; use a smaller .+\n", err)
    assert "Traceback" not in out
    (folder,) = runs()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("task.name=chess", ["task.name", "chess", "'cups' or 'modulo'"]),
        ("task.target=third", ["task.target", "third", "'state' or 'half'"]),
        ("task.trained_level=0", ["task.trained_level", "greater than or equal to 1", "0"]),
        ("task.tested_level=2", ["task.tested_level", "at least task.trained_level (3)", "2"]),
        ("contestant.layers=0", ["contestant.layers", "greater than or equal to 1", "0"]),
        ("contestant.layers=two", ["contestant.layers", "two", "a valid integer"]),
        ("contestant.through=true", ["contestant.through", "contestant.passes=1"]),
        ("contestant.drawn=true", ["contestant.drawn", "contestant.passes=1"]),
        ("contestant.depth=2", ["contestant.depth", "layers, passes, through, drawn, times"]),
        ("+contestant.depth=2", ["contestant.depth", "layers, passes, through, drawn, times"]),
        ("contestant.passes=1,2", ["contestant.passes=1,2"]),
        ("size.n_head=3", ["size.n_embd", "multiple of size.n_head (3)", "8"]),
        ("training.learning_rate=0", ["training.learning_rate", "greater than 0", "0"]),
        ("training.learning_rate=nan", ["training.learning_rate", "finite", "nan"]),
        ("training.weight_decay=-1", ["training.weight_decay", "greater than or equal to 0", "-1"]),
        ("test_words=0", ["test_words", "greater than or equal to 1", "0"]),
        ("device.dtype=float64", ["device.dtype", "float32", "float64"]),
        ("study=a/b", ["study", "a/b", "letters"]),
        ("seed=-1", ["seed", "-1"]),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(
    compete: Callable[..., Called], tmp_path: Path, override: str, told: list[str]
) -> None:
    code, out, err = compete(override)
    assert code == 2
    assert re.fullmatch(r"error: .+\n", err), "one line"
    assert "Traceback" not in out
    for words in told:
        assert words in err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_what_cannot_change_a_result_does_not_change_the_run() -> None:
    plain = StateTrackingSettings()
    same = StateTrackingSettings(
        tracking=TrackingSettings(mode="disabled"), study="x", runs_dir="elsewhere"
    )
    assert locate(plain).id == locate(same).id
    others = [
        StateTrackingSettings(seed=1),
        StateTrackingSettings(task=TaskSettings(target="half")),
        StateTrackingSettings(contestant=ContestantSettings(passes=2)),
        StateTrackingSettings(training=RecipeSettings(steps=601)),
    ]
    assert len({locate(one).id for one in [plain, *others]}) == 5


def answering_gpt(seed: int) -> GPT:
    """A small float64 model of the cups with an open gate."""
    model = GPT(
        GPTConfig(block_size=7, vocab_size=16, n_layer=2, n_head=2, n_embd=8, hidden_feedback=True)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return model.double()


def test_the_last_depth_is_what_reading_from_left_to_right_says() -> None:
    task, model = make_task("cups", "state"), answering_gpt(0)
    accuracy = accuracy_by_depth(model, task, words=32, depth=6)
    assert accuracy[0] != accuracy[6], "feedback matters here"
    tokens, targets = word_batch(task, seed=2**60, size=32, level=7, length=7)
    reader = LeftToRight(model, HIDDEN_STATES, batch=32, capacity=7)
    for position in range(7):
        reader.read(tokens[:, position : position + 1])
        scores = [reader.score_next(torch.full((32,), answer)) for answer in range(task.vocab_size)]
        said = torch.stack(scores).argmax(dim=0)
        right = (said == targets[:, position]).double().mean().item()
        assert accuracy[6][position] == right


def test_given_targets_train_as_the_following_tokens_would() -> None:
    tokens = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(steps=3, passes=2, through_passes=True)
    trained = []
    for given in (False, True):
        model = answering_gpt(1)
        losses = training_step(
            model,
            make_optimizers(model, config),
            tokens[:, :-1] if given else tokens,
            step=1,
            config=config,
            targets=tokens[:, 1:] if given else None,
        )
        trained.append((losses, [p.tolist() for p in model.parameters()]))
    assert trained[0] == trained[1]
