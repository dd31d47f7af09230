"""W&B's real client against servers on the loopback: one that takes runs, and four that do not."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiments.tracking import tracker as tracking
from tests.wandb_server import KEY, WandbServer, serving

Compute = Callable[..., Path]
ITERATIONS = 12  # of the runs of these tests

pytestmark = pytest.mark.usefixtures("quiet_wandb")


def assert_whole(folder: Path) -> None:
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert pq.read_metadata(folder / "trajectory.parquet").num_rows > 0


# --- a server that takes runs -------------------------------------------------------------------


def test_an_online_run_arrives_under_its_own_id_with_all_that_belongs_to_it(
    compute: Compute, wandb_server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = compute("tracking.mode=online", "recompute.tolerance=0")
    assert capfd.readouterr().err == ""
    assert list(wandb_server.runs) == [folder.name]
    run = wandb_server.runs[folder.name]
    assert run.exit_code == 0
    assert run.fields["groupName"] == "s"
    assert run.fields["displayName"] == "log_prob β=0.5 n=12"
    assert json.loads(run.fields["config"])["feedback"]["value"]["strength"] == 0.5
    rows = [row for row in run.history if "iteration" in row]
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    assert [row["_step"] for row in rows] == list(range(1, ITERATIONS + 1))
    assert all("oracle_error_max" in row for row in rows)
    (pages,) = [row for row in run.history if "page" in row]
    assert pages["page"]["path"] in run.files
    assert "token_trajectories_table" in pages
    for name in ("config.yaml", "summary.json", "iterations.parquet", "trajectory.parquet"):
        assert run.files[f"run_folder/{name}"] == (folder / name).read_bytes()
    assert json.loads(run.files["run_folder/status.json"])["state"] == "finished"
    summary = json.loads(run.streams["wandb-summary.json"][0])
    assert summary["nll"] == json.loads((folder / "summary.json").read_text())["overall"]["nll"]
    assert run.artifacts[f"run-{folder.name}"] == {
        name: (folder / name).read_bytes()
        for name in ("trajectory.parquet", "iterations.parquet", "summary.json")
    }


def test_a_run_that_is_computed_again_adds_nothing_to_what_the_server_has(
    compute: Compute, wandb_server: WandbServer
) -> None:
    folder = compute("tracking.mode=online")
    before = wandb_server.runs[folder.name].history
    (folder / "status.json").unlink()  # as a kill at the last moment leaves it
    compute("tracking.mode=online")
    assert wandb_server.runs[folder.name].history == before
    assert list(wandb_server.runs) == [folder.name]
    assert len(list(folder.glob("wandb/run-*"))) == 1


# --- servers that do not ------------------------------------------------------------------------


@contextmanager
def refusing() -> Iterator[str]:
    with socket.socket() as taken:  # a port where nothing listens
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    with serving() as server:
        server.die = lambda request: True
        yield server.url


@contextmanager
def rejecting() -> Iterator[str]:
    with serving() as server:
        server.key = "another" * 6
        yield server.url


@contextmanager
def failing() -> Iterator[str]:
    with serving() as server:
        server.code = 503
        yield server.url


def dying_at(operation: str) -> Callable[[], Any]:
    """It answers until it hears of this, then never again."""

    @contextmanager
    def dying() -> Iterator[str]:
        with serving() as server:
            server.die = lambda request: operation in request
            yield server.url
            assert server.dead.is_set(), "it has died where it should"

    return dying


SERVERS = {
    "refusing": refusing,
    "silent": silent,
    "rejecting": rejecting,
    "failing": failing,
    "dying when the run begins": dying_at("UpsertBucket"),
    "dying in the history": dying_at("wandb-history.jsonl"),
    "dying at the artifact": dying_at("CreateArtifact "),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "refusing" else pytest.mark.slow) for name in SERVERS],
)
def test_a_study_with_a_bad_server_goes_on_offline_with_one_warning_within_15_seconds(
    name: str,
    compute: Compute,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    strengths = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    compute("tracking.mode=offline", "feedback.strength=0.7")  # W&B is imported, a model loaded
    began = time.monotonic()
    compute("tracking.mode=offline", "feedback.strength=0.8")
    usual = time.monotonic() - began
    tracking.stop_helper()
    capfd.readouterr()

    with SERVERS[name]() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        folders = [
            compute("tracking.mode=online", f"feedback.strength={strength}")
            for strength in strengths
        ]
        took = time.monotonic() - began
    # W&B's helper process begins anew at most twice, which is local work like a usual run
    assert took < 15 + (len(strengths) + 4) * usual
    for folder in folders:
        assert_whole(folder)
        written = list(folder.glob("wandb/*run-*/*.wandb"))
        assert len(written) == 1, "one W&B run for a run id"
    offline = [folder for folder in folders if list(folder.glob("wandb/offline-run-*"))]
    assert len(offline) >= len(folders) - 1, "only the run under way can have been online"
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("warning: W&B goes on offline: ")
    assert err.endswith(f"; upload later with: python -m scripts.sync_wandb {folders[0].parent}\n")


def test_all_that_a_bad_server_can_cost_is_less_than_15_seconds() -> None:
    assert tracking.INIT_SECONDS + tracking.FINISH_SECONDS <= 15


def test_online_without_a_key_is_one_warning_and_nobody_is_asked_for_one(
    compute: Compute, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = compute("tracking.mode=online")
    assert_whole(folder)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    err = capfd.readouterr().err
    assert "there is no API key (wandb login makes one known)" in err
    assert err.count("\n") == 1
