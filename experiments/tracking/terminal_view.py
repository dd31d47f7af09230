"""Keeps ``<study>/wandb/``, a view of the study's runs for ``wandb leet``, made of links alone.

``wandb leet`` shows folders that are named run-DATE_TIME-NAME and hold a file run-NAME.wandb; so
the links give W&B's files, which lie in their run folders, names that people can read.
"""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

STAMP = re.compile(r"run-(\d{8}_\d{6})-")


def show(study: Path, wandb_run: Path, *, name: str, run_id: str) -> None:
    """Show a run's W&B folder in its study's view, instead of what was shown of it before.

    A view that cannot be written is left as it is: it shows nothing that is not elsewhere.
    """
    stamp = STAMP.search(wandb_run.name)
    stored = next(wandb_run.glob("*.wandb"), None)
    if stamp is None:
        return
    readable = f"{name} {run_id}".replace("β", "beta")
    readable = re.sub(r"[^A-Za-z0-9.=+_-]+", "_", readable)  # a shell splits at spaces
    view = study / "wandb"
    with suppress(OSError):
        view.mkdir(exist_ok=True)
        _remove_outdated(view, run_id)
        # filled beside its place: runs that start at the same time see it whole or not at all
        filled = Path(tempfile.mkdtemp(prefix=".", dir=view))
        filled.chmod(0o755)
        target = stored or wandb_run / f"run-{run_id}.wandb"  # W&B may not have begun it yet
        _link(filled / f"run-{readable}.wandb", target, view)
        _link(filled / "files", wandb_run / "files", view)
        os.replace(filled, view / f"run-{stamp[1]}-{readable}")


def _link(link: Path, target: Path, view: Path) -> None:
    # relative, so that the study can be moved; what is shown lies one level below the view
    link.symlink_to(Path("..") / os.path.relpath(target, view))


def _remove_outdated(view: Path, run_id: str) -> None:
    """Remove what is shown of this run, and of runs that are gone."""
    for shown in view.glob("run-*"):
        files = shown / "files"
        if shown.name.endswith(f"_{run_id}") or (files.is_symlink() and not files.exists()):
            shutil.rmtree(shown, ignore_errors=True)
