"""Keeps ``<study>/wandb/``, a view of the study's runs for ``wandb leet``, made of links alone.

``wandb leet`` shows folders that are named run-DATE_TIME-NAME and hold a file run-NAME.wandb; so
the links give W&B's files, which lie in their run folders, names that people can read.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path


def show(study: Path, wandb_run: Path, *, name: str, run_id: str) -> None:
    """Show a run's W&B folder in its study's view, instead of what was shown of it before.

    A view that cannot be written is left as it is: it shows nothing that is not elsewhere.
    """
    when = wandb_run.name.removeprefix("offline-").rpartition("-")[0]  # run-DATE_TIME
    readable = f"{name} {run_id}".replace("β", "beta")
    readable = re.sub(r"[^A-Za-z0-9.=+_-]+", "_", readable)  # a shell splits at spaces
    stored = next(wandb_run.glob("*.wandb"), wandb_run / f"run-{run_id}.wandb")  # or will be
    view = study / "wandb"
    with suppress(OSError):
        view.mkdir(exist_ok=True)
        for shown in view.glob("run-*"):
            files = shown / "files"
            is_gone = files.is_symlink() and not files.exists()
            if is_gone or shown.name.endswith(f"_{run_id}"):
                shutil.rmtree(shown, ignore_errors=True)
        place = view / f"{when}-{readable}"
        place.mkdir()
        # relative, so that the study can be moved
        (place / f"run-{readable}.wandb").symlink_to(os.path.relpath(stored, place))
        (place / "files").symlink_to(os.path.relpath(wandb_run / "files", place))
