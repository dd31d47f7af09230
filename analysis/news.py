"""What a reader of runs has to tell besides the runs: one line each, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from analysis.saved import LeftOut, SavedRun

MOST_NAMES = 20


def left_out_line(left_out: Sequence[LeftOut]) -> str:
    """Counts and names the runs that are not data."""
    if not left_out:
        return ""
    noun = "run that is" if len(left_out) == 1 else "runs that are"
    names = ", ".join(f"{item.run_id} ({item.reason})" for item in left_out)
    return f"Left out {len(left_out)} {noun} not finished and whole: {names}."


def repeated_line(run_ids: Sequence[str]) -> str:
    """Counts and names the runs that lie in several places."""
    if not run_ids:
        return ""
    noun = "1 run that lies" if len(run_ids) == 1 else f"{len(run_ids)} runs that lie"
    return f"Counted once: {noun} in several places: {some(run_ids)}."


def lacking_line(saved: Iterable[SavedRun]) -> str:
    """Counts and names the runs of which only measures over all prompts were kept."""
    lacking = [run for run in saved if run.lacking]
    if not lacking:
        return ""
    noun = "1 run has" if len(lacking) == 1 else f"{len(lacking)} runs have"
    names = some([f"{run.run_id} ({run.lacking})" for run in lacking])
    return f"{noun} only W&B's history, with measures over all prompts: {names}."


def some(names: Sequence[str]) -> str:
    """The names, or the first of very many."""
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
