"""Saved runs as tables: text to read, CSV with every recorded column to compute with.

Draws nothing. Every text table is laid out by `tabulate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pandas as pd
from tabulate import tabulate

from analysis.intervals import paired
from analysis.models import QUESTION, Models, at_best_rates, at_full_depth, trained
from analysis.read.model_folder import RATES
from analysis.read.saved import ALL_PROMPTS
from analysis.runs import Runs
from analysis.text import number, printable, short, visible

MISSING = "–"
COUNTS = ("prompt_tokens", "generated_tokens", "iterations", "iterations_to_tolerance")
LEFT_ALIGNED = frozenset({"prompt", "outcome"})
LEGEND = (
    "iterations: until settled to the reporting tolerance; rate: contraction per pass; lyapunov: "
    "growth per token;\nnll: nats/token; Δnll: to the plain model, ± half its 95 % interval; "
    "effect: KL to the plain model, nats; –: missing or not reached"
)


def text_tables(runs: Runs) -> str:
    """All kinds of saved things, a table each; runs of one setting are pooled."""
    parts = [*_run_tables(runs), *_training_tables(runs.models), *_contest_tables(runs.contests)]
    return printable("\n\n".join(parts), keep="\n")


def _run_tables(runs: Runs) -> Iterator[str]:
    if runs.runs.empty:
        return
    many = bool(runs.runs["group"].duplicated().any())
    for (study, variant), members in runs.runs.groupby(["study", "variant"], sort=False):
        kind = members["kind"].iloc[0]
        words = [f"study {study}", kind, *str(variant).split(", ")]
        heading = " · ".join(w for w in dict.fromkeys(words) if w not in ("", "no feedback"))
        rows = [row for _, same in members.groupby("group") for row in _rows(runs, same, many=many)]
        aligned = ["left" if name in LEFT_ALIGNED else "right" for name in rows[0]]
        yield f"{heading}\n{_laid_out(rows, aligned)}"
    notes = [LEGEND]
    for off, members in runs.runs[runs.runs["off"] != ""].groupby("off"):
        names = "all runs" if len(members) == len(runs.runs) else ", ".join(members["run_id"])
        notes.append(f"switched off in {names} (measures.*=false): {off}")
    yield "\n".join(notes)


def _rows(runs: Runs, same: pd.DataFrame, *, many: bool) -> Iterator[dict[str, str]]:
    """A row a prompt and one over all, of runs that are repeats of one setting."""
    prompts = single_prompts(runs)
    prompts = prompts[prompts["run"].isin(same.index)]
    estimates = runs.estimates[runs.estimates["run"].isin(same.index)]
    tokens = prompts["prompt_tokens"] + prompts["generated_tokens"].fillna(0)
    for prompt, group in prompts.assign(tokens=tokens).groupby("prompt_id", sort=False):
        of_prompt = estimates[estimates["prompt_id"] == prompt]
        yield _cells(same, short(visible(str(prompt), spaces=False), 24), group, of_prompt, many)
    if prompts.empty or same["nll"].notna().any() or same["outcome"].notna().any():
        yield _cells(
            same,
            "overall",
            same.assign(tokens=tokens.groupby(prompts["run"]).sum()),
            estimates,
            many,
        )


def _cells(
    same: pd.DataFrame, name: str, values: pd.DataFrame, estimates: pd.DataFrame, many: bool
) -> dict[str, str]:
    strength = same["strength"].iloc[0]
    outcomes = values["outcome"].dropna().value_counts()
    counted = [f"{n} {outcome}" for outcome, n in outcomes.items()]
    needed = values["iterations_to_tolerance"]
    interval = paired(estimates) if len(estimates) else None
    mean = values[["tokens", "rate", "lyapunov", "nll", "nll_plain", "kl_effect"]].mean()
    return {
        "strength": MISSING if pd.isna(strength) else number(strength),
        **({"runs": str(len(same))} if many else {}),
        "prompt": name,
        "tokens": _count(mean["tokens"]),
        "outcome": outcomes.index[0] if len(counted) == 1 else ", ".join(counted) or MISSING,
        "iterations": MISSING if needed.isna().any() else _count(needed.mean()),
        "rate": _fixed(mean["rate"], 3),
        "lyapunov": _fixed(mean["lyapunov"], 3, signed=True),
        "nll": _fixed(mean["nll"], 4),
        "Δnll": _fixed(mean["nll"] - mean["nll_plain"], 4, signed=True),
        "±": MISSING if interval is None else _fixed(interval.half, 4),
        "effect": _fixed(mean["kl_effect"], 4),
    }


def _training_tables(models: Models) -> Iterator[str]:
    """A row a setting; losses as mean and standard deviation over its seeds, best model last."""
    if models.rows.empty:
        return
    rows = models.rows.join(trained(models))
    best = rows["generating"].groupby(rows["group"]).transform("mean")
    rows = rows.assign(best=best).sort_values(
        ["stateful", "best"], ascending=[True, False], kind="stable"
    )
    table = []
    for _, same in rows.groupby("group", sort=False):
        stateful = bool(same["stateful"].iloc[0])
        per_character = same["generating"] / pd.to_numeric(same["characters_per_token"])
        table.append(
            {
                "model": same["variant"].iloc[0] or ("stateful" if stateful else "plain"),
                "seeds": str(len(same)),
                "parameters": number(same["parameters"].iloc[0])
                if len(str(same["parameters"].iloc[0])) < 4
                else f"{same['parameters'].iloc[0]}",
                "tokens read (M)": f"{same['tokens_read'].mean() / 1e6:.2f}",
                "depth 0": spread(same["first"]),
                **{
                    heading: spread(same[name]) if stateful else MISSING
                    for heading, name in (
                        ("depth 1", "second"),
                        ("depth D−1", "last"),
                        ("depth D", "beyond"),
                        ("depth T−1", "generating"),
                    )
                },
                "nats/character": spread(per_character),
                "KL falls": f"{same['contracts'].sum()} of {len(same)}" if stateful else MISSING,
            }
        )
    yield _laid_out(table, ["left"] * len(table[0]), "github")


def _contest_tables(contests: Models) -> Iterator[str]:
    """A table for each question, ready for a README."""
    if contests.rows.empty:
        return
    contests = at_best_rates(contests)
    accuracy = at_full_depth(contests)
    for _, group in contests.rows.sort_values(
        "target", key=lambda t: t != "state", kind="stable"
    ).groupby(QUESTION, sort=False):
        one = group.iloc[0]
        last, most = int(one["trained_level"]), int(one["tested_level"])
        levels = sorted({max(1, last // 2), last, (last + most) // 2, most})
        table = []
        for _, same in group.groupby("group", sort=False):
            reached = accuracy.loc[same.index]
            table.append(
                {
                    "contestant": same["variant"].iloc[0] or same["run_id"].iloc[0],
                    "rates": " / ".join(
                        f"{same[name].iloc[0]:g}" for name in RATES if name in same
                    ),
                    "seeds": str(len(same)),
                    **{f"level {level}": spread(reached[level], ".2f") for level in levels},
                    "solved to level": ", ".join(map(str, same["solved_level"])),
                    "layer passes": f"{same['layer_passes'].mean():.0f}",
                    "s": f"{same['seconds'].mean():.0f}",
                }
            )
        title = (
            f"{one['task']}, target {one['target']}: accuracy at full depth, trained to level"
            f" {last}, chance {one['chance']:.2f}"
        )
        yield f"{title}\n\n{_laid_out(table, ['left'] * len(table[0]), 'github')}"


def spread(values: pd.Series, form: str = ".4f") -> str:
    """`3.412 ± 0.004`: mean and standard deviation; a single value stands alone."""
    values = values.dropna().astype(float)
    if values.empty:
        return MISSING
    return f"{values.mean():{form}}" + (f" ± {values.std():{form}}" if len(values) > 1 else "")


def csv_tables(runs: Runs) -> Iterator[tuple[str, str]]:
    """(what it holds, CSV) for each kind there is: every recorded column, in full precision."""
    makers: tuple[tuple[str, Callable[[], pd.DataFrame], bool], ...] = (
        ("runs", lambda: _run_rows(runs), runs.runs.empty),
        ("trainings", lambda: _model_rows(runs.models), runs.models.rows.empty),
        ("contests", lambda: _contest_rows(runs.contests), runs.contests.rows.empty),
    )
    for name, rows, empty in makers:
        if not empty:
            frame = rows()
            for column in frame.select_dtypes(include=["object", "string"]):
                frame[column] = frame[column].map(
                    lambda value: printable(value, keep="\n\t") if isinstance(value, str) else value
                )
            yield name, frame.to_csv(index=False)


def _run_rows(runs: Runs) -> pd.DataFrame:
    """A row per run and prompt, and one over all prompts of each run."""
    measures = [name for name in runs.prompts if name in runs.runs]
    about = runs.runs.drop(
        columns=[*measures, "variant", "group", "ends_by_theorem", "lacking", "off"]
    )
    overall = runs.runs[measures].assign(row="overall", run=runs.runs.index)
    overall = overall[overall[measures].notna().any(axis=1)]
    frame = pd.concat(
        [single_prompts(runs).assign(row="prompt"), overall.dropna(axis=1, how="all")]
    )
    frame = frame.sort_values("run", kind="stable")
    for name in COUNTS:
        values = frame[name].dropna()
        if (values % 1 == 0).all():  # 58, not 58.0
            frame[name] = frame[name].astype("Int64")
    frame = frame.rename(columns={name: f"{name}_recorded" for name in frame if name in about})
    full = about.join(frame.set_index("run"), how="right")
    first = ["run_id", "study", "commit", "dirty", "kind", "strength", "label", "row", "prompt_id"]
    return full[[*first, *(name for name in full if name not in first)]]


def _model_rows(models: Models) -> pd.DataFrame:
    wide = models.curves.pivot(index="model", columns="depth", values=["nll", "kl"])
    wide.columns = pd.Index([f"{column[0]}_{column[1]}" for column in wide.columns])
    return models.rows.drop(columns=["place", "variant", "group"]).join(
        wide.dropna(axis=1, how="all")
    )


def _contest_rows(contests: Models) -> pd.DataFrame:
    about = contests.rows.drop(columns=["place", "variant", "group"])
    return about.join(at_full_depth(contests).add_prefix("level_"))


def single_prompts(runs: Runs) -> pd.DataFrame:
    """Without the stand-in for all prompts: the row over all prompts says the same."""
    return runs.prompts[runs.prompts["prompt_id"] != ALL_PROMPTS]


def _laid_out(rows: list[dict[str, str]], aligned: list[str], form: str = "simple") -> str:
    text: str = tabulate(
        rows, headers="keys", tablefmt=form, colalign=aligned, disable_numparse=True
    )
    return text


def _count(value: float) -> str:
    if pd.isna(value):
        return MISSING
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"  # a mean


def _fixed(value: float, digits: int, *, signed: bool = False) -> str:
    if pd.isna(value):
        return MISSING
    if not math.isfinite(value):
        return str(value)
    sign = "+" if signed else ""
    small = value != 0 and abs(value) < 0.5 * 10**-digits
    return (
        f"{value:{sign}.0e}".replace("-", "−")
        if small
        else f"{value:{sign}.{digits}f}".replace("-", "−")
    )
