"""What a figure shows, told by its axes, texts and marks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyarrow import Table

from analysis import load
from analysis.draw.recurrence import recurrence
from analysis.draw.settling import settling
from analysis.draw.strength import headline, regimes
from analysis.draw.style import CHANGE, NotDrawn, drawable
from analysis.draw.tokens import generation, tokens
from analysis.page.build import build
from analysis.read.saved import SavedRun
from analysis.table import text_tables
from analysis.text import visible

MakeRun = Callable[..., Path]
STRENGTHS = (-1.0, -0.5, -0.25, -0.2, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0)  # one more than README's
ONE = {"p": "one two three four five six seven eight"}


@pytest.fixture
def ten(make_run: MakeRun, tmp_path: Path) -> Path:
    for strength in STRENGTHS:
        make_run(tmp_path / "s" / f"r{strength}", prompts=ONE, feedback__strength=strength)
    return tmp_path / "s"


def drawn(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def test_white_space_is_drawn_as_a_sign_or_by_its_own_number() -> None:
    assert drawable(visible(" \n\t\r\u00a0")) == "␣↵⇥⟨D⟩⍽"


def test_every_strength_is_named_and_no_name_touches_another(ten: Path) -> None:
    figure = regimes(load(str(ten)))
    canvas = drawn(figure)
    for axes in figure.axes[:2]:
        names = [label for label in axes.get_xticklabels() if label.get_text()]
        shown = sorted(float(name.get_text().strip().replace("−", "-")) for name in names)
        assert shown == list(STRENGTHS)
        boxes = [name.get_window_extent(canvas.get_renderer()) for name in names]
        for place, box in enumerate(boxes):  # a name of a lower row begins with empty lines
            rows = [name.get_text().count("\n") for name in names]
            same = [other for n, other in enumerate(boxes) if rows[n] == rows[place]]
            assert sum(box.x0 < other.x1 and other.x0 < box.x1 for other in same) == 1


def test_long_names_of_many_strengths_do_not_touch(make_run: MakeRun, tmp_path: Path) -> None:
    for eighths in range(-12, 13):
        strength = eighths / 8
        make_run(tmp_path / "s" / f"r{strength}", prompts=ONE, feedback__strength=strength)
    figure = headline(load(str(tmp_path / "s")))
    renderer = drawn(figure).get_renderer()
    names = [name for name in figure.axes[1].get_xticklabels() if name.get_text()]
    assert len(names) > 9
    for row in range(3):
        same = [name for name in names if name.get_text().count("\n") == row]
        boxes = sorted((name.get_window_extent(renderer) for name in same), key=lambda box: box.x0)
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_a_measure_that_no_run_recorded_has_no_panel(ten: Path) -> None:
    runs = load(str(ten))
    assert len(regimes(runs).axes) == 3
    runs.prompts["lyapunov"] = float("nan")
    figure = regimes(runs)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Contraction rate (per pass)",
        "Passes needed",
    ]
    assert "Exponent" not in figure.get_supxlabel()
    runs.iterations["oracle_error_max"] = float("nan")  # no error to predict from
    assert len(regimes(runs).axes) == 1


def test_a_title_counts_the_cases_that_have_an_exponent(ten: Path) -> None:
    runs = load(str(ten))
    title = " ".join(regimes(runs).get_suptitle().split())
    assert title.startswith("Small changes grow along the text in 5 of 10 cases, at strengths −1, ")
    runs.prompts["lyapunov"] = runs.prompts["lyapunov"].where(runs.prompts["lyapunov"] < 0)
    title = " ".join(regimes(runs).get_suptitle().split())
    assert title == "Small changes die out along the text in 5 of 5 cases"


@pytest.mark.parametrize(("grown", "recorded"), [(0, 0), (2, 2), (0, "many"), (0, [2, 3])])
def test_of_a_text_that_grew_a_lower_loss_is_said_to_be_favoured(
    make_run: MakeRun, tmp_path: Path, grown: int, recorded: object
) -> None:
    for strength in (0.5, 1.0):
        changes = {"feedback__strength": strength, "generation__max_new_tokens": recorded}
        make_run(tmp_path / "s" / f"r{strength}", prompts=ONE, steps=grown, **changes)
    runs = load(str(tmp_path / "s"))
    for said in (headline(runs).get_supxlabel(), text_tables(runs), build(runs)):
        favoured = "A text that grew was written with the feedback" in " ".join(said.split())
        assert favoured == bool(grown)


def test_a_title_with_the_name_of_a_text_in_capitals_ends_within_the_figure(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "r", prompts={"W" * 30: "one two three"}, feedback__strength=0.5)
    figure = tokens(load(str(tmp_path)))
    drawn(figure)
    assert max(text.get_window_extent().x1 for text in figure.texts) <= figure.bbox.x1


def test_what_is_expected_less_is_warm_and_what_is_expected_more_blue_as_on_the_page() -> None:
    (red, _, blue, _), (less_red, _, more_blue, _) = CHANGE(0.0), CHANGE(1.0)
    assert red > blue
    assert less_red < more_blue


def test_a_caption_counts_the_texts_of_a_run_not_those_of_all_runs(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for name in ("prose", "code"):
        texts = {f"{name}{n}": ONE["p"] for n in range(5)}
        for strength in (0.1, 0.5):
            changes = {"prompts__file": name, "feedback__strength": strength}
            make_run(tmp_path / "s" / f"{name}{strength}", prompts=texts, **changes)
    for draw in (headline, settling, regimes):
        caption = " ".join(draw(load(str(tmp_path / "s"))).get_supxlabel().split())
        assert "the range over 5 texts" in caption


def test_figures_of_the_same_runs_read_every_trajectory_once(study: Path) -> None:
    runs, read = load(str(study)), list[str]()

    def counted(one: SavedRun) -> Table:
        read.append(one.run_id)
        return one.trajectory()

    saved = {run: replace(one, trajectory=partial(counted, one)) for run, one in runs.saved.items()}
    runs = replace(runs, saved=saved)
    headline(runs)
    tokens(runs)
    assert sorted(read) == sorted(runs.run_ids)


def test_the_title_counts_only_what_is_fed_back(make_run: MakeRun, tmp_path: Path) -> None:
    for strength in (0.0, 0.5, 1.0):
        changes = {"feedback__strength": strength, "recompute__iterations": 2}
        make_run(tmp_path / f"r{strength:g}", **changes)
    title = " ".join(headline(load(str(tmp_path))).get_suptitle().split())
    assert title == "What the strength of the feedback does: no text settles to 0.001 nats"


def test_what_was_not_reached_stands_at_the_passes_allowed_not_at_those_of_all_steps(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (0.1, 2.0):
        run = make_run(
            tmp_path / "s" / f"r{strength}",
            prompts=ONE,
            steps=2,
            feedback__strength=strength,
            recompute__iterations=3,
        )
        path = run / "summary.json"
        path.write_text(path.read_text().replace('"iterations": 3', '"iterations": 9'))
    runs = load(str(tmp_path / "s"))
    assert runs.prompts["iterations_to_tolerance"].isna().all()
    marks = [line for line in headline(runs).axes[0].lines if line.get_marker() == "^"]
    assert [list(line.get_ydata()) for line in marks] == [[3], [3]]


def test_what_has_no_change_of_the_loss_is_not_said_to_be_hollow(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (0.5, 9.0):
        run = make_run(tmp_path / f"r{strength:g}", prompts=ONE, feedback__strength=strength)
    rows = pd.read_parquet(run / "trajectory.parquet")
    rows["log_prob"] = rows["log_prob"].mask(rows["iteration"] > 1)  # it diverged
    rows.to_parquet(run / "trajectory.parquet")
    captions = []
    for nll in (3.0, None):  # as one that kept its mean alone, and as recorded
        summary = json.loads((run / "summary.json").read_text())
        summary["prompts"][0]["nll"] = nll
        (run / "summary.json").write_text(json.dumps(summary))
        captions.append(headline(load(str(tmp_path))).get_supxlabel())
    assert ["hollow" in caption for caption in captions] == [True, False]


def test_tokens_are_shown_of_the_kind_of_run_that_changes_most(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for kind in ("log_prob", "prob"):  # the toy's prob pulls less
        for strength in (-1.0, 1.0):
            changes = {"feedback__kind": kind, "feedback__strength": strength}
            make_run(tmp_path / "s" / f"{kind}{strength}", prompts=ONE, **changes)
    assert "(log_prob)" in tokens(load(str(tmp_path / "s"))).get_supxlabel()
    for strength in (-1.0, 1.0):
        changes = {"feedback__kind": "zeta", "feedback__strength": 2 * strength}
        make_run(tmp_path / "s" / f"z{strength}", prompts=ONE, **changes)
    assert "(zeta)" in tokens(load(str(tmp_path / "s"))).get_supxlabel()


def test_names_of_curves_that_end_together_stay_within_their_panel(
    make_run: MakeRun, tmp_path: Path
) -> None:
    short = {"p": "one two three"}
    for strength in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        make_run(tmp_path / "s" / f"r{strength}", prompts=short, feedback__strength=strength)
    figure = settling(load(str(tmp_path / "s")))
    canvas = drawn(figure)
    (axes,) = figure.axes
    names = [text for text in axes.texts if text.get_text().startswith("β")]
    assert len(names) == 6
    for name in names:
        assert name.get_window_extent(canvas.get_renderer()).y0 >= axes.bbox.y0


def test_runs_of_several_precisions_end_each_in_its_own_rounding(
    make_run: MakeRun, tmp_path: Path
) -> None:
    digits = {"bfloat16": 7, "float32": 23, "float64": 52}  # binary ones, behind the point
    for dtype in digits:
        changes = {"feedback__strength": 0.5, "device__dtype": dtype}
        make_run(tmp_path / "s" / dtype, prompts=ONE, **changes)
    figure = settling(load(str(tmp_path / "s")))
    for axes, dtype in zip(figure.axes, digits, strict=True):
        assert dtype in axes.get_title("left")
        rounding, shown = 160 * 2.0 ** -digits[dtype], axes.lines[0].get_ydata()
        assert axes.patches[0].get_y() + axes.patches[0].get_height() == pytest.approx(rounding)
        assert shown[-1] <= rounding < shown[-2]


@pytest.mark.parametrize(("steps", "of"), [(0, ""), (2, " of the last step")])
def test_what_is_exact_after_one_pass_is_said_to_be(
    make_run: MakeRun, tmp_path: Path, steps: int, of: str
) -> None:
    changes = {"feedback__strength": 1e-8, "device__dtype": "float32"}
    changes |= {"generation__max_new_tokens": steps}
    make_run(tmp_path / "r", prompts=ONE, steps=steps, **changes)
    figure = settling(load(str(tmp_path)))
    title = " ".join(figure.get_suptitle().split())
    assert title == f"The text is exact but for rounding after 1 pass{of}"
    assert figure.axes[0].get_xlim() == (0.5, 2.5)


def test_where_some_runs_have_no_exact_solution_all_are_drawn_by_their_steps(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength, lost in ((0.5, ()), (1.0, ("oracle_error_max",))):
        place = tmp_path / "s" / f"r{strength}"
        make_run(place, prompts=ONE, drop_measures=lost, feedback__strength=strength)
    figure = settling(load(str(tmp_path / "s")))
    assert figure.axes[0].get_ylabel().startswith("Largest change since")
    assert "exact" not in str(figure.get_suptitle())
    assert len(figure.axes[0].lines) == 2


def test_a_run_that_nothing_was_measured_of_takes_no_curve_from_the_others(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (0.5, 1.0, 9.0):
        run = make_run(
            tmp_path / f"r{strength:g}",
            prompts=ONE,
            drop_measures=("oracle_error_max",),
            feedback__strength=strength,
        )
    measures = pd.read_parquet(run / "iterations.parquet")
    measures.assign(step_max=np.nan).to_parquet(run / "iterations.parquet")  # it diverged
    figure = settling(load(str(tmp_path)))
    assert len(figure.axes[0].lines) == 2
    assert "No error or step was recorded of β = 9." in " ".join(figure.get_supxlabel().split())


def test_why_hidden_states_beside_no_estimates_are_not_drawn_is_true(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(tmp_path / "r", prompts=ONE, feedback__strength=0.0, feedback__hidden_strength=1.0)
    with pytest.raises(NotDrawn, match="no run of another strength than 0 recorded an error"):
        settling(load(str(tmp_path)))


def test_the_text_before_is_that_of_the_same_seed(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        for strength in (0.0, 0.5 + seed):  # of the second seed more changes
            text = {"p": f"a b c d e f g seed{seed}"}
            changes = {"feedback__strength": strength, "generation__seed": seed}
            make_run(tmp_path / "s" / f"r{seed}_{strength}", prompts=text, **changes)
    figure = tokens(load(str(tmp_path / "s")))
    before, after = ([text.get_text() for text in axes.texts] for axes in figure.axes[1:3])
    assert before == after
    assert before[-1].strip() == "seed1"


def test_a_text_that_the_plain_run_did_not_read_is_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "s" / "plain", prompts={"other": "one two"}, feedback__strength=0.0)
    for strength in (0.5, 1.0):
        make_run(tmp_path / "s" / f"r{strength}", prompts=ONE, feedback__strength=strength)
    before, after = tokens(load(str(tmp_path / "s"))).axes[1:3]
    for axes in (before, after):
        assert "".join(text.get_text() for text in axes.texts) == ONE["p"]


def test_a_caption_says_that_tokens_which_some_runs_wrote_otherwise_are_left_out(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for name, end in (("same", "four"), ("other", "five")):
        for strength, text in ((0.5, "one two three four"), (1.0, f"one two three {end}")):
            folder = tmp_path / name / f"r{strength}"
            make_run(folder, prompts={"p": text}, steps=1, feedback__strength=strength)
            summary = json.loads((folder / "summary.json").read_text())
            summary["prompts"][0]["text"] = "one two three"
            (folder / "summary.json").write_text(json.dumps(summary))
        figure = tokens(load(str(tmp_path / name)))
        read = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert read == ["␣two", "␣three", "␣four"][: 3 if name == "same" else 2]
        caption = " ".join(figure.get_supxlabel().split())
        assert ("where all runs read the same token" in caption) == (name == "other")


def test_texts_of_one_name_without_a_token_in_common_are_not_drawn(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength, text in ((0.5, "one two three"), (1.0, "one five six")):  # all but "one" is new
        folder = tmp_path / "s" / f"r{strength}"
        make_run(folder, prompts={"p": text}, steps=2, feedback__strength=strength)
        summary = json.loads((folder / "summary.json").read_text())
        summary["prompts"][0]["text"] = "one"
        (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(NotDrawn, match="no token in common"):
        tokens(load(str(tmp_path / "s")))


def test_a_range_is_that_of_the_texts_whatever_the_seeds(make_run: MakeRun, tmp_path: Path) -> None:
    texts = {f"t{n}": ONE["p"] for n in range(3)}
    for strength in (0.1, 0.5):
        for seed in range(4):
            run = make_run(
                tmp_path / "s" / f"r{strength}_{seed}",
                prompts=texts,
                feedback__strength=strength,
                seed=seed,
            )
            path = run / "summary.json"
            text = path.read_text().replace('"rate": 0.31', f'"rate": 0.{seed + 1}', 1)
            path.write_text(text)
    figure = regimes(load(str(tmp_path / "s")))
    assert "the range over 3 texts" in " ".join(figure.get_supxlabel().split())
    (bar, _) = figure.axes[0].collections
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([0.1, 0.4])


def test_a_caption_says_that_not_every_strength_has_a_line(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for number in range(1, 8):
        make_run(tmp_path / "s" / f"r{number}", prompts=ONE, feedback__strength=number / 8)
    runs = load(str(tmp_path / "s"))
    figure = settling(runs)
    assert len(figure.axes[0].lines) == 6
    assert "Of 7 strengths, 6." in " ".join(figure.get_supxlabel().split())
    few = settling(runs.where(runs.runs.index[:6]))
    assert "strengths" not in few.get_supxlabel()


def test_grown_texts_mark_every_step_or_every_second(make_run: MakeRun, tmp_path: Path) -> None:
    for steps, marked in ((8, range(9)), (9, range(0, 10, 2))):
        text = {"p": " ".join("abcdefghijkl")}
        make_run(tmp_path / f"{steps}", prompts=text, steps=steps, feedback__strength=0.5)
        figure = generation(load(str(tmp_path / f"{steps}")))
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert names == [str(step) for step in marked]
        assert "not yet written, or dropped" in " ".join(figure.get_supxlabel().split())


def test_a_side_of_zero_that_was_not_run_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    for kind, strength in (("log_prob", -0.5), ("log_prob", 0.5), ("prob", 0.5)):
        changes = {"feedback__kind": kind, "feedback__strength": strength}
        make_run(tmp_path / "s" / f"{kind}{strength}", prompts=ONE, **changes)
    panels = settling(load(str(tmp_path / "s"))).axes
    said = ["no such strength" in [text.get_text() for text in axes.texts] for axes in panels]
    assert said == [False, False, True, False]


def test_a_run_that_diverged_has_no_loss_by_depth_and_a_narrow_axis_has_numbers(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (1.0, 2.0):
        changes = {"feedback__kind": "hidden_state", "feedback__strength": strength}
        run = make_run(tmp_path / f"r{strength:g}", recompute__iterations=5, **changes)
        measures = pd.read_parquet(run / "iterations.parquet")
        measures["kl_step"] = np.where(measures["iteration"] > 1, 1.0 + measures["iteration"], None)
        if strength == 2.0:
            measures = measures[measures["iteration"] <= 2]
            measures.loc[measures["iteration"] == 2, ["nll", "kl_step"]] = np.nan
        measures.to_parquet(run / "iterations.parquet")
    loss, movement = recurrence(load(str(tmp_path))).axes
    settled, diverged = loss.lines[:2]
    assert np.isfinite(settled.get_ydata()).all()
    assert np.isfinite(diverged.get_ydata()).tolist()[:2] == [True, False]
    low, high = movement.get_ylim()
    assert sum(low <= tick <= high for tick in movement.get_yticks()) >= 2


def test_every_depth_that_was_read_is_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "s", feedback__kind="hidden_state", recompute__iterations=40)
    for axes, last in zip(recurrence(load(str(tmp_path / "s"))).axes, (39, 38), strict=True):
        assert max(axes.lines[0].get_xdata()) == last
        assert axes.get_xlim()[1] > 39


def test_no_name_lies_on_a_curve(make_run: MakeRun, tmp_path: Path) -> None:
    for shift in (0, 1):
        for strength in (1.0, 2.0, 3.0):
            changes = {"kind": "hidden_state", "strength": strength, "shift": shift}
            feedback = {f"feedback__{name}": value for name, value in changes.items()}
            make_run(tmp_path / f"r{shift}{strength}", recompute__iterations=5, **feedback)
    figure = recurrence(load(str(tmp_path)))
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    (names,) = [legend.get_window_extent() for legend in legends if legend]
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 6
    assert not any(names.overlaps(axes.bbox) for axes in figure.axes)


def test_names_of_any_length_leave_the_panels_their_room(make_run: MakeRun, tmp_path: Path) -> None:
    for number in range(7):
        path = f"/home/somebody/models/{'fine_tuned_with_feedback_' * 4}/{number}"
        changes = {"feedback__kind": "hidden_state", "model__path": path}
        make_run(tmp_path / str(number), recompute__iterations=5, feedback__strength=1.0, **changes)
    figure = recurrence(load(str(tmp_path)))
    figure.draw_without_rendering()
    assert min(axes.bbox.width for axes in figure.axes) > 2.0 * figure.dpi  # inches
    assert figure.axes[-1].get_legend().get_window_extent().x1 <= figure.bbox.x1


def test_tokens_of_carried_estimates_are_not_drawn_by_those_of_the_plain_model_alone(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (0.0, 0.5):
        changes = {"recompute__start": "carried", "feedback__strength": strength}
        make_run(tmp_path / f"{strength}", prompts=ONE, steps=1, **changes)
    figure = tokens(load(str(tmp_path)))
    assert figure.axes[0].get_yticklabels()[0].get_text() == "pass 2"
    assert figure.axes[2].get_title(loc="left") == "After: β = 0.5"
