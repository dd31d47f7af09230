"""``python -m analysis.state_tracking``: tables and figures from folders made by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib import image

from analysis.state_tracking import load, main

ROOT = Path(__file__).parents[2]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
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
        chosen = {"layers": 1, "passes": 1, "through": False, "drawn": False, "times": 1}
        chosen |= contestant
        config = {
            "task": {"name": task, "target": target, "trained_level": 2, "tested_level": 4},
            "contestant": chosen,
            "size": {"n_embd": 8, "n_head": 2},
            "training": {
                "steps": steps,
                "learning_rate": rate,
                "matrix_learning_rate": 5 * rate,
            },
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


def table_rows(out: str) -> list[list[str]]:
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_table_holds_the_mean_and_the_spread_over_seeds_at_full_depth(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, best in enumerate((0.5, 0.75, 1.0)):
        study = save(f"s{seed}", best=best, seed=seed, passes=8, through=True)
    save("p", best=0.5, layers=3)
    save("half", best=0.5, target="half", times=8)
    assert main([str(study), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "cups, target state: accuracy at full depth, trained to level 2, chance 0.20" in out
    rows = table_rows(out)
    head = ["contestant", "rates", "seeds", "level 1", "level 2", "level 3", "level 4"]
    assert rows[0][:7] == head
    assert rows[2][:5] == ["plain, 3 layers", "0.01 / 0.05", "1", "0.50", "0.50"]
    assert rows[3] == [
        "stateful, 1 layer, 8 passes, through",
        "0.01 / 0.05",
        "3",
        "0.75 [0.50, 1.00]",
        "0.75 [0.50, 1.00]",
        "0.25 [0.25, 0.25]",
        "0.25 [0.25, 0.25]",
        "2, 2, 2",
        "40",
        "2",
    ]
    assert rows[6][0] == "plain, 1 layer, 8× steps"


def test_of_several_rates_each_contestant_shows_those_that_did_best_at_the_trained_level(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layers, slow, fast in ((1, 0.5, 0.75), (2, 1.0, 0.25)):
        for seed in (0, 1):
            name = f"{layers}{seed}"
            save(f"slow{name}", best=slow, seed=seed, rate=0.004, layers=layers)
            study = save(f"fast{name}", best=fast, seed=seed, layers=layers)
    assert main([str(study), "--out", str(tmp_path / "out")]) == 0
    rows = table_rows(capsys.readouterr().out)[2:]
    assert [row[1:4] for row in rows] == [
        ["0.01 / 0.05", "2", "0.75 [0.75, 0.75]"],
        ["0.004 / 0.02", "2", "1.00 [1.00, 1.00]"],
    ]


def test_figures_are_drawn_for_each_target_and_are_the_same_again(
    save: Save, tmp_path: Path
) -> None:
    study = save("a", best=1.0, passes=4)
    save("b", best=0.5, layers=2)
    save("c", best=0.5, target="half", task="modulo")
    for place in ("one", "other"):
        assert main([str(study), "--out", str(tmp_path / place)]) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    stems = ["accuracy_half", "accuracy_state", "depth_state"]  # no recurrence where half is asked
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    drawn = image.imread(tmp_path / "one" / "accuracy_state.png")
    assert len(np.unique(drawn.reshape(-1, drawn.shape[2]), axis=0)) > 20


def test_runs_that_are_not_finished_are_left_out_aloud(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = save("good", best=1.0)
    save("busy", best=1.0, state="running", seed=1)
    save("torn", best=1.0, seed=2)
    (study / "torn" / "accuracy.parquet").write_bytes(b"PAR1")
    save("other", best=1.0, seed=3)
    (study / "other" / "config.yaml").write_text("model: gpt2\n")
    assert main([str(study), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert table_rows(out)[2][2] == "1"
    assert "Left out: busy: it is running." in err
    assert "Left out: torn: not a whole state-tracking run" in err
    assert "Left out: other: not a whole state-tracking run" in err


def test_a_source_that_is_no_good_is_one_sentence(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    study = save("a", best=1.0)
    save("b", best=1.0, steps=20, seed=1)
    (tmp_path / "file").write_text("")
    for source, words in (
        (tmp_path / "nowhere", "is not a folder"),
        (empty, "holds no finished state-tracking run"),
        (study, "runs with different settings"),
    ):
        assert main([str(source), "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err
        assert str(source) in err
    (study / "b" / "status.json").write_text('{"state": "running"}')
    assert main([str(study), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_run_knows_its_accuracy_at_the_largest_depth(save: Save) -> None:
    runs, _ = load(save("a", best=0.75, passes=2))
    assert runs[0].at_full_depth().to_dict() == {1: 0.75, 2: 0.75, 3: 0.25, 4: 0.25}


def test_no_torch_is_imported(save: Save, tmp_path: Path) -> None:
    study = save("a", best=1.0, passes=2)
    program = (
        "import sys\n"
        "from analysis.state_tracking import main\n"
        f"assert main([{str(study)!r}, '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        "bad = [name for name in ('torch', 'stateful_gpt', 'wandb') if name in sys.modules]\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
