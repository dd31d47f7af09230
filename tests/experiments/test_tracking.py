"""W&B with its real client: what an offline run holds, and that a broken tracker costs nothing."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from experiments.runs.folder import RunFolder, damage
from experiments.tracking.tracker import stop_helper
from tests.forked import Forked

Converge = Callable[..., tuple[int, str, str]]
Runs = Callable[[], list[Path]]
Start = Callable[..., Forked]

MEASURES = {  # how the prompts' values become one
    "step_max": "max",
    "step_rms": "mean",
    "settled_prefix": "mean",
    "oracle_error_max": "max",
    "nll": "mean",
    "kl_step": "mean",
    "kl_effect": "mean",
    "hidden_step_norm": "mean",
}
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
DEADLINE = 120.0


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, which is a LevelDB log of protobuf messages.

    After a file header of 7 bytes, blocks of 32 KiB hold chunks: crc32 (4 bytes), length (2), type
    (1), content. What is left of a block too small for a chunk's header is padding.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = 7, []
    while at < len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        chunk = content[at + 7 : at + 7 + length]
        assert len(chunk) == length
        assert zlib.crc32(content[at + 6 : at + 7] + chunk) == int.from_bytes(
            content[at : at + 4], "little"
        )
        assert (kind in (FULL, FIRST)) == (not parts)
        parts.append(chunk)  # the first may be empty: 7 bytes were left in its block
        at += 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []
    assert not parts


def values(items: Any) -> dict[str, Any]:
    """Keys and JSON values of a history row, a summary or a configuration."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


pytestmark = pytest.mark.usefixtures("quiet_wandb")


# --- what an offline run holds ------------------------------------------------------------------


def test_an_offline_run_holds_configuration_history_summary_page_and_artifact(
    converge: Converge, runs: Runs
) -> None:
    code, _, err = converge(
        *("tracking.mode=offline", "prompts.limit=3", "generation.max_new_tokens=1", "seed=4"),
        "recompute.tolerance=0",
    )
    assert (code, err) == (0, "")
    (folder,) = runs()
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "status.json", "trajectory.parquet", "iterations.parquet"),
        *("summary.json", "wandb"),
    }
    stop_helper()  # it still writes when an offline run has ended
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = list(records(path))

    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert run.run_id == folder.name
    assert run.project == "stateful_gpt"
    assert run.run_group == "s"
    assert run.display_name == "log_prob β=0.5 n=12 +1 tokens"
    assert set(run.tags) == {"checkpoint", "log_prob"}
    config = values(run.config.update)
    del config["_wandb"]
    assert config == yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))

    history = [values(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
    live = [row for row in history if "settled_share" in row]
    assert [(row["step"], row["iteration"]) for row in live] == [
        (step, iteration) for step in (0, 1) for iteration in range(1, 13)
    ]
    (step,) = [row for row in history if "generation_step" in row]
    assert step["generation/nll"] == live[-1]["nll"]
    rows = [row for row in history if "iteration" in row and row not in live]
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    frame = pq.read_table(folder / "iterations.parquet").to_pandas()
    frame = frame[frame["step"] == 1]  # of the whole text
    for row, (_, group) in zip(rows, frame.groupby("iteration"), strict=True):
        for measure, how in MEASURES.items():
            if group[measure].isna().all():
                assert measure not in row, "missing, never a sentinel"
            else:
                assert row[measure] == pytest.approx(getattr(group[measure], how)(), rel=1e-12)
        for measure in ("step_max", "oracle_error_max"):
            if row.get(measure):
                assert 10 ** row[f"{measure}_log10"] == pytest.approx(row[measure], rel=1e-9)
            else:
                assert f"{measure}_log10" not in row
    assert not any(key.startswith("prompt") for row in rows for key in row), "no metric a token"

    summary: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= values(record.summary.update)
    overall = json.loads((folder / "summary.json").read_text())["overall"]
    for key, value in overall.items():
        assert summary[key] == value

    (pages,) = [row for row in history if "page._type" in row or "page" in row]
    shown = pages.get("page") or {key.removeprefix("page."): value for key, value in pages.items()}
    assert shown["_type"] == "html-file"
    page = path.parent / "files" / shown["path"]
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert hashlib.sha256(page.read_bytes()).hexdigest() == shown["sha256"]

    artifacts = {
        r.artifact.name: r.artifact for r in found if r.WhichOneof("record_type") == "artifact"
    }
    table = artifacts.pop(f"run-{folder.name}-token_trajectories_table")  # W&B's, of the curves
    (curves,) = table.manifest.contents
    assert Path(curves.local_path).is_relative_to(folder.resolve())
    (artifact,) = artifacts.values()
    assert artifact.name == f"run-{folder.name}"
    logged = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(logged) == {"trajectory.parquet", "iterations.parquet", "summary.json"}
    for name, entry in logged.items():
        assert entry.size == (folder / name).stat().st_size
        staged = Path(entry.local_path)
        assert staged.is_relative_to(folder.resolve()), "nothing of a run lies outside its folder"
        assert staged.read_bytes() == (folder / name).read_bytes()

    (end,) = [r.exit for r in found if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


def test_a_wandb_run_copied_from_its_place_holds_all_files_of_the_run(
    converge: Converge, runs: Runs, tmp_path: Path, status: Callable[[Path], dict[str, Any]]
) -> None:
    code, _, err = converge("tracking.mode=offline", "prompts.limit=1")
    assert (code, err) == (0, "")
    (folder,) = runs()
    stop_helper()  # it still writes when an offline run has ended
    (wandb_run,) = folder.glob("wandb/offline-run-*")
    shutil.copytree(wandb_run, tmp_path / "copied", symlinks=True)
    shutil.move(folder, tmp_path / "moved")
    copied = tmp_path / "copied" / "files" / "run_folder"
    names = {"config.yaml", "summary.json", "iterations.parquet", "trajectory.parquet"}
    assert {path.name for path in copied.iterdir()} == names | {"status.json"}
    for name in names:
        assert (copied / name).read_bytes() == (tmp_path / "moved" / name).read_bytes()
    said, kept = status(copied), status(tmp_path / "moved")
    assert said["state"] == "finished"
    del said["finished"], kept["finished"]
    assert said == kept

    (path,) = (tmp_path / "copied").glob("*.wandb")
    sent = [entry.path for r in records(path) for entry in r.files.files]
    for name in names | {"status.json"}:
        assert f"run_folder/{name}" in sent, "uploaded with the run"


def test_every_run_of_a_sweep_is_a_run_of_its_own_with_its_own_configuration(
    in_process: Converge, settings: list[str], runs: Runs
) -> None:
    words = ["tracking.mode=offline", "feedback.strength=0,1", "prompts.limit=1"]
    words += ["recompute.tolerance=0"]
    code, _, err = in_process("converge", "-m", *settings, *words)
    assert (code, err) == (0, "")
    stop_helper()  # it still writes when an offline run has ended
    strengths = {}
    for folder in runs():
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        found = list(records(path))
        (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        strengths[run.run_id] = values(run.config.update)["feedback"]["strength"]
        rows = [r for r in found if r.WhichOneof("record_type") == "history"]
        assert len(rows) == 12 + 1, "its own rows, and the page"
    assert sorted(strengths) == [folder.name for folder in runs()]
    assert sorted(strengths.values()) == [0, 1]


def test_disabled_writes_nothing_of_wandb(compute: Callable[..., Path]) -> None:
    assert not (compute("tracking.mode=disabled") / "wandb").exists()


# --- when it breaks -----------------------------------------------------------------------------


def assert_finished_with_one_warning(folder: Path, err: str) -> None:
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert pq.read_metadata(folder / "trajectory.parquet").num_rows > 0
    assert re.fullmatch(r"warning: W&B .+\n", err), err


def test_a_folder_that_the_tracker_cannot_write_is_one_warning(
    converge: Converge, runs: Runs
) -> None:
    converge()  # for the name of the folder
    (folder,) = runs()
    for path in folder.iterdir():
        path.unlink()
    (folder / "wandb").write_text("in the way")
    code, _, err = converge("tracking.mode=offline")
    assert code == 0
    assert_finished_with_one_warning(folder, err)
    assert (folder / "wandb").read_text() == "in the way"


def test_a_mistake_in_the_page_is_told_as_ours(
    compute: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("analysis.page.build.page_of_run", lambda folder: 1 / 0)
    folder = compute("tracking.mode=offline")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("W&B was not told all of it (ZeroDivisionError: division by zero)\n")


def test_a_tracker_that_fills_the_disk_of_a_study_keeps_no_run_from_being_finished(
    compute: Callable[..., Path],
    small_disk: Callable[[int], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = small_disk(100)  # a page takes about that
    folder = compute("tracking.mode=offline", f"runs_dir={place}")
    assert_finished_with_one_warning(folder, capfd.readouterr().err)
    assert damage(folder) is None


def test_a_full_disk_under_the_tracker_is_one_warning(
    compute: Callable[..., Path],
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    begin, full_disk = RunFolder.begin, small_disk(16)

    def begin_with_a_full_disk(self: RunFolder, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        (self.path / "wandb").symlink_to(full_disk)

    monkeypatch.setattr(RunFolder, "begin", begin_with_a_full_disk)
    folder = compute("tracking.mode=offline")
    assert_finished_with_one_warning(folder, capfd.readouterr().err)


def test_a_study_folder_that_takes_no_view_for_the_terminal_is_no_trouble(
    compute: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "s").mkdir(parents=True)
    (tmp_path / "runs" / "s" / "wandb").write_text("in the way")
    folder = compute("tracking.mode=offline")
    assert capfd.readouterr().err == ""
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_the_view_for_the_terminal_shows_each_run_once_by_a_name_that_people_read(
    compute: Callable[..., Path],
) -> None:
    folder = compute("tracking.mode=offline")
    compute("tracking.mode=offline", "feedback.strength=1")
    (folder / "status.json").unlink()
    compute("tracking.mode=offline")  # computed again: W&B's folder has another name now
    view = folder.parent / "wandb"
    names = sorted(re.sub(r"run-\d{8}_\d{6}-", "", path.name) for path in view.iterdir())
    assert [name.rpartition("_")[0] for name in names] == [
        "log_prob_beta=0.5_n=12",
        "log_prob_beta=1_n=12",
    ]
    (shown,) = view.glob(f"run-*-log_prob_beta=0.5_n=12_{folder.name}")
    (stored,) = folder.glob("wandb/offline-run-*/*.wandb")
    (link,) = shown.glob(f"run-log_prob_beta=0.5_n=12_{folder.name}.wandb")
    assert link.samefile(stored)
    assert not link.readlink().is_absolute(), "the study can be moved"
    assert (shown / "files" / "run_folder" / "config.yaml").exists()


def children_of(parent: int, name: str) -> list[int]:
    """Living children of a process whose command line contains a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
            # the fields after the name in brackets: state, parent
            its_parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # it has just ended
        if name.encode() in line and its_parent == parent:
            found.append(int(path.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_a_tracker_killed_in_the_middle_is_one_warning_and_the_next_run_has_another(
    command: Callable[..., list[str]], start: Start, runs: Runs
) -> None:
    words = command("tracking.mode=offline", "prompts.limit=12", "feedback.strength=0.5,0")
    words += ["recompute.tolerance=0", "device.batch=1"]
    process = start([*words[:3], "-m", *words[3:], "recompute.iterations=50"])
    deadline = time.monotonic() + DEADLINE

    def begun() -> list[Path]:  # the tracker comes before the first prompt
        return [folder for folder in runs() if list(folder.glob(".prompts/*.json"))]

    while not (first := begun()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    helpers = children_of(process.pid, "wandb-core")
    assert helpers, "the real helper process was running"
    for helper in helpers:
        os.kill(helper, signal.SIGKILL)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert_finished_with_one_warning(first[0], err)
    (second,) = set(runs()) - set(first)
    (path,) = second.glob("wandb/offline-run-*/*.wandb")
    history = [r for r in records(path) if r.WhichOneof("record_type") == "history"]
    assert len(history) == 12 * 50 + 50 + 1, "as they came, of the whole run, and the page"
