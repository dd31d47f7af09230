"""Trained models and contestants of state tracking: grouped by all but the seed, as saved."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from analysis import load
from analysis.__main__ import main
from analysis.draw.recurrence import contests, recurrence, trainings
from analysis.labels import spelt
from analysis.models import at_best_rates, at_full_depth, trained
from analysis.table import spread

ROOT = Path(__file__).parents[2]
Save = Callable[..., Path]
MakeRun = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path) -> Save:
    """Write a trained model's folder."""

    def write(
        name: str,
        *,
        seed: int = 0,
        nll: list[float],
        passes: int = 1,
        steps: int = 10,
        width: int = 8,
        characters_per_token: float = 2.0,
        sources: str | None = None,
        documents: str = "file",
    ) -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        stateful = passes > 1
        settings = {
            "seed": seed,
            "corpus": {"train": f"/somewhere/{name}", "documents": documents},
            "architecture": {"n_layer": 4, "n_embd": width, "hidden_feedback": stateful},
            "training": {
                "steps": steps,
                "passes": passes,
                "draw_passes": False,
                "through_passes": False,
                "update_every_pass": False,
            },
        }
        (folder / "training.yaml").write_text(yaml.safe_dump(settings))
        depths = {
            "nll": nll,
            "kl": [0.5 / 4**n for n in range(len(nll) - 1)],
            "nll_full": nll[-1] + 0.01 if stateful else None,
            "contracts": True,
            "characters_per_token": characters_per_token,
            "sources": sources,
        }
        (folder / "depths.json").write_text(json.dumps(depths))
        (folder / "history.json").write_text(json.dumps([{"tokens_read": 1000 * passes * steps}]))
        save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def models(train: Save, tmp_path: Path) -> Path:
    for seed in range(3):
        train(f"plain-{seed}", seed=seed, nll=[3.0 + 0.1 * seed])
        train(f"d3-{seed}", seed=seed, nll=[3.5, 2.9, 2.8 + 0.01 * seed, 2.85], passes=3)
    train("longer-0", nll=[2.95], steps=30)
    (tmp_path / "models" / "unfinished").mkdir()
    return tmp_path / "models"


def rows_of(out: str) -> list[list[str]]:
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_put_together_and_nothing_else(models: Path) -> None:
    found = load(str(models)).models
    names = found.rows.groupby("group", sort=False)["variant"].first()
    assert list(names) == ["plain, 10 steps", "plain, 30 steps", "stateful, 10 steps"]
    assert list(found.rows.groupby("group", sort=False).size()) == [3, 1, 3]
    losses = trained(found).groupby(found.rows["group"])
    assert list(losses.get_group(2)["last"]) == pytest.approx([2.8, 2.81, 2.82])
    assert list(losses.get_group(2)["generating"]) == pytest.approx([2.86] * 3)
    assert list(losses.get_group(0)["generating"]) == pytest.approx([3.0, 3.1, 3.2])
    assert losses.get_group(0)["second"].isna().all()
    assert set(found.rows["parameters"]) == {17}


def test_seeds_of_one_setting_are_put_together_where_nothing_else_differs(train: Save) -> None:
    folders = [str(train(f"s{seed}", nll=[3.0], seed=seed)) for seed in (0, 1)]
    for number, folder in enumerate(folders):  # how often it was saved and looked at on its way
        path = Path(folder, "training.yaml")
        settings = yaml.safe_load(path.read_text())
        often = ("save_every_seconds", "evaluate_every", "evaluate_windows", "evaluate_depth")
        settings["training"] |= dict.fromkeys(often, number + 1)
        path.write_text(yaml.safe_dump(settings))
    rows = load(*folders).models.rows
    assert rows["group"].nunique() == 1
    assert rows["label"].nunique() == 2


@pytest.mark.parametrize(
    ("novels", "names"),
    [
        ({"characters_per_token": 2.0}, {"characters_per_token": 1.5}),  # of early versions
        ({"sources": "a"}, {"sources": "b"}),  # a byte is a character of any text
        ({"documents": "file"}, {"documents": "line"}),
    ],
)
def test_models_of_other_texts_are_not_put_together(
    train: Save,
    novels: dict[str, Any],
    names: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in (0, 1):
        train(f"novels-{seed}", nll=[3.0], seed=seed, **novels)
        folder = train(f"names-{seed}", nll=[2.0], seed=seed, **names)
    rows = load(str(folder.parent)).models.rows
    assert rows["label"].nunique() == 4
    assert main(["table", str(folder.parent)]) == 0
    table = rows_of(capsys.readouterr().out)[2:]
    assert [(row[1], row[4]) for row in table] == [
        ("2", "3.0000 ± 0.0000"),
        ("2", "2.0000 ± 0.0000"),
    ]


def test_a_training_that_was_made_again_is_no_second_seed(
    train: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        folder = train(name, seed=seed, nll=[3.0 + seed])
        path = folder / "training.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["training"]["evaluate_every"] = len(name)  # how often it was looked at
        path.write_text(yaml.safe_dump(settings))
    assert main(["table", str(folder.parent)]) == 0
    (row,) = rows_of(capsys.readouterr().out)[2:]
    assert [row[1], row[4]] == ["2", "3.5000 ± 0.7071"]
    figure = trainings(load(str(folder.parent)).models)
    assert "over 2 seeds." in " ".join(figure.get_supxlabel().split())
    for name in ("a", "again"):
        assert main(["table", str(folder.parent), "--run", name]) == 0
        assert rows_of(capsys.readouterr().out)[2][1] == "1"


def test_models_of_other_width_have_other_labels(train: Save) -> None:
    folders = [str(train(f"w{width}", nll=[3.0], width=width)) for width in (16, 8)]
    assert list(load(*folders).models.rows["label"]) == ["width 8", "width 16"]


def test_one_of_a_kind_is_singular() -> None:
    names = ("training.passes", "iterations_allowed", "architecture.n_layer")
    assert [spelt(name, 1) for name in names] == ["1 pass", "1 iteration", "1 layer"]
    assert spelt("training.passes", 2) == "2 passes"


def test_a_setting_of_any_name_is_spelt_as_it_is() -> None:
    assert spelt("model.{0}", 2) == "model.{0} 2"


def test_the_table_states_mean_spread_and_cost(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(models), "--csv", str(tmp_path / "all.csv")]) == 0
    out = capsys.readouterr().out
    assert "\n\n±: standard deviation over seeds\n" in out
    rows = rows_of(out)
    plain, _, stateful = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert plain["depth 0"] == "3.1000 ± 0.1000"
    assert plain["tokens read (M)"] == "0.01"
    assert stateful["depth D−1"] == "2.8100 ± 0.0100"
    assert stateful["nats/character"].startswith("1.4300"), "at generation's depth: 2.86 over 2"
    assert stateful["KL falls"] == "3 of 3"
    assert main(["table", str(models / "d3-0")]) == 0
    assert "1 of 1" in rows_of(capsys.readouterr().out)[2]
    assert stateful["tokens read (M)"] == "0.03", "three passes cost three times as much"
    saved = pd.read_csv(tmp_path / "all.csv")
    assert len(saved) == 7
    assert saved["nll_2"].dropna().tolist() == pytest.approx([2.8, 2.81, 2.82])


def test_the_figure_is_the_same_again_and_tells_how_to_redraw_it(
    models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "figures" / "recurrence_trained.png"
    assert main(["figures", str(models), "--out", str(path.parent)]) == 0
    with Image.open(path) as image:
        assert f"python -m analysis figures {models} --out" in image.info["Comment"]
        assert "d3-0" in image.info["Description"]
    first = path.read_bytes()
    assert main(["figures", str(models), "--out", str(path.parent)]) == 0
    assert path.read_bytes() == first


def test_plain_models_alone_are_drawn(train: Save, tmp_path: Path) -> None:
    folder = train("plain", nll=[3.0])
    assert main(["figures", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "recurrence_trained.svg").exists()


def test_names_of_many_models_touch_neither_a_curve_nor_the_title(
    train: Save, tmp_path: Path
) -> None:
    for width in (1024, 2048):
        for passes in (2, 3, 4):
            nll = [3.5, 2.9, 2.8, 2.7]
            name = f"d{passes}-{width}"
            train(name, nll=nll, passes=passes, width=width, steps=1234567 + width)
    figure = trainings(load(str(tmp_path / "models")).models)
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    (names,) = [legend.get_window_extent() for legend in legends if legend]
    others = [*figure.axes, *figure.texts]
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 6
    assert not any(names.overlaps(other.get_window_extent()) for other in others)


def test_a_training_that_is_not_finished_is_left_out_by_name(
    train: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    train("good", nll=[3.0])
    folder = train("killed", nll=[3.0])
    for path in folder.iterdir():
        if path.name != "training.yaml":
            path.unlink()
    assert main(["table", str(folder.parent)]) == 0
    err = capsys.readouterr().err
    assert err == "Left out 1 run that is not finished and whole: killed (no depths.json).\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("depths.json", "{"),
        ("depths.json", '{"nll": [], "kl": [], "nll_full": null}'),
        ("history.json", "[]"),
        ("history.json", '[{"tokens_read": Infinity}]'),
        ("training.yaml", "- 1"),
        ("model.safetensors", "short"),
        ("model.safetensors", "\x02" + "\0" * 7 + "[]"),
    ],
)
def test_a_damaged_training_is_left_out_by_name(
    train: Save, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train("good", nll=[3.0])
    folder = train("bad", nll=[3.0])
    (folder / name).write_text(content)
    assert main(["table", str(folder.parent)]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("Left out 1 run that is not finished and whole: bad (")


def test_one_value_has_no_spread() -> None:
    assert spread(pd.Series([1.0])) == "1.0000"
    assert spread(pd.Series([1.0, 2.0])) == "1.5000 ± 0.7071"
    assert spread(pd.Series([], dtype=float)) == "–"


def test_runs_that_feed_hidden_states_back_are_drawn_by_depth(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "a", feedback__kind="hidden_state", feedback__strength=0.5)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "trained_passes": 3}))
    runs = load(str(run))
    figure = recurrence(runs)
    assert "below 1e-12 nats is drawn there" in " ".join(figure.get_supxlabel().split())
    loss, movement = figure.axes[:2]
    rows = runs.iterations.pivot(index="iteration", columns="prompt_id", values="nll")
    change = (rows - rows.iloc[0]).median(axis=1)
    assert loss.lines[0].get_ydata()[:5] == pytest.approx(change.to_numpy()[:5])
    assert list(loss.lines[1].get_xdata()) == [2], "three passes end at depth 2"
    steps = runs.iterations[runs.iterations["iteration"] == 2]["kl_step"]
    assert movement.lines[0].get_ydata()[0] == pytest.approx(steps.median())


def test_depth_0_of_a_text_that_grew_is_a_pass_that_was_fed_nothing(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for start in ("cold", "carried"):
        changes = {"feedback__kind": "hidden_state", "feedback__strength": 0.5}
        run = make_run(tmp_path / start, steps=2, recompute__start=start, **changes)
        runs = load(str(run))
        figure = recurrence(runs)
        rows = runs.iterations[runs.iterations["step"] == (0 if start == "carried" else 2)]
        rows = rows.pivot(index="iteration", columns="prompt_id", values="nll")
        change = (rows - rows.iloc[0]).median(axis=1)
        drawn = figure.axes[0].lines[0].get_ydata()
        assert drawn[:5] == pytest.approx(change.to_numpy()[:5])
        said = " ".join(figure.get_supxlabel().split())
        assert "Of a text that grew: its last step" in said
        assert ("its first where later ones" in said) == (start == "carried")


def test_hidden_states_that_change_nothing_or_were_not_measured_are_drawn(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for strength, passes in ((0.0, 1), (1.0, 4)):
        changes = {"feedback__kind": "hidden_state", "feedback__strength": strength}
        changes |= {"recompute__iterations": passes, "seed": 1}
        make_run(tmp_path / "s" / f"r{strength}", **changes)
        make_run(tmp_path / "off" / f"r{strength}", drop_measures=("kl_step",), **changes)
    make_run(tmp_path / "s" / "again", **{**changes, "seed": 2})
    _, movement = recurrence(load(str(tmp_path / "s"))).axes
    names = [text.get_text() for text in movement.get_legend().get_texts()]
    assert names == ["s = 0, 1 iteration", "s = 1, 4 iterations"], (
        "of seeds that are one line none is named"
    )
    _, movement = recurrence(load(str(tmp_path / "off"))).axes
    assert [text.get_text() for text in movement.texts] == ["no value recorded"]


# --- state tracking -----------------------------------------------------------------------------


@pytest.fixture
def contest(tmp_path: Path) -> Save:
    """Write a run whose accuracy at full depth is ``best`` up to level 2 and 0.25 beyond."""

    def write(
        name: str,
        *,
        best: float,
        seed: int = 0,
        task: str = "cups",
        target: str = "state",
        state: str = "finished",
        steps: int = 10,
        rate: float = 0.01,
        **contestant: object,
    ) -> Path:
        folder = tmp_path / "study" / name
        folder.mkdir(parents=True)
        chosen: dict[str, Any] = {"layers": 1, "passes": 1, "through": False, "drawn": False}
        chosen |= {"times": 1, **contestant}
        rates = {"learning_rate": rate, "matrix_learning_rate": 5 * rate}
        config = {
            "task": {"name": task, "target": target, "trained_level": 2, "tested_level": 4},
            "contestant": chosen,
            "size": {"n_embd": 8, "n_head": 2},
            "training": {"steps": steps, **rates, "record_every": 50 + seed},  # of its history
            "test_words": 16,
            "seed": seed,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "status.json").write_text(json.dumps({"state": state}))
        summary = {"chance": 0.2, "layer_passes": 40, "seconds": 1.5, "solved_level": 2}
        (folder / "summary.json").write_text(json.dumps(summary))
        depths = 4 if chosen["passes"] != 1 else 1
        rows = [
            {"depth": d, "level": k, "accuracy": best if k <= 2 and d == depths - 1 else 0.25}
            for d in range(depths)
            for k in range(1, 5)
        ]
        pd.DataFrame(rows).to_parquet(folder / "accuracy.parquet")
        return folder.parent

    return write


def test_contestants_are_set_side_by_side_at_full_depth(
    contest: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, best in enumerate((0.5, 0.75, 1.0)):
        study = contest(f"s{seed}", best=best, seed=seed, passes=8, through=True)
    contest("again", best=1.0, seed=2, passes=8, through=True)  # is no fourth seed
    contest("p", best=0.5, layers=3)
    contest("half", best=0.5, target="half", times=8)
    assert main(["table", str(study)]) == 0
    out = capsys.readouterr().out
    assert "cups, target state: accuracy at full depth, trained to level 2, chance 0.20" in out
    rows = rows_of(out)
    head = ["contestant", "rates", "seeds", "level 1", "level 2", "level 3", "level 4"]
    assert rows[0][:7] == head
    named = {row[0]: row for row in rows}
    assert named["plain, 3 layers"][1:5] == ["0.01 / 0.05", "1", "0.50", "0.50"]
    assert named["stateful, 1 layer"][2:] == [
        "3",
        "0.75 ± 0.25",
        "0.75 ± 0.25",
        "0.25 ± 0.00",
        "0.25 ± 0.00",
        "2, 2, 2",
        "40",
        "2",
    ]
    assert rows[-1][0] == "plain, 1 layer, 8× steps"


def test_of_several_rates_each_contestant_shows_those_that_did_best_at_the_trained_level(
    contest: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for layers, slow, fast in ((1, 0.5, 0.75), (2, 1.0, 0.25)):
        for seed in (0, 1):
            name = f"{layers}{seed}"
            contest(f"slow{name}", best=slow, seed=seed, rate=0.004, layers=layers)
            study = contest(f"fast{name}", best=fast, seed=seed, layers=layers)
    assert main(["table", str(study)]) == 0
    assert [row[1:4] for row in rows_of(capsys.readouterr().out)[2:]] == [
        ["0.01 / 0.05", "2", "0.75 ± 0.00"],
        ["0.004 / 0.02", "2", "1.00 ± 0.00"],
    ]


def test_of_rates_that_did_equally_well_the_lowest_stand_for_a_contestant(
    contest: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        contest(f"fast{seed}", best=1.0, seed=seed)
        study = contest(f"slow{seed}", best=1.0, seed=seed, rate=0.004)
    assert main(["table", str(study)]) == 0
    assert [row[1:4] for row in rows_of(capsys.readouterr().out)[2:]] == [
        ["0.004 / 0.02", "2", "1.00 ± 0.00"]
    ]
    kept = at_best_rates(load(str(study)).contests).rows
    assert set(kept["run_id"]) == {"slow0", "slow1"}


def test_a_figure_is_drawn_for_each_target(contest: Save, tmp_path: Path) -> None:
    study = contest("a", best=1.0, passes=4)
    contest("b", best=0.5, layers=2)
    contest("c", best=0.5, target="half", task="modulo")
    assert main(["figures", str(study), "--out", str(tmp_path / "out")]) == 0
    stems = {path.stem for path in (tmp_path / "out").iterdir()}
    assert stems == {"recurrence_half", "recurrence_state"}


def test_plain_contestants_alone_are_told_apart(contest: Save) -> None:
    for layers in (1, 2):
        study = contest(f"p{layers}", best=0.5, layers=layers)
    levels, _, compute = contests(load(str(study)).contests).axes
    names = [text.get_text() for text in compute.get_legend().get_texts()]
    assert names == ["1 layer", "2 layers"]
    assert len({line.get_color() for line in levels.lines if line.get_label() in names}) == 2


def test_a_target_names_a_file_but_never_its_folder(contest: Save, tmp_path: Path) -> None:
    study = contest("a", best=1.0, target="x/../../../away")
    out = tmp_path / "out" / "deep"
    assert main(["figures", str(study), "--out", str(out)]) == 0
    assert {path.stem for path in out.iterdir()} == {"recurrence_x__________away"}
    assert {path.name for path in tmp_path.iterdir()} == {"study", "out"}


def test_contests_that_are_not_finished_and_whole_are_left_out_aloud(
    contest: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    study = contest("good", best=1.0)
    contest("busy", best=1.0, state="running", seed=1)
    contest("torn", best=1.0, seed=2)
    (study / "torn" / "accuracy.parquet").write_bytes(b"PAR1")
    contest("other", best=1.0, seed=3)
    (study / "other" / "config.yaml").write_text("model: gpt2\n")
    assert main(["table", str(study)]) == 0
    out, err = capsys.readouterr()
    assert rows_of(out)[2][2] == "1"
    assert err.count("\n") == 1
    for reason in ("busy (running)", "torn (unreadable accuracy.parquet)", "other (not a whole"):
        assert reason in err


def test_copies_of_a_model_count_once_and_are_named(
    contest: Save, train: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        contest(f"c{seed}", best=1.0, seed=seed)
        train(f"t{seed}", nll=[3.0 + seed], seed=seed)
    shutil.copytree(tmp_path / "study", tmp_path / "backup" / "study")
    shutil.copytree(tmp_path / "models", tmp_path / "backup" / "models")
    train("other/t0", nll=[5.0])  # only its name is the same
    assert main(["table", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    trained, contestants = (rows_of(part)[2] for part in out.split("cups"))
    assert trained[1] == "3"
    assert contestants[2] == "2"
    assert err == "Counted once: 4 runs that lie in several places: t0, t1, c0, c1.\n"


def test_a_contestant_knows_its_accuracy_at_the_largest_depth(contest: Save) -> None:
    contests = load(str(contest("a", best=0.75, passes=2))).contests
    assert at_full_depth(contests).loc[0].to_dict() == {1: 0.75, 2: 0.75, 3: 0.25, 4: 0.25}


def test_one_command_serves_a_folder_of_everything(
    contest: Save, models: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    contest("c", best=1.0)
    make_run(tmp_path / "runs" / "r", prompts={"p": "one two three"}, feedback__strength=0.5)
    words = ["table", str(tmp_path), "--csv", str(tmp_path / "t.csv")]
    script = (
        "import sys\nfrom analysis.__main__ import main\n"
        f"assert main({words!r}) == 0\n"
        "bad = [name for name in ('torch', 'stateful_gpt', 'wandb') if name in sys.modules]\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.glob("*.csv")}
    assert written == {"t.csv", "t_trainings.csv", "t_contests.csv"}
