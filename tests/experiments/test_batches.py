"""A run is computed in batches: what is computed does not depend on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from experiments.converge import run as runner
from experiments.converge.publish import Live, history_rows
from experiments.converge.records import overall
from stateful_gpt.generate import Sampling

Compute = Callable[..., Path]

# nats in float64: a batch of another shape adds in another order, and passes carry that on
EXACT = 1e-10
# a response to a nudge of 1e-7 has half of float64's digits; a rate fits logarithms of errors
LOOSE = {"lyapunov": 1e-6, "rate": 1e-3}
LENGTHS = (20, 1, 13, 7)
TABLES = ("trajectory.parquet", "iterations.parquet")
EVERY = "recompute.tolerance=0"  # pass: rounding decides of no row whether it is there


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Settings of a run over texts of unlike lengths, in float64."""
    random = np.random.default_rng(3)
    lines = [
        json.dumps({"id": f"of {length}", "tokens": random.integers(97, 123, length).tolist()})
        for length in LENGTHS
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return [
        f"prompts.file={tmp_path / 'texts.jsonl'}",
        *("prompts.limit=9", "prompts.max_tokens=32", "device.dtype=float64"),
    ]


@pytest.fixture
def in_batches(compute: Compute, texts: list[str], tmp_path: Path) -> Callable[..., list[Path]]:
    """The same run in batches of these sizes, each in a folder of its own."""

    def call(*words: str, sizes: tuple[object, ...] = ("auto", 2, 1)) -> list[Path]:
        return [
            compute(*texts, *words, f"device.batch={size}", f"runs_dir={tmp_path / str(size)}")
            for size in sizes
        ]

    return call


def table(folder: Path, name: str) -> pd.DataFrame:
    frame: pd.DataFrame = pq.read_table(folder / name).to_pandas()
    return frame


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    content["overall"].pop("seconds")
    for prompt in content["prompts"]:
        prompt.pop("seconds")
    return content


def assert_close(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Every column: floats to EXACT, all else the same."""
    assert list(one.columns) == list(other.columns)
    assert len(one) == len(other)
    for name in one.columns:
        if one[name].dtype == np.float64:
            np.testing.assert_allclose(one[name], other[name], rtol=EXACT, atol=EXACT, err_msg=name)
        else:
            assert one[name].equals(other[name]), name


def assert_same_run(folders: list[Path], *, but: tuple[str, ...] = ()) -> None:
    assert len({folder.name for folder in folders}) == 1, "a batch is no part of a run's name"
    one, *others = folders
    for other in others:
        for name in TABLES:
            assert_close(table(one, name), table(other, name))
        assert_close_prompts(summary(one)["prompts"], summary(other)["prompts"], but=but)


def assert_close_prompts(
    one: list[dict[str, Any]], other: list[dict[str, Any]], *, but: tuple[str, ...] = ()
) -> None:
    for before, after in zip(one, other, strict=True):
        assert set(before) == set(after)
        for key in set(before) - set(but):
            if isinstance(before[key], float):
                assert after[key] == pytest.approx(before[key], abs=LOOSE.get(key, EXACT)), key
            else:
                assert after[key] == before[key], key


# --- any batch, the same numbers ----------------------------------------------------------------

PLAIN = {
    "log_prob": ["feedback.strength=-0.7"],
    "logit": ["feedback.kind=logit", "feedback.strength=0.1"],
    "prob": ["feedback.kind=prob", "feedback.strength=0.5"],
    "none": ["feedback.kind=none"],
    "damped": ["feedback.strength=1", "recompute.damping=0.6"],
    "some layers": ["feedback.strength=1", "feedback.layers=[1]"],
    # strong enough that fronts walk apart, so that a text is read further than it would be alone
    "windowed": [
        *("recompute.solver=windowed", "recompute.window=2", "recompute.iterations=40"),
        "feedback.strength=3",
    ],
}
STATEFUL = {
    "hidden states": ["feedback.kind=hidden_state", "feedback.strength=0.7"],
    "of the same position": [
        *("feedback.kind=hidden_state", "feedback.strength=0.02", "feedback.shift=0"),
    ],
    "both": ["feedback.strength=0.4", "feedback.hidden_strength=0.5"],
    "both of the same position": [
        *("feedback.strength=0.1", "feedback.hidden_strength=0.02", "feedback.shift=0"),
    ],
}


@pytest.mark.parametrize("name", PLAIN)
def test_any_batch_gives_the_same_run(in_batches: Callable[..., list[Path]], name: str) -> None:
    folders = in_batches(EVERY, *PLAIN[name])
    assert_same_run(folders)
    lengths = table(folders[0], "trajectory.parquet").groupby("prompt_id", sort=False)["position"]
    assert list(lengths.max() + 1) == list(LENGTHS)


@pytest.mark.parametrize("name", STATEFUL)
def test_any_batch_gives_the_same_run_of_hidden_states(
    in_batches: Callable[..., list[Path]], stateful_folder: Path, name: str
) -> None:
    folders = in_batches(EVERY, f"model.path={stateful_folder}", *STATEFUL[name])
    if "feedback.shift=0" not in STATEFUL[name]:
        assert_same_run(folders)
        return
    # without a theorem, rest is a pass that says to the last bit what it was fed: rounding decides
    assert_same_run(folders, but=("outcome",))
    outcomes = {p["outcome"] for folder in folders for p in summary(folder)["prompts"]}
    assert outcomes <= {"settled", "iteration_limit"}


def test_any_batch_comes_to_rest_at_the_same_place(in_batches: Callable[..., list[Path]]) -> None:
    """How many passes rounding takes to come to rest may differ; where they lead does not."""
    folders = in_batches("recompute.iterations=30", "feedback.strength=1")
    keys = ["prompt_id", "iteration", "position"]
    frames = [table(folder, "trajectory.parquet").set_index(keys) for folder in folders]
    for other in frames[1:]:
        both = pd.concat([frames[0]["log_prob"], other["log_prob"]], axis=1, join="inner")
        np.testing.assert_allclose(both.iloc[:, 0], both.iloc[:, 1], rtol=0, atol=EXACT)
        lasts = [
            f["log_prob"].groupby(["prompt_id", "position"]).last() for f in (frames[0], other)
        ]
        np.testing.assert_allclose(*lasts, rtol=0, atol=EXACT)
    for folder in folders:
        assert {prompt["outcome"] for prompt in summary(folder)["prompts"]} == {"settled"}


@pytest.mark.parametrize("start", ["cold", "carried"])
@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_any_batch_generates_the_same(
    in_batches: Callable[..., list[Path]], start: str, strategy: str
) -> None:
    """Twenty tokens and fourteen more leave the block of 32, two at once."""
    folders = in_batches(
        *(EVERY, "recompute.iterations=4", f"recompute.start={start}", "generation.slide=2"),
        *(f"generation.strategy={strategy}", "generation.max_new_tokens=14", "seed=4"),
    )
    assert_same_run(folders)
    positions = table(folders[0], "trajectory.parquet").groupby(["prompt_id", "step"])["position"]
    assert positions.min()["of 20"].max() > 0, "a window that has slid is among them"


def test_passes_after_a_texts_end_are_not_its_own(
    in_batches: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is carried stays in the batch until its last text has ended."""
    call, told = Live.__call__, []

    def noted(self: Live, step: int, number: int, *rest: Any) -> None:
        call(self, step, number, *rest)
        told.append((step, number))

    monkeypatch.setattr(Live, "__call__", noted)
    folders = in_batches(
        *("recompute.start=carried", "recompute.tolerance=0.01", "generation.max_new_tokens=3"),
        "feedback.strength=0.3",
    )
    assert_same_run(folders)
    ends = table(folders[0], "iterations.parquet").groupby(["step", "prompt_id"])["iteration"].max()
    assert ends[0].nunique() > 2, "some wait for others"
    last = ends.groupby("step").max()
    expected = [(step, n) for step in last.index for n in range(1, last[step] + 1)]
    assert told[: len(expected)] == expected


def test_a_text_that_diverges_leaves_one_that_is_final(compute: Compute, texts: list[str]) -> None:
    """The passes that follow read nothing."""
    words = ("recompute.solver=windowed", "recompute.window=all", EVERY, "prompts.limit=2")
    folder = compute(*texts, *words, "feedback.kind=logit", "feedback.strength=1e308")
    ends = [(prompt["outcome"], prompt["iterations"]) for prompt in summary(folder)["prompts"]]
    assert ends == [("diverged", 2), ("settled", 12)]  # of one token, and all passes asked for


def test_of_a_text_that_diverged_no_later_row_tells_what_was_before(
    compute: Compute, texts: list[str]
) -> None:
    words = ("feedback.kind=logit", "feedback.strength=1e308", EVERY, "prompts.limit=2")
    folder = compute(*texts, *words, "recompute.iterations=4")
    losses = [row["nll"] for row in history_rows(folder)]
    plain = [p["nll_plain"] for p in summary(folder)["prompts"] if p["nll_plain"] is not None]
    assert losses == [pytest.approx(np.mean(plain)), None, None, None]


def test_the_losses_over_all_texts_are_of_the_same_texts(
    compute: Compute, texts: list[str]
) -> None:
    words = ("feedback.kind=hidden_state", "model.path=bundled_stateful", EVERY)
    folder = compute(*texts, *words, "recompute.iterations=4")
    prompts = [one | {"seconds": 1.0} for one in summary(folder)["prompts"]]
    assert overall(prompts)["nll_plain"] == pytest.approx(
        np.mean([one["nll_plain"] for one in prompts if one["nll_plain"] is not None])
    )
    longest, *others = prompts
    longest |= {"nll": None, "outcome": "diverged"}
    plain = [one["nll_plain"] for one in others if one["nll_plain"] is not None]
    assert overall(prompts)["nll_plain"] == pytest.approx(np.mean(plain))
    none = [one | {"nll": None} for one in prompts]
    everyone = [longest["nll_plain"], *plain]
    assert overall(none)["nll_plain"] == pytest.approx(np.mean(everyone))


def test_any_batch_lets_a_text_end_early(
    in_batches: Callable[..., list[Path]], compute: Compute, texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = (EVERY, "recompute.iterations=3", "generation.max_new_tokens=6", "seed=1")
    words += ("generation.strategy=sample", "recompute.start=carried")
    drawn = table(compute(*texts, *words), "trajectory.parquet")
    drawn = drawn.drop_duplicates(["prompt_id", "position"]).set_index("prompt_id")
    new = {f"of {n}": list(drawn.loc[[f"of {n}"], "token_id"])[n:] for n in LENGTHS}
    end = new["of 20"][2]  # what is drawn third there ends a text
    ended = {name: (ids.index(end) + 1 if end in ids else 6) for name, ids in new.items()}
    assert ended["of 20"] < max(ended.values())
    monkeypatch.setattr(
        runner, "Sampling", lambda **told: Sampling(**{**told, "end_tokens": (end,)})
    )
    folders = in_batches(*words)
    assert_same_run(folders)
    assert {p["prompt_id"]: p["generated_tokens"] for p in summary(folders[0])["prompts"]} == ended


# --- broken off ---------------------------------------------------------------------------------


def test_a_run_broken_off_within_a_batch_ends_bit_for_bit_the_same(
    compute: Compute, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("prompts.limit=5", "device.batch=2", "feedback.strength=1")
    undisturbed = compute(*words, f"runs_dir={tmp_path / 'undisturbed'}")
    call, passes = Live.__call__, []

    def interrupted(self: Live, step: int, number: int, *told: Any) -> None:
        call(self, step, number, *told)
        passes.append(number)
        if passes.count(3) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Live, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute(*words)
    folder = tmp_path / "runs" / "s" / undisturbed.name
    kept = sorted(path.name for path in (folder / ".prompts").iterdir())
    assert kept == [
        f"00000.{name}" for name in ("iterations.parquet", "json", "trajectory.parquet")
    ]
    assert compute(*words) == folder
    for name in TABLES:
        assert pq.read_table(folder / name).equals(pq.read_table(undisturbed / name)), name
    assert summary(folder) == summary(undisturbed)


# --- measures that are switched off -------------------------------------------------------------

MISSING = {
    "oracle": (["oracle_error_max"], ["oracle_error_max"]),
    "lyapunov": ([], ["lyapunov"]),
    "kl": (["kl_step", "kl_effect"], ["kl_effect"]),
}


@pytest.mark.parametrize("measure", MISSING)
@pytest.mark.parametrize("words", [[], ["generation.max_new_tokens=3"]])
def test_a_measure_that_is_switched_off_is_missing_and_the_others_stay(
    compute: Compute, texts: list[str], measure: str, words: list[str]
) -> None:
    common = [*texts, *words, EVERY, "recompute.iterations=21"]
    whole, less = compute(*common), compute(*common, f"measures.{measure}=false")
    assert whole.name != less.name
    columns, keys = MISSING[measure]
    # without the oracle, the last pass is the end that prefixes settle to: at rest the same
    assert pq.read_table(whole / TABLES[0]).equals(pq.read_table(less / TABLES[0]))
    frames = [table(folder, TABLES[1]) for folder in (whole, less)]
    for name in columns:
        assert frames[0][name].notna().any()
        assert frames[1][name].isna().all()
    rest = [frame.drop(columns=columns) for frame in frames]
    assert_close(*rest)
    prompts = [summary(folder)["prompts"] for folder in (whole, less)]
    assert all(prompt[key] is None for prompt in prompts[1] for key in keys)
    assert_close_prompts(*prompts, but=(*keys, "rate"))


@pytest.mark.parametrize("oracle", ["true", "false"])
def test_where_nothing_is_fed_back_the_first_pass_is_the_end(
    compute: Compute, texts: list[str], oracle: str
) -> None:
    folder = compute(*texts, "feedback.strength=0", f"measures.oracle={oracle}")
    for prompt in summary(folder)["prompts"]:
        assert prompt["outcome"] == "settled"
        assert (prompt["iterations"], prompt["iterations_to_tolerance"]) == (1, 1)
