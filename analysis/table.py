"""Saved runs as tables: text to read, CSV with every recorded column to compute with.

Draws nothing. Every text table is laid out by `tabulate`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from analysis.intervals import LEAST_TEXTS, paired, pooled
from analysis.labels import favoured
from analysis.models import QUESTION, Models, at_best_rates, at_full_depth, setting_name, trained
from analysis.read.model_folder import RATES
from analysis.read.saved import ALL_PROMPTS
from analysis.runs import Runs
from analysis.text import number, printable, short, visible

MISSING = "–"
COUNTS = ["prompt_tokens", "generated_tokens", "iterations", "iterations_to_tolerance"]
ABOUT = ["group", "study", "variant", "kind", "strength"]
DERIVED = ["variant", "group", "change", "ends_by_theorem", "lacking", "off"]
LEFT_ALIGNED = frozenset({"prompt", "outcome"})
LEGEND = (
    "iterations: until settled to the reporting tolerance; rate: contraction per pass; lyapunov: "
    "growth per token;\nnll: nats/token; Δnll: to the plain model, ± half its 95 % interval over "
    f"texts, or over the tokens of fewer than {LEAST_TEXTS};\neffect: KL to the plain model, nats; "
    "–: missing or not reached"
)


def text_tables(runs: Runs) -> str:
    """All kinds of saved things, a table each; runs of one setting are pooled."""
    spreads = [*_training_tables(runs.models), *_contest_tables(runs.contests)]
    note = ["±: standard deviation over seeds"] if "±" in str(spreads) else []
    return printable("\n\n".join([*_run_tables(runs), *spreads, *note]), keep="\n")


def _run_tables(runs: Runs) -> Iterator[str]:
    if runs.runs.empty:
        return
    rows = _prompts_and_overall(runs).join(runs.runs[ABOUT], on="run")
    repeats = (runs.estimates, runs.runs["group"])
    changes = paired(*repeats, by_prompt=True)
    changes |= {(group, ALL_PROMPTS): one for group, one in paired(*repeats).items()}
    rows = pooled(rows, ["group", "prompt_id"], first=ABOUT[1:], changes=changes)
    many = bool((rows["runs"] > 1).any())
    for (study, variant), members in rows.groupby(["study", "variant"], sort=False):
        words = [f"study {study}", members["kind"].iloc[0], *str(variant).split(", ")]
        heading = " · ".join(w for w in dict.fromkeys(words) if w not in ("", "no feedback"))
        cells = [_cells(row, many) for row in members.to_dict("records")]
        yield f"{heading}\n{_laid_out(cells)}"
    notes = [LEGEND, *favoured(runs.runs).strip().splitlines()]
    for off, members in runs.runs[runs.runs["off"] != ""].groupby("off"):
        names = "all runs" if len(members) == len(runs.runs) else ", ".join(members["run_id"])
        notes.append(f"switched off in {names} (measures.*=false): {off}")
    yield "\n".join(notes)


def _prompts_and_overall(runs: Runs) -> pd.DataFrame:
    """A row per run and prompt, then one over all prompts of the run, named ALL_PROMPTS.

    Where prompts were chosen, nothing is known of all of them, and there is no such row.
    """
    prompts = runs.prompts[runs.prompts["prompt_id"] != ALL_PROMPTS]
    tokens = prompts["prompt_tokens"] + prompts["generated_tokens"].fillna(0)
    prompts = prompts.assign(tokens=tokens)
    measures = [name for name in runs.prompts if name in runs.runs]
    known = runs.runs[["outcome", "nll"]].notna().any(axis=1)
    known |= ~runs.runs.index.isin(prompts["run"])
    overall = runs.runs.loc[known, measures].assign(prompt_id=ALL_PROMPTS)
    overall = overall.join(prompts.groupby("run")["tokens"].sum())
    overall = overall.rename_axis("run").reset_index().dropna(axis=1, how="all")
    return pd.concat([prompts, overall]).sort_values("run", kind="stable", ignore_index=True)


def _cells(row: Mapping[Any, Any], many: bool) -> dict[str, str]:
    """One prompt, or all, of runs that are repeats of one setting."""
    prompt, strength = row["prompt_id"], row["strength"]
    return {
        "strength": MISSING if pd.isna(strength) else number(strength),
        **({"runs": str(row["runs"])} if many else {}),
        "prompt": "overall" if prompt == ALL_PROMPTS else short(visible(prompt, spaces=False), 24),
        "tokens": _count(row["tokens"]),
        "outcome": row["outcome"] if isinstance(row["outcome"], str) else MISSING,
        "iterations": _count(row["iterations_to_tolerance"]),
        "rate": _fixed(row["rate"], 3),
        "lyapunov": _fixed(row["lyapunov"], 3, sign="+"),
        "nll": _fixed(row["nll"], 4),
        "Δnll": _fixed(row["change"], 4, sign="+"),
        "±": _fixed(row["half"], 4),
        "effect": _fixed(row["kl_effect"], 4),
    }


def _training_tables(models: Models) -> Iterator[str]:
    """A row a setting; losses as mean and standard deviation over its seeds, best model last."""
    if models.rows.empty:
        return
    rows = trained(models).sort_values(["stateful", "best"], ascending=[True, False], kind="stable")
    table = []
    for _, same in rows.groupby("group", sort=False):
        first = same.iloc[0]
        falls = f"{same['contracts'].sum():d} of {len(same)}"
        table.append(
            {
                "model": setting_name(first),
                "seeds": len(same),
                "parameters": first["parameters"],
                "tokens read (M)": f"{same['tokens_read'].mean() / 1e6:.2f}",
                "depth 0": spread(same["first"]),
                "depth 1": spread(same["second"]),
                "depth D−1": spread(same["last"]),
                "depth D": spread(same["beyond"]),
                "depth T−1": spread(same["generating"]) if first["stateful"] else MISSING,
                "nats/character": spread(same["generating"] / same["characters_per_token"]),
                "KL falls": falls if first["stateful"] else MISSING,
            }
        )
    yield _laid_out(table, "github")


def _contest_tables(contests: Models) -> Iterator[str]:
    """A table for each question, ready for a README."""
    if contests.rows.empty:
        return
    contests = at_best_rates(contests)
    accuracy = at_full_depth(contests)
    rows = contests.rows.sort_values("target", key=lambda name: name != "state", kind="stable")
    for _, group in rows.groupby(QUESTION, sort=False):
        one = group.iloc[0]
        last, most = one["trained_level"], one["tested_level"]
        levels = sorted({max(1, last // 2), last, (last + most) // 2, most})
        table = [
            {
                "contestant": setting_name(same.iloc[0]),
                "rates": " / ".join(f"{same[name].iloc[0]:g}" for name in RATES if name in same),
                "seeds": len(same),
                **{f"level {n}": spread(accuracy.loc[same.index, n], ".2f") for n in levels},
                "solved to level": ", ".join(map(str, same["solved_level"])),
                "layer passes": f"{same['layer_passes'].mean():.0f}",
                "s": f"{same['seconds'].mean():.0f}",
            }
            for _, same in group.groupby("group", sort=False)
        ]
        yield (
            f"{one['task']}, target {one['target']}: accuracy at full depth, trained to level"
            f" {last}, chance {one['chance']:.2f}\n\n{_laid_out(table, 'github')}"
        )


def spread(values: pd.Series, form: str = ".4f") -> str:
    """`3.412 ± 0.004`: mean and standard deviation; a single value stands alone."""
    values = values.dropna().astype(float)
    if values.empty:
        return MISSING
    return f"{values.mean():{form}}" + (f" ± {values.std():{form}}" if len(values) > 1 else "")


def csv_tables(runs: Runs) -> Iterator[tuple[str, str, str]]:
    """(title, ending, CSV) for each kind there is: every recorded column, in full precision."""
    if len(runs.runs):
        title = "A row per run and prompt, and one over all prompts of each run"
        yield title, "_runs", _csv(_run_rows(runs))
    if len(runs.models.rows):
        wide = runs.models.curves.pivot(index="model", columns="depth", values=["nll", "kl"])
        wide.columns = wide.columns.map("{0[0]}_{0[1]}".format)
        rows = runs.models.rows.join(wide.dropna(axis=1, how="all"))
        yield "A row per model: trainings", "_trainings", _csv(rows)
    if len(runs.contests.rows):
        rows = runs.contests.rows.join(at_full_depth(runs.contests).add_prefix("level_"))
        yield "A row per model: contests", "_contests", _csv(rows)


def _csv(frame: pd.DataFrame) -> str:
    def safe(value: object) -> object:
        return printable(value, keep="\n\t") if isinstance(value, str) else value

    kept = frame.drop(columns=DERIVED, errors="ignore").rename(columns=printable)
    return kept.astype(object).map(safe).to_csv(index=False)


def _run_rows(runs: Runs) -> pd.DataFrame:
    frame = _prompts_and_overall(runs).drop(columns="tokens")
    overall = frame["prompt_id"] == ALL_PROMPTS
    frame["row"] = overall.map({True: "overall", False: "prompt"})
    frame["prompt_id"] = frame["prompt_id"].mask(overall)
    frame[COUNTS] = frame[COUNTS].convert_dtypes()  # 58, not 58.0
    about = runs.runs.drop(columns=frame.columns, errors="ignore")
    full = about.join(frame.set_index("run"), how="right")
    first = ["run_id", "study", "commit", "dirty", "kind", "strength", "label", "row", "prompt_id"]
    return full[[*first, *(name for name in full if name not in first)]]


def _laid_out(rows: Sequence[Mapping[str, object]], form: str = "simple") -> str:
    align = ["left" if form == "github" or name in LEFT_ALIGNED else "right" for name in rows[0]]
    text = tabulate(rows, headers="keys", tablefmt=form, colalign=align, disable_numparse=True)
    return str(text)


def _count(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.1f}".removesuffix(".0")  # a mean


def _fixed(value: float, digits: int, *, sign: str = "") -> str:
    if pd.isna(value):
        return MISSING
    small = 0 < abs(value) < 0.5 * 10**-digits
    shown = f"{value:{sign}.0e}" if small else f"{value:{sign}.{digits}f}"
    return shown.replace("-", "−")
