"""The page as a file: what it holds, what it may do, how large it gets. tests/browser runs it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.__main__ import main
from analysis.intervals import Interval
from analysis.page import build as page_build
from analysis.page.build import RUN_LIMIT, build, page_of_run
from analysis.page.finding import finding
from analysis.page.texts import PER_NAT, Text, texts_of, thinned
from tests.analysis.conftest import TEXTS

MakeRun = Callable[..., Path]
FOLDER = Path(page_build.__file__).parent
HOSTILE = "</script><script>window.hacked=1</script> <!--<script> <img src=x onerror=alert(1)> ‮"


class Page(HTMLParser):
    """The elements of a page, with what is in its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": [], "data": []}
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside in self.contents:
            self.contents[self._inside].append(data)


def data_of(html: str) -> dict:
    (data,) = Page(html).contents["data"]
    return json.loads(data)


def unpacked(data: dict) -> dict[tuple[int, str, int], np.ndarray]:
    """(P, T) nats of every text, by run, prompt and step: what script/data.js does."""
    octets = np.frombuffer(zlib.decompress(base64.b64decode(data["values"])), np.uint8)
    low, high = octets.reshape(2, -1).astype(np.uint16)
    numbers, at, found = low + 256 * high, 0, {}
    for run, prompt, step, _first, count, _tokens, passes, _plain in data["texts"]:
        shape = (len(data["passes"][passes]), count)
        part = numbers[at : at + shape[0] * shape[1]].reshape(shape)
        values = np.cumsum(part, axis=0, dtype=np.uint16).view(np.int16)
        found[run, data["prompts"][prompt], step] = values / PER_NAT
        at += shape[0] * shape[1]
    return found


def test_every_recorded_estimate_is_in_the_page_to_a_hundredth_of_a_nat(study: Path) -> None:
    data = data_of(build(load(str(study))))
    stored = unpacked(data)
    assert len(stored) == 6 * 3
    for run, row in enumerate(data["runs"]):
        rows = pd.read_parquet(study / row["id"] / "trajectory.parquet")
        for (prompt, step), group in rows.groupby(["prompt_id", "step"]):
            recorded = group.pivot(index="iteration", columns="position", values="log_prob")
            kept = stored[run, prompt, step]
            held = np.concatenate([kept, np.repeat(kept[-1:], len(recorded) - len(kept), axis=0)])
            assert np.abs(held - recorded.to_numpy())[:, 1:].max() <= 0.5 / PER_NAT + 1e-9


def rows_of(log_prob: list[list[float]]) -> pd.DataFrame:
    """A trajectory from (passes, tokens) nats."""
    passes, count = np.shape(log_prob)
    return pd.DataFrame(
        {
            "run": 0,
            "prompt_id": "p",
            "step": 0,
            "iteration": np.repeat(np.arange(1, passes + 1), count),
            "position": np.tile(np.arange(count), passes),
            "token": "x",
            "log_prob": np.ravel(log_prob),
        }
    )


def text_of(log_prob: list[list[float]], *, still: bool = False) -> Text:
    (text,) = texts_of(
        rows_of(log_prob), tolerance={0: 1e-3}, still={(0, "p")} if still else set(), cold={0}
    )
    return text


def test_a_token_settles_at_the_pass_from_which_it_stays() -> None:
    nan = np.nan
    text = text_of(
        [[nan, -1, -1.0000, -1, -1], [nan, -1, -2.0000, -2, -2], [nan, -1, -2.0005, -1, nan]]
    )
    assert text.settles.tolist() == [1, 1, 2, 0, 0]  # 0: it moved in the last pass, or is no number


def test_what_moved_last_has_settled_where_the_run_had() -> None:
    assert text_of([[0, -1], [0, -2]], still=True).settles.tolist() == [1, 2]


def test_passes_after_rest_are_not_stored() -> None:
    text = text_of([[0, -1], [0, -2], [0, -2.001], [0, -2.001]])
    assert text.passes.tolist() == [1, 2]


def test_a_large_study_is_thinned_until_it_fits_and_says_how(study: Path) -> None:
    runs = load(str(study))
    whole = build(runs)
    limit = len(whole) - 6_000
    small = build(runs, limit=limit)
    assert len(small) <= limit
    assert data_of(whole)["thinned"] == []
    data = data_of(small)
    passes, texts = data["thinned"]
    assert passes == "at most 4 of the passes of each text, the early ones all"
    assert max(map(len, data["passes"])) == 4
    assert data["passes"][0][:2] == [1, 2]
    assert texts == "the first 2 of the texts of each run"
    assert data["prompts"] == ["harbour", "rain"]
    assert len(data["runs"]) == 6  # the table keeps every run
    whole_texts, few_texts = unpacked(data_of(whole)), unpacked(data)
    for key, kept in few_texts.items():  # what is kept is what it was
        number = [one[6] for one in data["texts"]][list(few_texts).index(key)]
        rows = np.array(data["passes"][number]) - 1
        assert np.array_equal(kept, whole_texts[key][rows])


def test_what_is_thinned_most_keeps_its_end_and_whole_runs_go_last() -> None:
    passes, values, still = np.arange(1, 41), np.zeros((40, 3), np.int16), np.zeros(3, np.uint16)
    texts = [
        Text(run, prompt, step, 0, ("a", "b", "c"), passes, values, still, plain=True)
        for run in range(80)
        for prompt in "pq"
        for step in range(6)
    ]
    levels = [kept for kept, _ in thinned(texts) if kept]
    for kept in levels:
        assert {(one.passes[0], one.passes[-1]) for one in kept} == {(1, 40)}
        assert {one.step for one in kept} >= {5}
    fewest = next(kept for kept in levels if len({one.run for one in kept}) < 80)
    assert len({one.prompt for one in fewest}) == 1
    assert [len(one.passes) for one in fewest[:1]] == [2]


def test_a_thinned_study_keeps_texts_of_every_run(make_run: MakeRun, tmp_path: Path) -> None:
    for kind in ("prose", "code"):
        texts = {f"{kind}{n}": " ".join(TEXTS["rain"].split()[n:]) for n in range(20)}
        make_run(tmp_path / "s" / kind, prompts=texts, prompts__file=kind)
    runs = load(str(tmp_path / "s"))
    data = data_of(build(runs, limit=len(build(runs)) - 200))
    assert data["thinned"] == ["the first 16 of the texts of each run"]
    assert [run for run, *_ in data["texts"]] == [0] * 16 + [1] * 16


def test_a_page_of_one_run_is_small_enough_for_a_tracker(make_run: MakeRun, tmp_path: Path) -> None:
    words = (" ".join(TEXTS.values()) * 2).split()
    texts = {f"p{n}": " ".join(words[n : n + 128]) for n in range(40)}
    make_run(tmp_path / "r", prompts=texts, feedback__strength=4.0, recompute__iterations=127)
    assert len(build(load(str(tmp_path / "r")))) > RUN_LIMIT
    page = page_of_run(tmp_path / "r")
    assert RUN_LIMIT / 2 < len(page.encode()) <= RUN_LIMIT
    data = data_of(page)
    assert data["thinned"] == [
        "at most 32 of the passes of each text, the early ones all",
        "the first 16 of the texts of each run",
    ]
    assert data["whole"] == [40, 40]


def test_a_run_that_no_thinning_makes_small_is_a_table_alone(
    make_run: MakeRun, tmp_path: Path
) -> None:
    long = "x" * RUN_LIMIT
    run = make_run(tmp_path / "r", study=long, prompts={"p": f"one {long} two"})
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "command": long}))
    page = page_of_run(run)
    assert len(page.encode()) <= RUN_LIMIT
    data = data_of(page)
    assert (data["texts"], data["thinned"]) == ([], ["none of the texts"])
    assert len(data["runs"]) == 1


@pytest.fixture
def hostile(make_run: MakeRun, tmp_path: Path) -> str:
    make_run(tmp_path / "h", study="<b onclick=1>&lt;", prompts={HOSTILE: HOSTILE})
    return build(load(str(tmp_path / "h")))


def test_nothing_of_a_run_is_markup(hostile: str) -> None:
    page = Page(hostile)
    assert [tag for tag, _ in page.elements].count("script") == 3  # the data, uPlot, the page's own
    assert not [tag for tag, _ in page.elements if tag in ("b", "img", "iframe", "link", "base")]
    (data,) = page.contents["data"]
    assert "<" not in data
    assert json.loads(data)["prompts"] == [HOSTILE]
    assert "".join(json.loads(data)["tokens"][0]) == HOSTILE


def test_only_the_code_of_this_folder_may_run(hostile: str) -> None:
    page = Page(hostile)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        hashes = set(re.search(rf"{kind}-src ([^;]*)", policy)[1].split())  # type: ignore[index]
        sums = [hashlib.sha256(text.encode()).digest() for text in page.contents[kind]]
        assert hashes == {f"'sha256-{base64.b64encode(one).decode()}'" for one in sums}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style")]


def test_the_command_writes_the_page(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages" / "study.html"
    assert main(["page", str(study), "--prompt", "list", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert data_of(out.read_text(encoding="utf-8"))["prompts"] == ["list"]


def test_the_page_writes_texts_as_texts_only() -> None:
    code = "".join(path.read_text("utf-8") for path in (FOLDER / "script").glob("*.js"))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in code
    assert "fetch(" not in code


def test_every_script_of_the_folder_is_in_the_page() -> None:
    assert {path.stem for path in (FOLDER / "script").iterdir()} == set(page_build.SCRIPTS)


def test_vendored_files_are_what_their_sums_say() -> None:
    listed = re.findall(r"    ([0-9a-f]{64})  (\S+)", (FOLDER / "vendor/README.md").read_text())
    assert len(listed) == 3
    for digest, name in listed:
        assert hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest() == digest


def test_runs_that_failed_or_broke_off_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path / "s" / "good", feedback__strength=0.5)
    make_run(tmp_path / "s" / "bad", state="failed")
    make_run(tmp_path / "s" / "cut", state="running")
    data = data_of(build(load(str(tmp_path / "s"))))
    assert {(one["id"], one["reason"]) for one in data["leftOut"]} == {
        ("bad", "failed"),
        ("cut", "running"),
    }
    assert "2 runs are failed or unfinished" in data["finding"]


def test_runs_without_trajectories_are_a_table(study: Path) -> None:
    runs = load(str(study))
    bare = {key: replace(run, trajectory=None) for key, run in runs.saved.items()}
    data = data_of(build(replace(runs, saved=bare), limit=0))
    assert data["texts"] == []
    assert len(data["runs"]) == 6
    assert data["finding"].startswith("Fed back, the model's estimates came to rest in ")


def test_passes_of_several_seeds_are_a_mean_with_one_digit(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for seed, passes in enumerate((9, 11, 9)):
        run = make_run(tmp_path / f"r{seed}", prompts={"p": "a b c"}, seed=seed)
        summary = json.loads((run / "summary.json").read_text())
        summary["overall"]["iterations_to_tolerance"] = passes
        (run / "summary.json").write_text(json.dumps(summary))
    (row,) = data_of(build(load(str(tmp_path))))["rows"]
    assert (row["count"], row["measures"][1]) == (3, 9.7)


def test_settings_that_differ_are_columns_and_the_familiar_come_first(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for number, (kind, damping) in enumerate((("log_prob", 1.0), ("prob", 0.5))):
        make_run(
            tmp_path / "s" / f"r{number}",
            feedback__kind=kind,
            recompute__damping=damping,
            prompts={"p": "one two three"},
        )
    data = data_of(build(load(str(tmp_path / "s"))))
    assert data["settings"] == ["kind", "damping"]
    assert [run["settings"] for run in data["runs"]] == [["log_prob", "1"], ["prob", "0.5"]]


def test_a_carried_step_has_its_plain_estimates_from_a_cold_run(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for start in ("cold", "carried"):
        make_run(
            tmp_path / "s" / start,
            prompts={"p": "one two three four five"},
            steps=2,
            feedback__strength=0.5,
            recompute__start=start,
        )
    alone = data_of(build(load(str(tmp_path / "s" / "carried"))))
    assert [text[-1] for text in alone["texts"]] == [0, None, None]
    both = data_of(build(load(str(tmp_path / "s"))))
    places = {run["id"]: place for place, run in enumerate(both["runs"])}
    for place, (run, _, step, *_, plain) in enumerate(both["texts"]):
        own = run == places["cold"] or step == 0
        other = both["texts"][plain]
        assert plain == place if own else (other[0], other[2]) == (places["cold"], step)
    status = tmp_path / "s" / "cold" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"model_hash": "of others"}))
    others = data_of(build(load(str(tmp_path / "s"))))  # weights, under one name and path
    plain = [text[-1] for text in others["texts"] if text[0] == places["carried"]]
    assert [place is None for place in plain] == [False, True, True]


def test_every_step_of_a_carried_run_that_feeds_nothing_back_is_plain(
    make_run: MakeRun, tmp_path: Path
) -> None:
    changes = {"feedback__strength": 0.0, "recompute__start": "carried"}
    make_run(tmp_path / "r", prompts={"p": "one two three four"}, steps=2, **changes)
    data = data_of(build(load(str(tmp_path))))
    assert [text[-1] for text in data["texts"]] == [0, 1, 2]


def runs_frame(**columns: list) -> pd.DataFrame:
    count = len(columns["strength"])
    usual = {
        "kind": ["log_prob"] * count,
        "variant": [""] * count,
        "outcome": ["settled"] * count,
        "iterations_to_tolerance": [3] * count,
        "ends_by_theorem": [True] * count,
        "runs": [1] * count,
    }
    return pd.DataFrame({**usual, **columns})


def test_the_finding_claims_no_more_than_its_intervals() -> None:
    runs = runs_frame(strength=[-1.0, -0.1, 1.0])
    changes = {
        0: Interval(1.0, 0.92, 1.08, "tokens"),
        1: Interval(-0.017, -0.043, 0.009, "tokens"),
        2: Interval(-0.55, -0.61, -0.49, "tokens"),
    }
    assert finding(runs, runs, changes, longest=5, left_out=1) == (
        "Fed back, the model's estimates came to rest in all 3 runs, as good as final in at "
        "most 3 passes (4 are guaranteed). With feedback the model predicts worse in 1 of 3 runs, "
        "by 1.000 ± 0.080 nats a token (β = −1), better in 1 of 3 runs, by 0.550 ± 0.060 nats a "
        "token (β = 1), neither clearly in 1. 1 run is failed or unfinished and not shown."
    )
    assert finding(runs[1:2], runs[1:2], {1: changes[1]}, longest=5, left_out=0).endswith(
        "The model predicts neither clearly worse nor better: by −0.017 ± 0.026 nats a token."
    )


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (3.0, 0.5, "3.00 ± 0.50"),
        (-0.024, 0.0185, "0.024 ± 0.018"),
        (0.007, 0.0038, "0.0070 ± 0.0038"),
    ],
)
def test_an_effect_has_two_digits_of_its_interval(mean: float, half: float, said: str) -> None:
    runs = runs_frame(strength=[0.5])
    change = {0: Interval(mean, mean - half, mean + half, "tokens")}
    assert f"by {said} nats a token" in finding(runs, runs, change, longest=5, left_out=0)


def test_the_finding_names_the_setting_whose_effect_it_gives() -> None:
    runs = runs_frame(strength=[1.0, 1.0], variant=["model a", "model b"])
    changes = {n: Interval(mean, mean - 0.1, mean + 0.1, "tokens") for n, mean in enumerate((1, 2))}
    said = finding(runs, runs, changes, longest=5, left_out=0)
    assert said.endswith("by up to 2.00 ± 0.10 nats a token (β = 1, model b).")


def test_the_finding_promises_no_bound_where_there_is_none() -> None:
    damped = runs_frame(strength=[0.5], ends_by_theorem=[False])
    assert "guaranteed" not in finding(damped, damped, {}, longest=9, left_out=0)
    lost = runs_frame(strength=[0.5], outcome=["diverged"], iterations_to_tolerance=[np.nan])
    said = finding(lost, lost, {}, longest=9, left_out=0)
    assert said == "Fed back, the model's estimates did not come to rest in the passes given."


def test_the_finding_speaks_of_what_is_fed_back_and_owns_what_it_does_not_know() -> None:
    runs = runs_frame(strength=[0.0, 0.5, 1.0], iterations_to_tolerance=[1.0, np.nan, 3.0])
    change = {2: Interval(1.0, 0.9, 1.1, "tokens")}
    assert finding(runs, runs, change, longest=5, left_out=0) == (
        "Fed back, the model's estimates came to rest in all 2 runs. With feedback the model "
        "predicts worse, by 1.00 ± 0.10 nats a token (β = 1); the interval of 1 more is not known."
    )
    none = {2: Interval(-0.02, -0.05, 0.01, "tokens")}
    assert finding(runs, runs, none, longest=5, left_out=0).endswith(
        "nor better: by −0.020 ± 0.030 nats a token; the interval of 1 more is not known."
    )
    more = runs_frame(strength=[0.5, 1.0, 2.0])
    assert finding(more, more, {1: none[2], 2: none[2]}, longest=5, left_out=0).endswith(
        "In none of 2 runs with feedback does the model clearly predict worse or better; the "
        "interval of 1 more is not known."
    )
    plain = runs[:1]
    said = finding(plain, plain, {}, longest=5, left_out=0)
    assert said == "Nothing was fed back: this is the plain model."


def test_the_finding_speaks_of_hidden_states_that_are_fed_back_beside_a_strength_of_zero(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for hidden in (0.0, 1.0):
        changes = {"feedback__strength": 0.0, "feedback__hidden_strength": hidden}
        run = make_run(tmp_path / f"r{hidden:g}", prompts={"p": "one two three"}, **changes)
    trajectory = pd.read_parquet(run / "trajectory.parquet")
    trajectory.loc[trajectory["iteration"] > 1, "log_prob"] -= 0.25
    trajectory.to_parquet(run / "trajectory.parquet")
    said = data_of(build(load(str(tmp_path))))["finding"]
    assert "in all" not in said, "one run is fed anything"
    assert said.endswith(
        "With feedback the model predicts worse, by 0.2500 ± 0.0000 nats a token "
        "(β = 0, hidden_strength 1)."
    )


def test_of_some_prompts_no_rest_is_claimed(study: Path) -> None:
    data = data_of(build(load(str(study)).only(run_ids=(), prompt_ids=["list"])))
    assert "rest" not in data["finding"]
    assert data["finding"] == (
        "In none of 5 runs with feedback does the model clearly predict worse or better."
    )
