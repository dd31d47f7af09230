"""How each token's estimate changes while the text grows, from one generation step to the next."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from analysis.figures.drawing import Drawing, Skipped, file_name
from analysis.figures.style import ABOVE_ZERO, ABSENT, BELOW_ZERO, count_ticks, sheet
from analysis.figures.text import prompt_name
from analysis.figures.tokens import (
    COLOUR_LABEL,
    MOST_TOKENS,
    ROW,
    colour_bar,
    estimate_image,
    token_labels,
    token_rows,
)
from analysis.runs import Runs
from analysis.series import Series

# light for no change, so that changes stand out: blue less expected, warm more expected
CHANGE = LinearSegmentedColormap.from_list(
    "change", [BELOW_ZERO(0.1), BELOW_ZERO(0.6), "#f7f7f7", ABOVE_ZERO(0.75), ABOVE_ZERO(0.2)]
)


def generation(runs: Runs, one: Series, prompt_id: str, *, among: int) -> Drawing | Skipped:
    """Token by generation step: the last pass's estimate, and its change since the first one."""
    name = file_name("generation", prompt_id, runs.prompt_ids)
    steps, positions, tokens, values = _by_step(runs, one.run, prompt_id)
    if len(steps) < 2:
        return Skipped(name, f"{prompt_id}, {one.label} generated nothing")
    dropped = max(len(positions) - MOST_TOKENS, 0)  # the last tokens are the generated ones
    positions, tokens, values = positions[dropped:], tokens[dropped:], values[dropped:]
    name_of_run = f"{prompt_name(prompt_id)}, {one.label}"
    title = f"How each token's estimate changes as the text grows: {name_of_run}"
    notes = [
        "Each row is a token, each column a generation step. Left: the estimate after the step's "
        "last pass. Right: its change since the token's first estimate (warm: more expected than "
        "then, blue: less). Grey: not in the text at that step.",
    ]
    if dropped:
        notes.append(f"The last {len(positions)} of {len(positions) + dropped} tokens.")
    if among > 1:
        notes.append(f"Of {among} runs, the one that moves most; --run chooses another.")
    figure, grid = sheet(
        title=title,
        caption=" ".join(notes),
        width=12.0,
        height=max(2.2 + ROW * len(positions), 3.2),
        columns=2,
    )
    first = int(steps[0])
    image = estimate_image(grid[0, 0], values, first=first)
    token_rows(grid[0, 0], token_labels(tokens, positions))
    colour_bar(figure, grid[0, 0], image, values, COLOUR_LABEL)

    change = values - _first_estimates(values)[:, None]
    widest = max(float(np.nanmax(np.abs(change))), 1e-6)
    axes = grid[0, 1]
    axes.grid(False)
    axes.set_facecolor(ABSENT)
    changed = axes.imshow(
        np.ma.masked_invalid(change),
        aspect="auto",
        interpolation="nearest",
        cmap=CHANGE,
        vmin=-widest,
        vmax=widest,
        extent=image.get_extent(),
    )
    axes.set_yticks([])
    colour_bar(figure, axes, changed, change, "Change since the first estimate (nats)")
    for axes in grid[0]:
        axes.set_xlabel("Generation step (tokens generated so far)")
        axes.set_xticks(count_ticks(first, int(steps[-1]), most=10))
    return Drawing(name, title, figure, (one.run_id,))


def _by_step(
    runs: Runs, run: int, prompt_id: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    """Steps (S,), positions (T,), tokens, and the last pass's log-probs (T, S)."""
    columns = ("step", "iteration", "position", "token", "log_prob")
    rows = runs.trajectory(run, prompt_id, columns=columns)
    final = rows[rows["iteration"] == rows.groupby("step")["iteration"].transform("max")]
    first = int(final["step"].min()) if len(final) else 0
    last = int(final["step"].max()) if len(final) else 0
    steps = np.arange(first, last + 1)  # a step that was not recorded stays a grey column
    positions, one_row, row = np.unique(
        final["position"].to_numpy(), return_index=True, return_inverse=True
    )
    values = np.full((len(positions), len(steps)), np.nan)
    values[row, final["step"].to_numpy() - first] = final["log_prob"].to_numpy()
    tokens = tuple(str(token) for token in final["token"].iloc[one_row])
    return steps, positions, tokens, values


def _first_estimates(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    first = np.argmax(finite, axis=1)
    return values[np.arange(len(values)), first]
