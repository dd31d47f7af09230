"""Sweeps on every launcher: killed as often as you like, they end as if nothing had happened."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiments.settings import ConfigError
from experiments.sweeps import launchers
from tests.forked import Forked, Forker

Command = Callable[..., list[str]]
Start = Callable[..., Forked]
Sweep = Callable[..., Forked]

ROOT = Path(__file__).parents[2]
DEADLINE = 1800.0  # seconds; on an idle machine nothing here takes a tenth of it
# what float32 sums of a few dozen terms of size 10 can differ by when threads divide them anew
ACROSS_LAUNCHERS = 1e-4

needs = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"the extra {extra} is not installed"
    )
    for name, extra, package in (
        ("joblib", "joblib", "joblib"),
        ("submitit_local", "submitit", "submitit"),
        ("ray", "ray", "ray"),
    )
}
FORKED = "hydra.sweeper.processes=2"  # of the basic launcher


@pytest.fixture
def grid(tmp_path: Path) -> Callable[[int], list[str]]:
    """Prompt files for a sweep of so many cells, two of which can only fail.

    One file is not there, the other holds an id that the model does not know.
    """

    def make(count: int) -> list[str]:
        chance = random.Random(count)
        files = []
        for number in range(count - 2):
            path = tmp_path / f"text_{number}.jsonl"
            lines = [
                {"id": f"p{i}", "tokens": [chance.randrange(256) for _ in range(16)]}
                for i in range(4)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            files.append(path)
        outside = tmp_path / "outside.jsonl"
        outside.write_text(json.dumps({"id": "a", "tokens": [999]}) + "\n")
        files[1:1] = [tmp_path / "nowhere.jsonl", outside]
        return [f"prompts.file={','.join(map(str, files))}", "prompts.limit=4"]

    return make


@pytest.fixture
def sweep(command: Command, start: Start, tmp_path: Path) -> Sweep:
    """Start a sweep on a launcher into a study, as a process that leads a group of its own."""

    def run(launcher: str, study: str, *words: str, threads: int = 1, **environment: str) -> Forked:
        call = command(f"hydra/launcher={launcher}", f"study={study}", *words)
        call.insert(3, "-m")
        return start(call, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(threads), **environment)

    return run


def finished(study: Path) -> dict[str, bytes]:
    """The status of every finished run: who computed it, and when."""
    found = {}
    for path in study.glob("[!.]*/status.json"):
        content = path.read_bytes()
        if json.loads(content)["state"] == "finished":
            found[path.parent.name] = content
    return found


def ended(process: Forked) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


def kill_in_the_midst(process: Forked, study: Path, chance: random.Random) -> None:
    """Kill a sweep once it has made some more progress, while it is still at work."""

    def progress() -> int:
        return sum(len(names) for _, _, names in os.walk(study))  # at ease with vanishing ones

    before, wanted = progress(), chance.randint(1, 12)  # of about 20 files of four cells
    deadline = time.monotonic() + DEADLINE
    while abs(progress() - before) < wanted and process.poll() is None:
        assert time.monotonic() < deadline, "it neither got there nor ended"
        time.sleep(0.002)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
    assert alive, f"it ended before it was killed: {out}{err}"


def assert_ended_well(
    launcher: str, code: int, out: str, err: str, *, good: int, status: "Status", study: Path
) -> None:
    assert code == 1, out + err
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, err
    assert "nowhere.jsonl" in errors[0] + errors[1]
    assert "999" in errors[0] + errors[1]
    count = f"{good + 2} runs: {good} finished, 2 failed"
    assert count in out
    shown = status(study)
    assert shown[0] == 1
    assert count in shown[1]
    assert f"hydra/launcher={launcher}" in shown[1], "the command that completes it"


Status = Callable[[Path], tuple[int, str]]


@pytest.fixture
def ask() -> Status:
    """``python -m experiments.status``"""

    def call(study: Path) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.status", str(study)],
            cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return call


def kill_and_carry_on(
    sweep: Sweep, ask: Status, launcher: str, words: list[str], runs: Path, *, good: int, kills: int
) -> None:
    """The promise of this file, on one launcher."""
    seed = random.randrange(10_000)
    print(f"seed of the kills: {seed}")
    chance = random.Random(seed)
    done: dict[str, bytes] = {}
    for _ in range(kills):
        kill_in_the_midst(sweep(launcher, "killed", *words), runs / "killed", chance)
        now = finished(runs / "killed")
        assert now.items() >= done.items(), "a finished run is never begun again"
        done = now
    code, out, err = ended(sweep(launcher, "killed", *words))
    final = finished(runs / "killed")
    assert len(final) == good
    assert final.items() >= done.items()
    assert_ended_well(launcher, code, out, err, good=good, status=ask, study=runs / "killed")

    if kills > 1:
        ended(sweep(launcher, "killed", *words))
        assert finished(runs / "killed") == final, "only the two failed ones were left to do"

    code, out, err = ended(sweep(launcher, "undisturbed", *words))
    assert_ended_well(launcher, code, out, err, good=good, status=ask, study=runs / "undisturbed")
    assert finished(runs / "undisturbed").keys() == final.keys()
    for run_id in final:
        folder = runs / "killed" / run_id
        for name in ("trajectory.parquet", "iterations.parquet"):
            killed, undisturbed = (pq.read_table(runs / study / run_id / name)
                                   for study in ("killed", "undisturbed"))  # fmt: skip
            assert killed.equals(undisturbed), "bit for bit"
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@needs["joblib"]
def test_a_parallel_sweep_that_is_killed_ends_as_if_undisturbed(
    sweep: Sweep, ask: Status, grid: Callable[[int], list[str]], tmp_path: Path
) -> None:
    kill_and_carry_on(sweep, ask, "joblib", grid(4), tmp_path / "runs", good=2, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "word"),
    [
        ("basic", "hydra.sweeper.processes=1"),
        ("basic", FORKED),
        *(pytest.param(name, "seed=0", marks=mark) for name, mark in needs.items()),
    ],
)
def test_24_runs_killed_three_times_end_as_if_undisturbed(
    *,
    sweep: Sweep,
    ask: Status,
    grid: Callable[[int], list[str]],
    tmp_path: Path,
    launcher: str,
    word: str,
) -> None:
    words = [*grid(24), word]
    kill_and_carry_on(sweep, ask, launcher, words, tmp_path / "runs", good=22, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "word"),
    [
        ("basic", FORKED),
        *(pytest.param(name, "seed=0", marks=mark) for name, mark in needs.items()),
    ],
)
def test_every_launcher_computes_the_same_up_to_rounding(
    sweep: Sweep, grid: Callable[[int], list[str]], tmp_path: Path, launcher: str, word: str
) -> None:
    words = grid(4)
    ended(sweep("basic", "basic", *words, "device.dtype=float32", threads=2))
    ended(sweep(launcher, "other", *words, word, "device.dtype=float32"))
    runs = tmp_path / "runs"
    assert len(finished(runs / "basic")) == 2
    for run_id in finished(runs / "basic"):
        threads = [
            json.loads((runs / study / run_id / "status.json").read_text())["threads"]
            for study in ("basic", "other")
        ]
        assert threads == [2, 1]
        one, other = (
            pq.read_table(runs / study / run_id / "trajectory.parquet").to_pandas()
            for study in ("basic", "other")
        )
        assert (one["log_prob"] - other["log_prob"]).abs().max() <= ACROSS_LAUNCHERS


two_at_a_time = pytest.mark.parametrize(
    ("launcher", "two"),
    [
        ("basic", FORKED),
        pytest.param(
            "joblib", "hydra.launcher.n_jobs=2", marks=[needs["joblib"], pytest.mark.slow]
        ),
    ],
)


@two_at_a_time
def test_workers_say_nothing_but_one_line_a_run_and_know_the_command(
    sweep: Sweep, tmp_path: Path, launcher: str, two: str
) -> None:
    process = sweep(launcher, "s", "feedback.strength=0,1", two)
    code, out, err = ended(process)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"2 runs, launcher {launcher}, runs at a time: 2, threads of each: 1"
    assert re.fullmatch(r"run 1 of 2: [0-9a-f]{10}  log_prob β=\d n=12: .*", lines[1])
    assert re.fullmatch(r"run 2 of 2: [0-9a-f]{10}  log_prob β=\d n=12: .*", lines[2])
    assert lines[3] == ""
    for path in (tmp_path / "runs" / "s").glob("[!.]*/status.json"):
        status: dict[str, Any] = json.loads(path.read_text())
        assert status["command"].startswith("python -m experiments.converge -m model=checkpoint")
        assert status["threads"] == 1
        assert status["process"] != process.pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "two_at_a_time"),
    [
        pytest.param("joblib", "hydra.launcher.n_jobs=2", marks=needs["joblib"]),
        pytest.param(
            "submitit_local", "hydra.sweeper.max_batch_size=2", marks=needs["submitit_local"]
        ),
    ],
)
def test_each_worker_sees_a_gpu_of_its_own(
    sweep: Sweep, tmp_path: Path, launcher: str, two_at_a_time: str
) -> None:
    words = ("feedback.strength=0,1,2,3", two_at_a_time, "device=auto")
    code, _, err = ended(sweep(launcher, "s", *words, CUDA_VISIBLE_DEVICES="3,7"))
    assert (code, err) == (0, "")
    statuses = [json.loads(path.read_text()) for path in tmp_path.glob("runs/s/*/status.json")]
    assert {status["visible_gpus"] for status in statuses} == {"3", "7"}


def test_workers_divide_gpus_and_one_that_ends_lets_go(tmp_path: Path) -> None:
    program = (
        "import sys; from experiments.sweeps.launchers import take_gpu, os\n"
        f"for _ in range(2): take_gpu(['a', 'b'], {str(tmp_path)!r})\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
    )

    def worker() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def seen(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    workers = [worker() for _ in range(3)]
    first = [seen(process) for process in workers]
    assert sorted(first) == ["a", "a", "b"], "shared when there are more workers"
    gone = first.index("b")
    workers[gone].kill()
    workers[gone].communicate()
    workers[gone] = worker()
    assert seen(workers[gone]) == "b"
    for process in workers:
        process.communicate(timeout=DEADLINE)


def test_gpus_that_the_user_has_divided_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    options = OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / "submitit_local.yaml")
    assert launchers.gpus("submitit_local", options, devices={"auto"}) == ["3", "7"]
    options.gpus_per_node = 2
    assert launchers.gpus("submitit_local", options, devices={"auto"}) == []


def test_ray_and_slurm_are_asked_for_a_gpu_where_a_run_is_to_use_one() -> None:
    from omegaconf import OmegaConf

    for launcher, key in (("ray", "ray.remote.num_gpus"), ("submitit_slurm", "gpus_per_node")):
        for device, asked in (("cuda", 1), ("auto", 0), ("cpu", 0)):
            options = OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / f"{launcher}.yaml")
            assert launchers.gpus(launcher, options, devices={device}) == []
            assert OmegaConf.select(options, key) == asked


def begun(process: Forked, study: Path) -> int:
    """The process that computes the first run, once it is at work."""
    deadline = time.monotonic() + DEADLINE
    while not (statuses := list(study.glob("[!.]*/status.json"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    computing: int = json.loads(statuses[0].read_text())["process"]
    return computing


LONG = ("prompts.max_tokens=32", "recompute.iterations=300", "recompute.tolerance=0")


@two_at_a_time
def test_a_killed_worker_ends_in_one_sentence_the_report_and_a_code(
    sweep: Sweep, ask: Status, tmp_path: Path, launcher: str, two: str
) -> None:
    study = tmp_path / "runs" / "s"
    process = sweep(launcher, "s", "feedback.strength=1,2,3,4", two, *LONG)
    os.kill(begun(process, study), signal.SIGKILL)
    code, out, err = ended(process)
    assert code == 1
    assert "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the launcher broke off" in error
    assert "the same command carries on" in error
    assert "\n4 runs: " in out
    assert "Complete it:  python -m experiments.converge -m " in out
    code, shown = ask(study)
    assert code == 1
    others = "3 finished, 1 interrupted" if launcher == "basic" else r"\d interrupted, \d missing"
    assert re.search(rf"^4 runs: {others}$", shown, re.MULTILINE), shown


@pytest.mark.parametrize(
    ("launcher", "two", "interrupt", "number"),
    [  # the sweep alone, and as by Ctrl-C
        ("basic", FORKED, os.kill, signal.SIGINT),
        ("basic", FORKED, os.killpg, signal.SIGINT),
        ("basic", FORKED, os.kill, signal.SIGTERM),
        pytest.param(
            "joblib", "hydra.launcher.n_jobs=2", os.kill, signal.SIGTERM, marks=needs["joblib"]
        ),
        pytest.param(
            *("submitit_local", "hydra.sweeper.max_batch_size=2", os.kill, signal.SIGTERM),
            marks=needs["submitit_local"],
        ),
    ],
)
def test_an_interrupted_sweep_ends_its_workers_and_is_quiet(
    sweep: Sweep,
    tmp_path: Path,
    launcher: str,
    two: str,
    interrupt: Callable[[int, int], None],
    number: int,
) -> None:
    study = tmp_path / "runs" / "s"
    words = ("feedback.strength=1,2,3,4", two, *LONG)
    process = sweep(launcher, "s", *words, XDG_CACHE_HOME=str(tmp_path))
    computing = begun(process, study)
    interrupt(process.pid, number)
    code, out, err = ended(process)
    said = "error: interrupted; the same command carries on\n"
    if launcher == "submitit_local":
        said = f"the logs of its jobs are in {next(tmp_path.glob('stateful_gpt/*'))}\n{said}"
    # joblib's own helper complains behind it
    assert (code, err[: len(said)] if launcher == "joblib" else err) == (130, said)
    assert re.search(r"^4 runs: (\d finished, )?[12] interrupted", out, re.MULTILINE), out
    with pytest.raises(ProcessLookupError):
        os.kill(computing, 0)


@needs["submitit_local"]
def test_an_interrupted_sweep_says_that_what_slurm_computes_goes_on(
    in_process: Callable[..., tuple[int, str, str]],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("submitit.AutoExecutor", interrupted)
    words = ("hydra/launcher=submitit_slurm", "feedback.strength=0,1")
    code, _, err = in_process("converge", "-m", *settings, *words)
    assert code == 130
    assert err.endswith("carries on\nits jobs stay with Slurm; scancel ends them\n")


INTERRUPTED_BEFORE_IT_WAITS = """
import multiprocessing, os, pathlib, signal, sys
from experiments.sweeps.processes import forked

def job():
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    while True:
        signal.pause()

try:
    with forked([job] * 3, 2):
        while len(os.listdir(sys.argv[1])) < 2:
            pass
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(multiprocessing.active_children(), len(os.listdir(sys.argv[1])))
"""


def test_an_interrupt_before_the_sweep_waits_for_its_forks_ends_them(
    forker: Forker, tmp_path: Path
) -> None:
    done = forker.run(["-c", INTERRUPTED_BEFORE_IT_WAITS, str(tmp_path)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] 2\n", "")


ALL_ARE_TOLD_TO_END = """
import os, pathlib, signal, sys
from multiprocessing.context import ForkProcess
from experiments.sweeps.processes import forked

folder, terminate = pathlib.Path(sys.argv[1]), ForkProcess.terminate

def told(fork):
    terminate(fork)
    (folder / f"{fork.pid}.told").touch()

def job():
    place = folder / str(os.getpid())
    place.with_suffix(".begun").touch()
    try:
        signal.pause()
    finally:  # still ending its run, as W&B may take, when its sweep tells it
        place.with_suffix(".ending").touch()
        while not place.with_suffix(".told").exists():
            pass
        place.with_suffix(".ended").touch()

def count(suffix):
    return len([*folder.glob(f"*.{suffix}")])

ForkProcess.terminate = told
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    with forked([job] * 3, 2):
        while count("begun") < 2:
            pass
        try:
            os.killpg(0, signal.SIGTERM)
        finally:
            while count("ending") < 2:
                pass
except KeyboardInterrupt:
    print(count("told"), count("ended"))
"""


def test_forks_that_are_told_to_end_with_their_sweep_end_their_runs_undisturbed(
    forker: Forker, tmp_path: Path
) -> None:
    done = forker.run(["-c", ALL_ARE_TOLD_TO_END, str(tmp_path)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 2\n", "")


TOLD_IN_A_CALLBACK = """
import os, signal, sys, weakref
from experiments.sweeps.processes import forked
from experiments.sweeps.sweep import CellJob

class Lock:
    pass

def job():
    lock = Lock()
    callback = weakref.ref(lock, lambda _: signal.raise_signal(signal.SIGTERM))
    del lock
    signal.pause()

if sys.argv[1] == "fork":
    with forked([job], 1) as wait:
        wait()
else:
    os.environ["SUBMITIT_EXECUTOR"] = "local"
    try:
        CellJob(None, None, "", None, 0, 0, (), "")({})
    except ValueError:  # Hydra runs no job
        pass
    try:
        job()
    except KeyboardInterrupt:
        pass
print("ended")
"""


@pytest.mark.parametrize("worker", ["fork", "submitit_local"])
def test_an_interrupt_that_python_ignores_in_a_callback_is_not_lost(
    forker: Forker, worker: str
) -> None:
    done = forker.run(["-c", TOLD_IN_A_CALLBACK, worker])
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_forks_of_a_killed_sweep_end_with_the_run_at_hand(sweep: Sweep, tmp_path: Path) -> None:
    process = sweep("basic", "s", "feedback.strength=1,2,3,4", FORKED, *LONG)
    begun(process, tmp_path / "runs" / "s")
    os.kill(process.pid, signal.SIGKILL)
    ended(process)  # once nobody holds its streams any more
    assert 1 <= len(finished(tmp_path / "runs" / "s")) <= 2


@needs["joblib"]
def test_joblibs_workers_end_with_a_sweep_that_is_killed(sweep: Sweep, tmp_path: Path) -> None:
    process = sweep("joblib", "s", "feedback.strength=1,2,3,4", "hydra.launcher.n_jobs=2", *LONG)
    begun(process, tmp_path / "runs" / "s")
    os.kill(process.pid, signal.SIGKILL)
    ended(process)  # once nobody holds its streams any more


@needs["submitit_local"]
def test_where_submitit_has_no_place_for_its_files_a_setting_is_asked_for(
    in_process: Callable[..., tuple[int, str, str]],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    words = ("hydra/launcher=submitit_local", "feedback.strength=0,1")
    code, _, err = in_process("converge", "-m", *settings, *words)
    assert code == 2
    assert re.fullmatch(r"error: hydra\.launcher\.submitit_folder must be given, .*\n", err)


@needs["submitit_local"]
def test_what_submitits_workers_warn_of_is_said_when_their_logs_go(
    sweep: Sweep, compute: Callable[..., Path], tmp_path: Path
) -> None:
    folder = compute("feedback.strength=1")
    (folder / "summary.json").unlink()
    code, _, err = ended(
        sweep("submitit_local", "s", "feedback.strength=1", XDG_CACHE_HOME=str(tmp_path))
    )
    said = f"warning: {folder} is damaged (unreadable summary.json) and is computed again\n"
    assert (code, err) == (0, said)


# --- what is asked of launchers -----------------------------------------------------------------


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    for launcher, extra in launchers.EXTRAS.items():
        helps = rf"^hydra/launcher={launcher} .*\[{extra}\]' -c constraints.txt$"
        with pytest.raises(ConfigError, match=helps):
            launchers.check_installed(launcher)


def test_cores_are_divided_among_workers_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from omegaconf import OmegaConf

    def divided(launcher: str, batch: int | None = None) -> tuple[int | None, int | None]:
        options = OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / f"{launcher}.yaml")
        sweeper = OmegaConf.create({"max_batch_size": batch, "processes": 1})
        found = launchers.workers(launcher, options, sweeper, runs=24, devices={"cpu"})
        return found, launchers.threads(launcher, options, workers=found)

    monkeypatch.setattr(launchers, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert divided("joblib") == (8, 1)
    assert divided("submitit_local", batch=3) == (3, 2)
    assert divided("submitit_local") == (8, 1)
    assert divided("submitit_slurm") == (None, 4)
    assert divided("ray") == (None, 1)
    assert launchers.threads("basic", None, workers=1) is None
    assert launchers.threads("basic", None, workers=3) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert divided("submitit_local", batch=3) == (3, 5)


def test_runs_go_on_side_by_side_only_where_no_gpu_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from omegaconf import OmegaConf

    def workers(processes: int | str, *, runs: int, device: str) -> int | None:
        sweeper = OmegaConf.create({"max_batch_size": None, "processes": processes})
        return launchers.workers("basic", None, sweeper, runs=runs, devices={device})

    monkeypatch.setattr(launchers, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers("cores", runs=24, device="auto") == 8
    assert workers("cores", runs=3, device="cpu") == 3
    assert workers(2, runs=3, device="cpu") == 2
    assert workers(1, runs=3, device="auto") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert workers("cores", runs=24, device="auto") == 1
    assert workers("cores", runs=24, device="cpu") == 8
    monkeypatch.setattr(launchers.sys, "platform", "darwin")
    assert workers("cores", runs=24, device="cpu") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "for all cores, or a whole number"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=x"], "above 0, got 'x'"),
        (["hydra/launcher=joblib", "hydra.launcher.jobs=2"], "jobs"),
        (["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=0"], "above 0"),
        (["hydra/launcher=joblib", "hydra.sweeper.max_batch_size=-1"], "above 0, got -1"),
        (["hydra.sweeper.max_batch_size=x"], "must be a whole number above 0, got 'x'"),
        (["hydra=3"], "hydra must be a group of settings"),
        (["hydra.sweeper=3"], "hydra.sweeper must be a group of settings"),
        (["hydra.sweeper.params=[1,2]"], "params must be a group of settings, such as"),
        (["hydra.launcher.ray=3"], "hydra.launcher.ray must be a group of settings"),
        (["hydra.sweeper.processes=0"], "must be cores or a whole number above 0, got 0"),
        (["hydra.sweeper.processes=all"], "cores or a whole number above 0, got 'all'"),
        (["hydra/launcher=nonsense"], "nonsense"),
        (["hydra/launcher=null"], "must be one of basic, joblib, "),
        (["+experiment=kinds"], "must be written without +: experiment=kinds"),
        (["hydra.callbacks={mine: {}}"], "allowed here: any, if the setting begins with a +"),
        (["study=a/b"], "study must be"),
        (["recompute.damping=0.5,0"], "recompute.damping"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence_before_anything_is_written(
    in_process: Callable[..., tuple[int, str, str]],
    settings: list[str],
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    code, out, err = in_process("converge", "-m", *settings, "feedback.strength=0,1", *words)
    assert code == 2
    assert re.fullmatch(r"error: .+\n", err), err
    assert said in err
    assert out == ""
    assert not (tmp_path / "runs").exists()
