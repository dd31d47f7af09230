"""A run that is done stays as it is; one that was broken off carries on to the same numbers."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

import experiments.converge.run
from analysis.read.run_folder import read_run
from analysis.read.saved import NotData
from experiments.converge.settings import (
    ConvergeSettings,
    DeviceSettings,
    ModelSettings,
    PromptSettings,
    RecomputeSettings,
    TrackingSettings,
)
from experiments.runs import compute_once
from experiments.runs.compute_once import RunError
from experiments.settings import parse
from experiments.sweeps.report import report
from experiments.sweeps.study import survey
from tests.forked import Forked

Converge = Callable[..., tuple[int, str, str]]
Runs = Callable[[], list[Path]]
Start = Callable[..., Forked]

TABLES = ("trajectory.parquet", "iterations.parquet")
DEADLINE = 120.0  # seconds; nothing here should take a tenth of it


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_numbers(one: Path, other: Path) -> None:
    """Two run folders hold the same tables, bit for bit, and the same summary but for times."""
    for name in TABLES:
        assert pq.read_table(one / name).equals(pq.read_table(other / name)), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        del summary["study"], summary["overall"]["seconds"]
        for prompt in summary["prompts"]:
            del prompt["seconds"]
    assert summaries[0] == summaries[1]


def wait_for(condition: Callable[[], object], process: Forked) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + DEADLINE
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "it neither got there nor ended"
        time.sleep(0.002)


def kill_group(process: Forked) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# --- finished runs ------------------------------------------------------------------------------


def test_a_finished_run_is_not_touched_again(converge: Converge, runs: Runs) -> None:
    converge()
    (folder,) = runs()
    before = snapshot(folder)
    code, out, err = converge()
    assert (code, err) == (0, "")
    assert "nothing to compute" in out
    assert snapshot(folder) == before
    assert runs() == [folder]


def test_a_larger_grid_computes_only_what_is_new(
    in_process: Converge, settings: list[str], runs: Runs
) -> None:
    in_process("converge", "-m", *settings, "feedback.strength=0,1")
    before = {folder: snapshot(folder) for folder in runs()}
    code, out, _ = in_process("converge", "-m", *settings, "feedback.strength=-1,0,1,2")
    assert code == 0
    assert "4 runs, 2 finished already" in out
    assert len(runs()) == 4
    for folder, content in before.items():
        assert snapshot(folder) == content


def test_another_study_or_place_computes_anew_with_the_same_numbers(
    converge: Converge, runs: Runs, tmp_path: Path
) -> None:
    converge()
    converge("study=other", f"runs_dir={tmp_path / 'elsewhere'}")
    (other,) = (tmp_path / "elsewhere" / "other").iterdir()
    assert_same_numbers(runs()[0], other)


# --- failed and half-written ones ---------------------------------------------------------------


def test_a_failed_run_is_computed_again(
    converge: Converge, runs: Runs, status: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    converge(f"runs_dir={tmp_path / 'undisturbed'}")
    converge()
    (folder,) = runs()
    shutil.rmtree(folder)
    (folder / "summary.json").mkdir(parents=True)  # in the way of the last file
    assert converge()[0] == 1
    assert status(folder)["state"] == "failed"
    assert status(folder)["error"]
    (folder / "summary.json").rmdir()
    assert converge()[0] == 0
    assert status(folder)["state"] == "finished"
    assert status(folder)["error"] is None
    assert_same_numbers(folder, tmp_path / "undisturbed" / "s" / folder.name)
    assert not list(folder.glob(".*"))


@pytest.fixture(scope="module")
def broken_off(
    checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run that failed with all its prompts computed, and the same one undisturbed."""
    settings = ConvergeSettings(
        model=ModelSettings(path=str(checkpoint_folder)),
        recompute=RecomputeSettings(iterations=12),
        prompts=PromptSettings(limit=2, max_tokens=12),
        device=DeviceSettings(name="cpu", batch=1),  # of several parts
        tracking=TrackingSettings(mode="disabled"),
        runs_dir=str(tmp_path_factory.mktemp("undisturbed")),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compute_once, "changes", lambda: None)  # whoever's tree this is
        undisturbed = experiments.converge.run.converge(settings)
        elsewhere = str(tmp_path_factory.mktemp("broken_off"))
        settings = settings.model_copy(update={"runs_dir": elsewhere})
        folder = Path(settings.runs_dir) / settings.study / undisturbed.name
        (folder / "summary.json").mkdir(parents=True)  # in the way of the last file
        with pytest.raises(RunError):
            experiments.converge.run.converge(settings)
    (folder / "summary.json").rmdir()
    return folder, undisturbed


@pytest.fixture
def failed(broken_off: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it where the command line will look for it."""
    folder, undisturbed = broken_off
    copy = tmp_path / "runs" / "s" / folder.name
    shutil.copytree(folder, copy)
    return copy, undisturbed


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def swap(one: Path, other: Path) -> None:
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(before)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def in_its_place(path: Path) -> Path:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path


def test_finished_prompts_are_kept_not_computed_again(
    converge: Converge, failed: tuple[Path, Path]
) -> None:
    folder, undisturbed = failed
    assert converge("device.batch=1")[0] == 0
    assert len(json.loads((folder / "status.json").read_text())["kept"]) == 2
    assert_same_numbers(folder, undisturbed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: (parts / "00000.json").write_text('{"prompt_id": "pro'),
        lambda parts: (parts / "00000.json").write_bytes(b""),
        lambda parts: (parts / "00000.trajectory.parquet").write_bytes(b"PAR1 torn"),
        lambda parts: (parts / "00001.iterations.parquet").write_bytes(b""),
        lambda parts: (parts / "00001.trajectory.parquet").unlink(),
        lambda parts: (parts / "00000.json").write_text('{"prompt_id": "another"}'),
        lambda parts: shutil.rmtree(parts),
        lambda parts: (parts.parent / "status.json").write_text('{"state": "fini'),
        lambda parts: (parts.parent / "status.json").write_bytes(b"\x00\xff"),
        lambda parts: (parts.parent / "status.json").unlink(),
        lambda parts: (parts.parent / "trajectory.parquet").write_bytes(b"garbage"),
        lambda parts: (parts.parent / "config.yaml").write_bytes(b"\x00"),
        lambda parts: (parts.parent / ".trajectory.parquet.k3j4").write_bytes(b"garbage"),
        lambda parts: (parts / ".00000.json.k3j4").write_bytes(b"garbage"),
        lambda parts: (parts / "00000.json").write_text("[" * 100_000),
        lambda parts: edit(parts / "00000.json", lambda part: part.update(prompts=[7])),
        lambda parts: edit(parts / "00000.json", lambda part: part["prompts"][0].update(nll=0.0)),
        lambda parts: edit(parts / "00001.json", lambda part: part.update(checksum="0")),
        lambda parts: edit(parts / "00001.json", lambda part: part.pop("checksum")),
        lambda parts: swap(parts / "00000.trajectory.parquet", parts / "00001.trajectory.parquet"),
        lambda parts: rewrite(parts / "00000.trajectory.parquet", lambda t: t.slice(1)),
        lambda parts: rewrite(
            parts / "00001.iterations.parquet", lambda t: t.drop_columns(["nll"])
        ),
        lambda parts: swap(parts / "00000.iterations.parquet", parts / "00000.trajectory.parquet"),
        lambda parts: in_its_place(parts / "00000.json").mkdir(),
        lambda parts: in_its_place(parts / "00001.trajectory.parquet").mkdir(),
        lambda parts: os.mkfifo(in_its_place(parts / "00000.json")),
        lambda parts: os.mkfifo(in_its_place(parts / "00000.iterations.parquet")),
        lambda parts: in_its_place(parts).write_bytes(b"no folder"),
        lambda parts: in_its_place(parts).symlink_to(parts.parent.parent),
    ],
    ids=range(29),
)
def test_a_half_written_folder_is_recovered(
    compute: Callable[..., Path], failed: tuple[Path, Path], damage: Callable[[Path], object]
) -> None:
    folder, undisturbed = failed
    state = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**state, "state": "running"}))
    damage(folder / ".prompts")
    assert compute("device.batch=1") == folder
    assert_same_numbers(folder, undisturbed)
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def forget(path: Path) -> Path:
    """Take a file's checksum out of the status."""
    status = path.parent / "status.json"
    known = json.loads(status.read_text())
    del known["checksums"][path.name]
    status.write_text(json.dumps(known))
    return path


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("summary.json", Path.unlink),
        ("summary.json", lambda path: path.write_text('{"prompts": [')),
        ("summary.json", lambda path: path.write_text('{"prompts": 7}')),
        ("summary.json", lambda path: path.write_text("[" * 100_000)),
        ("config.yaml", Path.unlink),
        ("config.yaml", lambda path: path.write_bytes(b"\x00")),
        ("config.yaml", lambda path: path.write_text("- 1")),
        ("trajectory.parquet", Path.unlink),
        ("trajectory.parquet", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("trajectory.parquet", lambda path: rewrite(path, lambda t: t.drop_columns(["log_prob"]))),
        ("iterations.parquet", lambda path: path.write_bytes(b"")),
        ("iterations.parquet", lambda path: rewrite(path, lambda t: t.drop_columns(["step"]))),
        ("iterations.parquet", lambda path: os.mkfifo(in_its_place(path))),
        ("trajectory.parquet", lambda path: flip(path, 4 + 20)),
        ("trajectory.parquet", lambda path: flip(path, path.stat().st_size // 2)),
        ("iterations.parquet", lambda path: flip(path, 4 + 20)),
        ("trajectory.parquet", lambda path: rewrite(path, lambda t: t.slice(1))),
        ("iterations.parquet", lambda path: rewrite(path, lambda t: t)),
        ("summary.json", lambda path: path.write_text(path.read_text().replace("nll", "NLL", 1))),
        ("config.yaml", lambda path: path.write_text(path.read_text() + "seed_: 1")),
        ("trajectory.parquet", lambda path: forget(path).unlink()),
    ],
    ids=range(21),
)
def test_a_damaged_run_is_said_to_be_and_computed_again(
    compute: Callable[..., Path],
    broken_off: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], object],
) -> None:
    undisturbed = broken_off[1]
    folder = tmp_path / "runs" / "s" / undisturbed.name
    shutil.copytree(undisturbed, folder)
    assert survey(folder.parent).complete
    damage(folder / name)
    with pytest.raises(NotData):
        read_run(folder)
    study = survey(folder.parent)
    assert not study.complete
    assert re.search(rf"damaged: .*{name}", report(study))
    assert compute("device.batch=1") == folder
    assert f"is damaged ({study.runs[0].error}) and is computed again" in capfd.readouterr().err
    assert_same_numbers(folder, undisturbed)
    assert survey(folder.parent).complete


# --- processes that are killed, or that meet ----------------------------------------------------

SWEEP = ("feedback.strength=-1,0,1", "prompts.limit=3", "recompute.iterations=20")
SWEEP += ("device.batch=2", "recompute.tolerance=0")  # two batches that take their time


def sweep_until_done(
    words: list[str], start: Start, study: Path, chance: random.Random, *, kills: int
) -> int:
    """Start the command again and again, killing it as it makes progress; how often it took."""

    def progress() -> int:
        return sum(len(names) for _, _, names in os.walk(study))  # at ease with vanishing ones

    attempts = 0
    while True:
        attempts += 1
        process = start(words)
        if attempts > kills:
            out, err = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, out + err
            return attempts
        before, wanted = progress(), chance.randint(1, 25)
        wait_for(lambda b=before, w=wanted: abs(progress() - b) >= w, process)
        kill_group(process)


def compare_studies(study: Path, undisturbed: Path, *, count: int) -> None:
    found, expected = (
        sorted(path.parent.name for path in folder.glob("*/status.json"))
        for folder in (study, undisturbed)
    )
    assert len(found) == count
    assert found == expected
    for name in found:
        assert_same_numbers(study / name, undisturbed / name)
        assert not list((study / name).glob(".prompts/*"))
        assert not list((study / name).glob(".*.*.*")), "no half-written file is left"


def test_a_sweep_killed_at_random_moments_ends_with_the_same_numbers(
    command: Callable[..., list[str]], start: Start, in_process: Converge, tmp_path: Path
) -> None:
    words = command(*SWEEP)
    words.insert(3, "-m")
    seed = random.randrange(10_000)
    print(f"seed of the kills: {seed}")
    attempts = sweep_until_done(words, start, tmp_path / "runs" / "s", random.Random(seed), kills=2)
    assert attempts == 3
    code, _, _ = in_process("converge", *words[3:], f"runs_dir={tmp_path / 'undisturbed'}")
    assert code == 0
    compare_studies(tmp_path / "runs" / "s", tmp_path / "undisturbed" / "s", count=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_sweep_killed_many_times_ends_with_the_same_numbers(
    command: Callable[..., list[str]], start: Start, in_process: Converge, tmp_path: Path,
    seed: int, mode: str,
) -> None:  # fmt: skip
    words = command(*SWEEP, f"tracking.mode={mode}", "generation.max_new_tokens=2")
    words.insert(3, "-m")
    sweep_until_done(words, start, tmp_path / "runs" / "s", random.Random(seed), kills=6)
    in_process(
        "converge", *words[3:], f"runs_dir={tmp_path / 'undisturbed'}", "tracking.mode=disabled"
    )
    compare_studies(tmp_path / "runs" / "s", tmp_path / "undisturbed" / "s", count=3)


def test_two_processes_at_the_same_run_compute_it_once(
    command: Callable[..., list[str]], start: Start, runs: Runs,
    status: Callable[[Path], dict[str, Any]],
) -> None:  # fmt: skip
    words = command("prompts.limit=12", "prompts.max_tokens=32", "recompute.iterations=60")
    words += ["device.batch=1", "recompute.tolerance=0"]
    processes = [start(words) for _ in range(2)]
    outputs = [process.communicate(timeout=DEADLINE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [err for _, err in outputs] == ["", ""]
    (folder,) = runs()
    assert sum("nothing to compute" in out for out, _ in outputs) == 1
    (computed,) = [
        p for p, (out, _) in zip(processes, outputs, strict=True) if "nothing" not in out
    ]
    assert status(folder)["process"] == computed.pid
    assert not list(folder.glob(".*"))


def test_who_comes_second_waits_for_the_first(
    failed: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, undisturbed = failed
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    place = {"runs_dir": str(folder.parent.parent), "study": folder.parent.name}
    settings = parse({**saved, **place}, ConvergeSettings)
    with ThreadPoolExecutor() as pool, (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # let go when the file is closed, whatever happens
        waiting = pool.submit(experiments.converge.run.converge, settings)
        said, deadline = "", time.monotonic() + DEADLINE
        while "being computed elsewhere: waiting" not in said and time.monotonic() < deadline:
            assert not waiting.done()
            said += capfd.readouterr().out
            time.sleep(0.01)
        assert "being computed elsewhere: waiting" in said
        assert not (folder / "summary.json").exists()
        fcntl.flock(stream, fcntl.LOCK_UN)
        assert waiting.result(timeout=DEADLINE) == folder
    assert_same_numbers(folder, undisturbed)


@pytest.mark.parametrize("words", [[], ["hydra/launcher=joblib", "-m"]])
def test_what_a_kill_behind_the_end_has_left_goes_with_the_next_command(
    converge: Converge, runs: Runs, words: list[str]
) -> None:
    assert converge(*words)[0] == 0
    (folder,) = runs()
    before = snapshot(folder)
    lock = folder / ".lock"
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert converge(*words)[0] == 0
        assert lock.exists(), "somebody holds it"
    assert converge(*words)[0] == 0
    assert not lock.exists()
    assert snapshot(folder) == before
