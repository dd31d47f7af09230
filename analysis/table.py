"""Saved runs as a table: a row per run and prompt, and one over all prompts of each run.

Fixed-width text to read, CSV with every recorded column to compute with. Draws nothing.
"""

from __future__ import annotations

import math

import pandas as pd

from analysis.runs import Runs
from analysis.saved import ALL_PROMPTS, COUNTS
from analysis.series import Series, number, series_of, variants_of

MISSING = "–"
HEADINGS = (
    "strength",
    "prompt",
    "tokens",
    "outcome",
    "iterations",
    "rate",
    "lyapunov",
    "nll",
    "Δnll",
    "effect",
)
LEFT_ALIGNED = frozenset({"prompt", "outcome"})
LONGEST_NAME = 24
LEGEND = (
    "iterations: until settled to the reporting tolerance; rate: contraction per pass; lyapunov: "
    "growth per token;\nnll: nats/token; Δnll: to the plain model; effect: KL to the plain model, "
    "nats; –: missing or not reached"
)


def text_table(runs: Runs) -> str:
    """Sorted by study, kind and strength; each group of runs that share the rest has a heading."""
    blocks: list[tuple[str, list[tuple[str, ...]]]] = []
    prompts = _single_prompts(runs)
    for heading, group in _groups(runs):
        rows: list[tuple[str, ...]] = []
        for one in group:
            frame = prompts[prompts["run"] == one.run]
            rows.extend(_cells(one, str(row["prompt_id"]), row) for _, row in frame.iterrows())
            overall = runs.overall[runs.overall["run"] == one.run]
            rows.extend(_cells(one, "overall", row) for _, row in overall.iterrows())
        blocks.append((heading, rows))
    everything = [HEADINGS, *(row for _, rows in blocks for row in rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(HEADINGS))]
    lines: list[str] = []
    for heading, rows in blocks:
        lines += [heading, _line(HEADINGS, widths), "  ".join("─" * width for width in widths)]
        lines += [*(_line(row, widths) for row in rows), ""]
    return "\n".join([*lines, LEGEND])


def csv_table(runs: Runs) -> str:
    """Every column of every run and prompt, in full precision, with where it came from."""
    labels = {one.run: one.label for one in series_of(runs)}
    prompts = _single_prompts(runs).assign(row="prompt")
    overall = runs.overall.assign(row="overall")
    frame = pd.concat([prompts, overall.dropna(axis="columns", how="all")], ignore_index=True)
    frame = frame.assign(order=frame["row"].eq("overall"))
    frame = frame.sort_values(["run", "order"], kind="stable").drop(columns="order")
    for name in COUNTS:
        frame[name] = _whole(frame[name])
    about = runs.runs.rename(columns={"iterations": "iterations_allowed"})
    about.insert(0, "label", pd.Series(labels))
    frame = frame.rename(columns={name: f"{name}_recorded" for name in frame if name in about})
    full = about.join(frame.set_index("run"), how="right")
    first = ["run_id", "study", "commit", "dirty", "kind", "strength", "label", "row", "prompt_id"]
    return full[[*first, *(name for name in full if name not in first)]].to_csv(index=False)


def _single_prompts(runs: Runs) -> pd.DataFrame:
    """Without the stand-in for all prompts: the row over all prompts says the same."""
    return runs.summaries[runs.summaries["prompt_id"] != ALL_PROMPTS]


def _groups(runs: Runs) -> list[tuple[str, tuple[Series, ...]]]:
    groups = []
    for group in variants_of(series_of(runs)).values():
        row = runs.runs.loc[group[0].run]
        parts = [f"study {row['study']}", group[0].kind]
        named = {f"study {row['study']}", group[0].kind, "no feedback"}
        parts += [part for part in group[0].variant.split(", ") if part and part not in named]
        groups.append((str(row["study"]), group[0].kind, " · ".join(parts), group))
    return [(heading, group) for *_, heading, group in sorted(groups, key=lambda one: one[:3])]


def _cells(one: Series, prompt: str, row: pd.Series) -> tuple[str, ...]:
    generated = row["generated_tokens"]
    tokens = row["prompt_tokens"] + (0.0 if pd.isna(generated) else generated)
    change = row["nll"] - row["nll_plain"]
    name = prompt if len(prompt) <= LONGEST_NAME else f"{prompt[: LONGEST_NAME - 1]}…"
    return (
        MISSING if one.strength is None else number(one.strength),
        name.replace("\n", "↵"),
        _count(tokens),
        row["outcome"] if isinstance(row["outcome"], str) else MISSING,
        _count(row["iterations_to_tolerance"]),
        _fixed(row["rate"], 3),
        _fixed(row["lyapunov"], 3, signed=True),
        _fixed(row["nll"], 4),
        _fixed(change, 4, signed=True),
        _fixed(row["kl_effect"], 4),
    )


def _count(value: float) -> str:
    if pd.isna(value):
        return MISSING
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"  # a mean over prompts


def _fixed(value: float, digits: int, *, signed: bool = False) -> str:
    if pd.isna(value):
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:{'+' if signed else ''}.0e}".replace("-", "−")
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(
        cell.ljust(width) if heading in LEFT_ALIGNED else cell.rjust(width)
        for cell, width, heading in zip(cells, widths, HEADINGS, strict=True)
    ).rstrip()


def _whole(column: pd.Series) -> pd.Series:
    """58, not 58.0, where every value is whole."""
    said = column.dropna()
    return column.astype("Int64") if (said % 1 == 0).all() else column
