"""The command line: what it writes, what it says, and what it must never import."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import load
from analysis.__main__ import main
from analysis.draw.figures import FIGURES
from analysis.draw.settling import settling
from analysis.draw.strength import headline
from analysis.draw.style import rendered
from analysis.read import run_folder

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
ONE = {"p": "one two three four five six"}
STUDY_FIGURES = {"headline", "settling", "regimes", "tokens"}


def draw(*arguments: str | Path) -> int:
    """The figures command, where any warning is an error: a missing glyph warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return main(["figures", *map(str, arguments)])


def stems(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()}
    pictures = {name.removesuffix(".png") for name in names if name.endswith(".png")}
    assert names == {f"{name}{end}" for name in pictures for end in (".png", ".svg")}
    return pictures


def test_neither_torch_nor_pyplot_is_ever_imported(study: Path, tmp_path: Path) -> None:
    script = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('analysis', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "never = ('torch', 'stateful_gpt', 'wandb', 'matplotlib.pyplot')\n"
        "print([name for name in sys.modules if name.startswith(never)])\n"
    )
    words = ["figures", str(study / "run_0p5"), "--prompt", "list", "--out", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "module://nobody_has_this.backend"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.splitlines()[-1] == "[]"
    assert str(tmp_path / "settling.png") in ran.stdout


@pytest.fixture(scope="module")
def drawn(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The figures of one prompt, drawn from a relative path as a user would."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.parent)
        assert draw(study.name, "--prompt", "list", "--out", folder) == 0
    return folder


def test_a_study_gives_every_figure_as_png_and_svg(drawn: Path) -> None:
    assert stems(drawn) == STUDY_FIGURES


def test_the_same_runs_give_the_same_png_and_svg_bytes(
    study: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    assert draw(study.name, "--prompt", "list", "--out", tmp_path) == 0
    for path in sorted(drawn.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_every_figure_names_its_runs_and_the_command_that_redraws_it(
    study: Path, drawn: Path
) -> None:
    command = f"python -m analysis figures {study.name} --prompt list --out figures"
    for path in drawn.glob("*.png"):
        with Image.open(path) as picture:
            text = picture.text
        assert command in text["Comment"]
        assert "run_2" in text["Description"]
        assert round(picture.info["dpi"][0]) == 150
        svg = path.with_suffix(".svg").read_text(encoding="utf-8")
        assert command in svg
        assert "run_2" in svg
        assert str(study.parent) not in "".join(text.values()) + svg


def test_a_single_run_gives_its_own_figures_and_says_what_it_cannot(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(study, "--run", "run_0p5", "--prompt", "list", "--out", tmp_path) == 0
    assert stems(tmp_path) == {"settling", "tokens"}
    said = capsys.readouterr()
    assert said.err.count("\n") == 2
    assert "Not drawn: headline: it needs two runs" in said.err
    assert set(said.out.split()) == {str(path) for path in tmp_path.iterdir()}


def test_generation_runs_get_a_generation_figure(make_run: MakeRun, tmp_path: Path) -> None:
    text = {"p/1": "one two three four five six seven eight"}
    make_run(tmp_path / "runs" / "a", prompts=text, steps=3, feedback__strength=0.5)
    assert draw(tmp_path / "runs", "--out", tmp_path / "out") == 0
    assert "generation" in stems(tmp_path / "out")


def test_odd_tokens_names_and_values_are_drawn_without_a_warning(
    make_run: MakeRun, tmp_path: Path
) -> None:
    odd = (
        "$x$ \\frac{a \x00 \x1b[31m \u200d 🦑 漢字 \ufffd \\xe2\\x82 e\u0301 \u202e a_very_"
        + "long" * 30
    )
    run = make_run(
        tmp_path / "runs" / "a",
        study="$β 漢🦑",
        prompts={"🦑 $p$": odd},
        feedback__strength=0.5,
        drop_measures=("settled_prefix",),
    )
    make_run(tmp_path / "runs" / "b", study="other", prompts={"🦑 $p$": odd})
    frame = pd.read_parquet(run / "iterations.parquet")
    frame.loc[5:, ["step_max", "oracle_error_max"]] = float("inf")
    frame.to_parquet(run / "iterations.parquet")
    frame = pd.read_parquet(run / "trajectory.parquet")
    frame.loc[frame["iteration"] > 5, "log_prob"] = float("nan")
    frame.to_parquet(run / "trajectory.parquet")
    assert draw(tmp_path / "runs", "--out", tmp_path / "out") == 0
    assert {"settling", "tokens"} <= stems(tmp_path / "out")


def test_a_study_whose_values_are_missing_is_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    for strength in (0.5, 1.0):
        run = make_run(tmp_path / "runs" / f"{strength}", prompts=ONE, feedback__strength=strength)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        lost = {"iterations_to_tolerance": None, "kl_effect": None, "rate": None}
        summary["prompts"][0] |= lost | ({"nll": float("inf")} if strength == 1.0 else {})
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    figure = headline(load(str(tmp_path / "runs")))
    assert "no text settles to 0.001 nats" in " ".join(figure.get_suptitle().split())


def test_the_headline_says_what_the_runs_needed_and_what_is_guaranteed(study: Path) -> None:
    runs = load(str(study))
    title = headline(runs.only(run_ids=[], prompt_ids=["list"])).get_suptitle()
    assert "22 are guaranteed" in " ".join(title.split()), "23 tokens"
    most = runs.prompts[runs.prompts["prompt_id"] == "list"]["iterations_to_tolerance"].max()
    assert f"within {most:.0f} passes" in " ".join(title.split())


def test_what_is_guaranteed_is_that_of_a_window_not_of_all_that_was_written(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength in (0.1, 0.2):
        run = make_run(tmp_path / "s" / f"r{strength}", prompts=ONE, feedback__strength=strength)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        summary["prompts"][0]["generated_tokens"] = 5  # beyond a window of six tokens
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    title = headline(load(str(tmp_path / "s"))).get_suptitle()
    assert "5 are guaranteed" in " ".join(title.split())


def test_a_readers_own_settings_of_matplotlib_change_no_figure(study: Path) -> None:
    runs = load(str(study)).only(run_ids=[], prompt_ids=["list"])
    chosen = [draw for draw, fits in FIGURES.values() if fits(runs)]
    before = [rendered(draw(runs), "png") for draw in chosen]
    odd = {"axes.facecolor": "red", "font.size": 20.0, "lines.linewidth": 9.0, "savefig.dpi": 30}
    with matplotlib.rc_context(odd):
        assert [rendered(draw(runs), "png") for draw in chosen] == before


def test_what_is_drawn_goes_to_a_folder_with_the_name_of_its_source_unless_another_is_given(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(study / "run_0p5")
    for words in ([run], [run, "--out", "elsewhere"], [run, "--out", "a/page.html"]):
        assert main(["page", *words]) == 0
    assert draw(run, "--prompt", "list") == 0
    for path in ("figures/run_0p5/study.html", "elsewhere/study.html", "a/page.html"):
        assert Path(path).is_file()
    assert Path("figures/run_0p5/settling.png").is_file()


def test_a_study_whose_name_has_a_dot_has_its_page_and_figures_in_one_folder(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "v1.5" / "a", feedback__strength=0.5)
    assert main(["page", "v1.5"]) == 0
    assert main(["figures", "v1.5"]) == 0
    assert Path("figures/v1.5/study.html").is_file()


def test_every_parquet_file_is_read_once(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[Path] = Counter()
    read = run_folder.parquet

    def counted(path: Path, **named: Any) -> Any:
        opened[path] += 1
        return read(path, **named)

    monkeypatch.setattr(run_folder, "parquet", counted)
    assert main(["page", str(study), "--prompt", "list", "--out", str(tmp_path / "p.html")]) == 0
    assert len(opened) == 2 * 6
    assert set(opened.values()) == {1}


def test_a_line_ends_where_it_meets_rounding(make_run: MakeRun, tmp_path: Path) -> None:
    figure = settling(load(str(make_run(tmp_path / "a", feedback__strength=0.5))))
    (line,) = [line for axes in figure.axes for line in axes.lines]
    shown = np.asarray(line.get_ydata())
    level = 16 * 2.0**-52 * 10.0  # float64
    assert (shown[:-1] > level).all()
    assert 0 < shown[-1] <= level, "and an exact 0 has its place"


def test_runs_left_out_are_named_in_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", prompts=ONE)
    make_run(tmp_path / "b", prompts=ONE, state="failed")
    assert main(["table", str(tmp_path)]) == 0
    left_out = "Left out 1 run that is not finished and whole: b (failed).\n"
    assert capsys.readouterr().err == left_out
    assert main(["table", str(tmp_path), "--run", "b"]) == 2
    assert capsys.readouterr().err == f"{left_out}There is no run b; there are: a.\n"


@pytest.mark.parametrize("command", ["figures", "table", "page"])
def test_a_bad_source_or_path_exits_2_with_one_sentence(
    study: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    target = ["--csv"] if command == "table" else ["--out"]
    run = str(study / "run_0p5")
    for arguments in (
        [str(tmp_path / "absent"), *target, str(tmp_path / "x")],
        [run, *target, str(tmp_path / "file" / "below")],
        [run, *target, str(tmp_path / ("long" * 100) / "below.html")],
        [run, *target, str(tmp_path / ("long" * 100))],
        [run, "--run", "nope", *target, str(tmp_path / "x")],
    ):
        assert main([command, *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "Traceback" not in said


def test_what_is_no_regular_file_is_never_replaced_and_a_link_is_followed(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, link, table = tmp_path / "pipe", tmp_path / "link.csv", tmp_path / "table.csv"
    os.mkfifo(pipe)
    run = str(study / "run_0p5")
    assert main(["table", run, "--csv", str(pipe)]) == 2
    assert capsys.readouterr().err.count("cannot be written: it is no regular file.\n") == 1
    assert pipe.is_fifo()
    link.symlink_to(table)
    assert main(["table", run, "--csv", str(link)]) == 0
    assert link.is_symlink()
    assert table.read_text(encoding="utf-8").startswith("run_id,")


def test_the_table_shows_missing_as_a_dash_and_is_sorted(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "study sweep · log_prob"
    assert "prompt" in lines[1].split()
    rows = [line.split() for line in lines[3 : 3 + 6 * 4]]
    strengths = [row[0] for row in rows]
    assert strengths == [s for s in ("−0.5", "−0.1", "0", "0.1", "0.5", "2") for _ in range(4)]
    assert [row[1] for row in rows[:4]] == ["harbour", "rain", "list", "overall"]
    assert rows[20][:5] == ["2", "harbour", "63", "iteration_limit", "–"]


def test_the_table_of_one_prompt_has_no_row_over_all(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    assert main(["table", str(study), "--prompt", "rain", "--csv", str(path)]) == 0
    assert "overall" not in capsys.readouterr().out
    assert set(pd.read_csv(path)["row"]) == {"prompt"}
    assert set(pd.read_csv(path)["prompt_id"]) == {"rain"}


def test_measures_that_were_switched_off_are_said(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measures = {"oracle": False, "lyapunov": False, "kl": True}
    make_run(tmp_path / "a", prompts=ONE, measures=measures)
    make_run(tmp_path / "b", prompts=ONE, feedback__strength=1.0)
    assert main(["table", str(tmp_path)]) == 0
    assert "switched off in a (measures.*=false): lyapunov, oracle" in capsys.readouterr().out


def test_nothing_from_a_run_can_steer_a_terminal_or_enter_a_file_unseen(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "\x1b[31m\u202e"
    run = make_run(tmp_path / "runs" / "a", study=f"s{bad}", prompts={f"p{bad}": f"one two {bad}"})
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["prompts"][0][f"more{bad}"] = 1
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    make_run(run.parent / "b", prompts=ONE, state=f"failed{bad}")
    words = [str(run.parent), "--prompt", f"p{bad}"]
    assert main(["table", *words, "--csv", str(tmp_path / "t.csv")]) == 0
    assert main(["figures", *words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.svg")]
    written += [(tmp_path / "t.csv").read_text(encoding="utf-8")]
    assert len(written) >= 2
    for text in (said.out, said.err, *written):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "⟨1B⟩" in said.out
    assert "⟨202E⟩" in said.err


def test_a_failure_of_ours_names_its_traceback(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", prompts=ONE)
    bad = make_run(tmp_path / "bad", prompts=ONE, state="failed")
    (bad / "traceback.txt").write_text("Traceback", encoding="utf-8")
    assert main(["table", str(tmp_path)]) == 0
    assert f"bad (failed: {bad / 'traceback.txt'})" in capsys.readouterr().err


def test_the_csv_keeps_full_precision_and_provenance(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("older", encoding="utf-8")
    assert main(["table", str(study), "--csv", str(path)]) == 0
    frame = pd.read_csv(path, dtype=str)
    assert len(frame) == 6 * 4
    assert set(frame["commit"]) == {"0a1b2c3"}
    assert {beside.name for beside in path.parent.iterdir()} == {"table.csv", "table.csv.json"}
    about = json.loads((tmp_path / "table.csv.json").read_text(encoding="utf-8"))
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    summary = pd.read_json(study / "run_0p5" / "summary.json", typ="series", precise_float=True)
    row = frame[(frame["run_id"] == "run_0p5") & (frame["prompt_id"] == "harbour")].iloc[0]
    assert float(row["nll"]) == summary["prompts"][0]["nll"]
    assert row["iterations_to_tolerance"] == str(summary["prompts"][0]["iterations_to_tolerance"])
    missed = frame[(frame["run_id"] == "run_2") & (frame["prompt_id"] == "harbour")].iloc[0]
    assert pd.isna(missed["iterations_to_tolerance"])
