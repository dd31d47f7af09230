"""Upload the finished runs of a study that W&B's server does not have yet.

    python -m scripts.sync_wandb runs/mine
    python -m scripts.sync_wandb runs/mine --project other --entity my-team

Everything is read from the run folders, so W&B's own files may be lost. A run goes to the W&B run
with its id: what is there already is not added again. Called twice, nothing is uploaded twice.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from analysis.read.saved import NotData
from experiments.converge.publish import open_tracker, publish
from experiments.converge.settings import TrackingSettings
from experiments.runs.files import read_json, write_json
from experiments.runs.folder import (
    CONFIG,
    STATUS,
    SUMMARY,
    TRACKER,
    damage,
    read_config,
    read_status,
    run_id,
)
from experiments.settings import ConfigError, parse
from experiments.tracking.tracker import LOGIN, SYNCED, has_login, server_url, stop_helper
from scripts._command import Failure, command

PATIENCE = 600.0  # seconds that the server may take for one run


@command("sync_wandb", ConfigError, prefix="error")
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="a study folder, or one run folder")
    parser.add_argument("--project", help="instead of the tracking.project that the runs have")
    parser.add_argument("--entity", help="instead of the tracking.entity that the runs have")
    told = vars(parser.parse_args())
    study = told.pop("study")
    try:
        sync(study, {key: value for key, value in told.items() if value is not None})
    except KeyboardInterrupt:
        stop_helper()
        print("error: interrupted; the same command carries on", file=sys.stderr)
        raise SystemExit(130) from None


def sync(study: Path, asked: dict[str, str]) -> None:
    """Upload what is missing, to the project and entity ``asked`` for; says what became of it.

    Raises Failure if there are no runs, the server is not there, or it failed on the way.
    """
    folders = sorted(path.parent for path in (*study.glob(STATUS), *study.glob(f"*/{STATUS}")))
    if not folders:
        raise Failure(f"{study} holds no runs: give a study folder, runs/STUDY")
    finished = [folder for folder in folders if read_status(folder).get("state") == "finished"]
    parse(asked, TrackingSettings)  # refused before anything is uploaded
    wanted = {"server": server_url(), **asked}
    missing, damaged = [], 0
    for folder in finished:
        known = read_json(folder / TRACKER / SYNCED)
        if isinstance(known, dict) and wanted.items() <= known.items():
            continue
        if "contestant" in (read_config(folder) or {}):
            raise Failure(
                f"{study} is of state tracking, and only convergence runs are uploaded here:"
                f" wandb sync {folder}/{TRACKER}/*run-* is for the others"
            )
        if (what := damage(folder)) is None:
            missing.append(folder)
        else:
            damaged += 1
            print(f"warning: {run_id(folder)} is left out: {what}", file=sys.stderr)
    if missing and not has_login():
        raise Failure(f"nothing is uploaded: {LOGIN}; the runs wait in {study}")
    for number, folder in enumerate(missing):
        try:
            where = _upload(folder, asked)
        except (OSError, ConfigError, NotData, Failure) as error:
            raise Failure(
                f"{number} of {len(missing)} runs are uploaded, {run_id(folder)} is not:"
                f" {' '.join(str(error).split())}; the same command carries on"
            ) from None
        print(f"{run_id(folder)} is uploaded to {where['entity']}/{where['project']}")
    print(
        f"{len(missing)} uploaded, {len(finished) - damaged - len(missing)} were there already,"
        f" {len(folders) - len(finished) + damaged} left out (not finished, or damaged)"
    )


def _upload(folder: Path, asked: dict[str, str]) -> dict[str, Any]:
    """Tell W&B of one run again; returns where it is now."""
    problems: list[str] = []
    config: Any = read_config(folder)
    # W&B's new files are not kept: all that they would hold is in the run folder
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        try:
            tracker = open_tracker(
                config,
                run_id(folder),
                Path(place),
                tracking=parse({**config["tracking"], **asked, "mode": "online"}, TrackingSettings),
                warn=problems.append,
                patience=PATIENCE,
            )
        except (KeyError, TypeError):
            raise Failure(f"its {CONFIG} is not that of a convergence run") from None
        try:
            publish(tracker, folder, read_json(folder / SUMMARY))
        except Exception:  # a mistake of ours keeps its traceback
            tracker.finish(failed=True)
            raise
        if not tracker.finish():
            raise Failure(problems[0] if problems else "W&B did not take it")
        where: dict[str, Any] = read_json(Path(place, TRACKER, SYNCED))
    try:
        (folder / TRACKER).mkdir(exist_ok=True)  # W&B's own files may be lost
        write_json(folder / TRACKER / SYNCED, where)
        for stored in folder.glob(f"{TRACKER}/*run-*/*.wandb"):
            Path(f"{stored}.synced").touch()  # so that `wandb sync` leaves it alone, too
    except OSError as error:  # somebody else's study: what is uploaded is uploaded
        said = f"{folder / TRACKER} cannot be written ({error.strerror or error})"
        print(f"warning: {said}, so that another call uploads it again", file=sys.stderr)
    return where


if __name__ == "__main__":
    sys.exit(main())
