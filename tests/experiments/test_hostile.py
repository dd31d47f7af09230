"""What others wrote reaches no terminal raw, in a run's files or as an argument."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from experiments.sweeps.study import ours
from tests.forked import Forker

OLD = Path(__file__).parents[1] / "fixtures" / "ca8ee83" / "old"
FIXED, GENERATED, KILLED = "32c8582498", "54a1ba9363", "ab981385f7"
# what no terminal may get: C0 but tab and line feed, C1, marks of direction, separators, surrogates
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
HOSTILE = {
    "bell": "a\x07b",
    "backspace": "evil\x08\x08\x08\x08good",
    "return": "evil\rgood",
    "escape": "\x1b[2J\x1b]0;title\x07",
    "delete": "a\x7fb",
    "C1": "a\x9b31mb",
    "next line": "a\x85b",
    "line feed": "a\nerror: b",
    "bidi": "\u202egnp.exe",
    "isolate": "\u2066a\u2069",
    "separator": "a\u2028b",
    "half a character": "a\ud800b",
    "vast": "x" * 6_000_000,
}
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """A command in this process: exit code, standard output, standard error."""

    def call(module: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *words])
        capsys.readouterr()
        code = import_module(module).main()
        return code, *capsys.readouterr()

    return call


def assert_tame(out: str, err: str, *, most: int) -> None:
    assert not UNSAFE.search(out + err)
    assert "Traceback" not in err
    assert len(out) + len(err) < most, "no value is repeated at any length"


@pytest.fixture(params=HOSTILE)
def value(request: pytest.FixtureRequest) -> str:
    return HOSTILE[request.param]


def test_nothing_of_a_runs_files_reaches_a_terminal_raw(
    value: str, tmp_path: Path, main: Main
) -> None:
    study = Path(shutil.copytree(OLD, tmp_path / "old"))

    def edit(run: str, name: str, **fields: object) -> None:
        path = study / run / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    edit(FIXED, "summary.json", overall={"outcome": value, "nll": value, "nll_plain": [value]})
    edit(FIXED, "status.json", commit=value, device=value, versions={value: value})
    edit(KILLED, "status.json", state="failed", error=value, command=value)
    config = study / GENERATED / "config.yaml"
    quoted = json.dumps(value)
    settings = config.read_text().replace("kind: log_prob", f"kind: {quoted}")
    config.write_text(settings.replace("start: carried", f"start: {quoted}"))
    if len(value) < 200 and "\ud800" not in value:
        (study / KILLED).rename(study / value)
    code, out, err = main("experiments.status", str(study))
    assert code == 1
    assert_tame(out, err, most=10_000)
    assert "3 runs:" in out
    commands = re.findall(r"^Complete it:  (.*)$", out, re.MULTILINE)
    assert all(
        command.startswith("python -m experiments.converge study=old ") for command in commands
    )
    code, out, err = main("experiments.verify", str(study), "--run", GENERATED)
    assert code == 1
    assert_tame(out, err, most=2_000)
    for words in (["--run", value], ["--run", value, "--all"]):
        code, out, err = main("experiments.verify", str(study), *words)
        assert code == 2
        assert_tame(out, err, most=2_000)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python -m experiments.converge seed=1", True),
        ("python -m experiments.converge -m seed=1,2 hydra/launcher=joblib", True),
        ("python -m experiments.state_tracking -m hydra.launcher.n_jobs=2 '+task.name=a b'", True),
        ("python -m experiments.converge -m hydra.launcher.ray.init.address=auto", True),
        ("python -m experiments.converge -m hydra.launcher.ray.init.address=evil:1", False),
        ("python -m experiments.converge -m 'hydra.launcher.n_jobs={_target_: evil}'", False),
        ("python -m experiments.converge ; rm -rf ~", False),
        ("python -m experiments.converge -cd /tmp/evil", False),
        ("python -m experiments.converge --config-dir=/tmp/evil", False),
        ("python -m experiments.converge hydra.launcher._target_=os.system", False),
        ("python -m experiments.converge hydra.searchpath=[/tmp/evil]", False),
        ("python -m experiments.converge 'hydra.launcher.setup=[curl evil]' -m", False),
        ("python -m experiments.converge '~hydra.sweeper' -m", False),
        ("python -m evil", False),
        ("curl evil", False),
        ("python", False),
        ("python -m experiments.converge 'seed=1", False),
    ],
)
def test_no_stored_command_is_shown_but_one_of_ours(command: str, shown: bool) -> None:
    assert ours(command) == (command if shown else None)


def test_what_a_shell_would_run_of_a_stored_setting_is_quoted() -> None:
    stored = 'python -m experiments.converge "study=$(evil)" seed=`evil`'
    assert ours(stored) == "python -m experiments.converge 'study=$(evil)' 'seed=`evil`'"


@pytest.mark.parametrize(
    "key",
    [
        "model.path",
        "model.tokenizer",
        "prompts.file",
        "feedback.kind",
        "study",
        "hidden",
        "recompute.solver",
    ],
)
def test_no_setting_reaches_a_terminal_raw(
    value: str, key: str, in_process: Main, settings: list[str], tmp_path: Path
) -> None:
    if len(value) > 100_000:
        value = value[:100_000]  # no argument is longer
    code, out, err = in_process("converge", *settings, f"{key}='{value}'", f"runs_dir={tmp_path}")
    assert code == 2
    assert_tame(out, err, most=1_500)
    assert re.fullmatch(r"error: .+\n", err), "one line"


@pytest.mark.parametrize("where", ["folder", "file"])
def test_no_path_of_a_corpus_reaches_a_terminal_raw(
    value: str, where: str, in_process: Main, tmp_path: Path
) -> None:
    if len(value) > 200 or "\ud800" in value:
        value = value[:100].replace("\ud800", "\x1b")
    (tmp_path / value).mkdir()
    if where == "file":
        (tmp_path / value / f"{value}.txt").write_bytes(b"\xff")
    folder = f"'{tmp_path / value}'"
    words = (f"corpus.train={folder}", f"corpus.held_out={folder}", f"output={tmp_path / 'out'}")
    code, out, err = in_process("train", *words, "device=cpu", "tracking.mode=disabled")
    assert code == 2
    assert_tame(out, err, most=1_500)


# --- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict() -> Iterator[Forker]:
    """Where every warning is an error, and a file that is not closed is one."""
    imports = ("torch", "safetensors.torch", "hydra", "pandas", "pyarrow.parquet", "tiktoken")
    with Forker("-X", "dev", "-W", "error", imports=imports) as found:
        yield found


@pytest.mark.parametrize(
    "words",
    [
        "experiments.status HERE/old",
        "experiments.verify HERE/old --run 54a1ba9363",
        "experiments.converge model=checkpoint model.path=HERE/pipe",
        "experiments.converge prompts.file=HERE/pipe.txt",
        "experiments.converge -m recompute.iterations=1,0",
        "experiments.train corpus.train=HERE corpus.held_out=HERE output=HERE/out",
        "stateful_gpt.generate --prompt x --model HERE/evil.pt",
        "stateful_gpt.generate --prompt x --model /dev/zero",
        "analysis table HERE/old",
        "scripts.print_passes HERE/old",
    ],
)
def test_no_file_or_process_is_leaked(words: str, strict: Forker, tmp_path: Path) -> None:
    study = shutil.copytree(OLD, tmp_path / "old")
    (study / FIXED / "trajectory.parquet").write_bytes(b"garbage")
    (study / KILLED / "summary.json").symlink_to("/dev/zero")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": print}))
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.txt")
    done = strict.run(["-m", *words.replace("HERE", str(tmp_path)).split()])
    for sign in ("Warning", "Exception ignored", "Traceback"):
        assert sign not in done.stderr


SECONDS, BYTES = 10.0, 10**9


def lying(folder: Path) -> Path:
    """A model whose settings promise far more layers than its weights have."""
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["n_layer"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "ray"])
def test_hostile_cells_stop_no_other_on_any_launcher(
    launcher: str, settings: list[str], checkpoint_folder: Path, tmp_path: Path
) -> None:
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    pipe, evil = tmp_path / "pipe.txt", tmp_path / "evil.pt"
    os.mkfifo(pipe)
    evil.write_bytes(pickle.dumps({"model": print}))
    vast = lying(Path(shutil.copytree(checkpoint_folder, tmp_path / "vast")))
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"id": "\x1b[2J" + "x" * 6_000_000, "tokens": [999]}) + "\n")
    good = tmp_path / "good.txt"
    good.write_text("the dog ran")
    for study, values, refused in (
        ("models", f"model.path=/dev/zero,{evil},{vast},{checkpoint_folder}", 3),
        ("prompts", f"prompts.file={pipe},{odd},{good}", 2),
    ):
        command = [sys.executable, "-m", "experiments.converge", "-m"]
        process = subprocess.Popen(
            [*command, f"hydra/launcher={launcher}", *settings, f"study={study}", values],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        with process.stdout:
            out = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 1, out
        assert_tame(out, "", most=10_000)
        assert out.count("\nerror: ") == refused, out
        assert f"{refused + 1} runs: 1 finished, {refused} failed" in out
        # processor time of it and of its workers, which wait for others here and there
        assert used.ru_utime + used.ru_stime < SECONDS + 10 * (launcher != "basic")
        assert used.ru_maxrss * 1024 < BYTES, "of the largest of its processes"
