"""What lies in a run folder, and that its numbers are the library's."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from experiments.converge.run import generator
from experiments.converge.settings import ConvergeSettings, GenerationSettings
from experiments.settings import parse
from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Sampling, Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.scoring import score_tokens
from tests.recording import Recording, Seen
from tests.recording import trajectory as trajectory_of

Converge = Callable[..., tuple[int, str, str]]
Runs = Callable[[], list[Path]]
Compute = Callable[..., Path]

FILES = {"config.yaml", "status.json", "trajectory.parquet", "iterations.parquet", "summary.json"}
TRAJECTORY = ["prompt_id", "step", "iteration", "position", "token_id", "token", "log_prob"]
ITERATIONS = [
    "prompt_id",
    "step",
    "iteration",
    "step_max",
    "step_rms",
    "settled_prefix",
    "oracle_error_max",
    "nll",
    "kl_step",
    "kl_effect",
    "hidden_step_norm",
]
BUILT_IN = Path(__file__).parents[2] / "experiments" / "converge" / "prompts.jsonl"
BLOCK = 32  # of the tiny model
EXACT = 1e-10  # nats, float64: roundings of a dozen passes, which other orders of sums leave


def built_in_text(number: int, *, tokens: int) -> tuple[str, bytes]:
    """Id and first bytes of a built-in prompt; a byte is a token of the tiny model."""
    entry = json.loads(BUILT_IN.read_text(encoding="utf-8").splitlines()[number])
    return entry["id"], entry["text"].encode()[:tokens]


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    return (
        pq.read_table(folder / "trajectory.parquet").to_pandas(),
        pq.read_table(folder / "iterations.parquet").to_pandas(),
        json.loads((folder / "summary.json").read_text(encoding="utf-8")),
    )


def passes(
    model: GPT, tokens: bytes | list[int], feedback: Feedback, config: RecomputeConfig
) -> list[Seen]:
    """Every pass over a text, by the library's loop alone."""
    with torch.no_grad():
        return trajectory_of(model, torch.tensor([list(tokens)]), feedback, config)[1]


def estimates_of(rows: pd.DataFrame, *, tokens: int) -> np.ndarray:
    """(N, T) estimates; the first token's is missing, which counts as probability 1."""
    estimates = rows["log_prob"].to_numpy().reshape(-1, tokens).copy()
    assert np.isnan(estimates[:, 0]).all(), "nothing predicts the first token"
    estimates[:, 0] = 0.0
    assert not np.isnan(estimates).any()
    return estimates


@torch.no_grad()
def mean_kl(model: GPT, p_hidden: torch.Tensor, q_hidden: torch.Tensor) -> float:
    """KL(P || Q) from all logits at once, in float64."""
    weight = model.lm_head.weight.double()
    p = (p_hidden.double() @ weight.T).log_softmax(dim=-1)
    q = (q_hidden.double() @ weight.T).log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


# --- files and columns --------------------------------------------------------------------------


def test_a_finished_run_is_exactly_the_documented_files(
    converge: Converge, runs: Runs, tmp_path: Path
) -> None:
    assert converge()[0] == 0
    (folder,) = runs()
    assert {path.name for path in folder.iterdir()} == FILES  # tracking is disabled: no wandb/
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_a_sweep_leaves_run_folders_and_its_plan(
    runs: Runs, command: Callable[..., list[str]], in_process: Converge
) -> None:
    code, _, _ = in_process("converge", "-m", *command("feedback.strength=0,1")[3:])
    assert code == 0
    assert len(runs()) == 2
    for folder in runs():
        assert {path.name for path in folder.iterdir()} == FILES
    others = {path.name for path in runs()[0].parent.iterdir()} - {path.name for path in runs()}
    assert others == {".sweep"}


def test_the_saved_configuration_is_the_resolved_one(converge: Converge, runs: Runs) -> None:
    converge(
        "feedback.strength=1e-1",
        "generation=sample",
        "seed=3",
        "feedback.layers=[1,0,1]",
        "experiment=null",
    )
    saved: Any = OmegaConf.to_container(OmegaConf.load(runs()[0] / "config.yaml"))
    settings = parse(saved, ConvergeSettings)
    assert settings.plain() == saved
    assert settings.feedback.strength == 0.1
    assert settings.feedback.layers == (0, 1), "each once, in their order"
    assert settings.generation.seed == 3, "interpolations are resolved"
    assert "${" not in (runs()[0] / "config.yaml").read_text()


def test_status_says_where_the_run_comes_from(
    converge: Converge, runs: Runs, status: Callable[[Path], dict[str, Any]]
) -> None:
    converge()
    found = status(runs()[0])
    assert found["state"] == "finished"
    assert found["run_id"] == runs()[0].name
    assert found["error"] is None
    assert found["started"] < found["finished"]
    assert {"commit", "dirty", "device", "versions", "command"} <= set(found)
    recorded = found["versions"]["torch"]
    # what pip knows of it may lack the mark of its build, such as +cu130
    assert recorded in (torch.__version__, torch.__version__.partition("+")[0])
    assert found["device"].startswith("cpu")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float"), ("float64", "double"), ("bfloat16", "float")]
)
def test_columns_and_their_types(compute: Compute, dtype: str, stored: str) -> None:
    folder = compute(f"device.dtype={dtype}", "prompts.limit=1")
    trajectory = pq.read_schema(folder / "trajectory.parquet")
    assert trajectory.names == TRAJECTORY
    assert str(trajectory.field("log_prob").type) == stored
    for name in ("step", "iteration", "position", "token_id"):
        assert str(trajectory.field(name).type).startswith("int")
    iterations = pq.read_schema(folder / "iterations.parquet")
    assert iterations.names == ITERATIONS
    assert str(iterations.field("settled_prefix").type).startswith("int")
    for name in ("step_max", "step_rms", "oracle_error_max", "nll", "kl_step", "kl_effect"):
        assert str(iterations.field(name).type) == "double"
    for field in (*trajectory, *iterations):
        assert field.metadata[b"meaning"], field.name


def test_there_is_a_row_for_every_prompt_step_iteration_and_position(compute: Compute) -> None:
    folder = compute(
        "generation.max_new_tokens=3", "recompute.iterations=4", "recompute.tolerance=0"
    )
    trajectory, iterations, _ = tables(folder)
    expected = [
        (built_in_text(number, tokens=12)[0], step, iteration, position)
        for number in range(2)
        for step in range(4)
        for iteration in range(1, 5)
        for position in range(12 + step)
    ]
    columns = ["prompt_id", "step", "iteration", "position"]
    assert list(trajectory[columns].itertuples(index=False, name=None)) == expected
    rows = list(dict.fromkeys(row[:3] for row in expected))
    assert list(iterations[columns[:3]].itertuples(index=False, name=None)) == rows


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind.value for kind in FeedbackKind])
def test_every_number_equals_an_independent_computation(
    compute: Compute, checkpoint_folder: Path, kind: str
) -> None:
    damping = {"logit": 0.75}.get(kind, 1.0)
    folder = compute(
        *(f"feedback.kind={kind}", "feedback.strength=-0.7", "feedback.layers=[1]"),
        *("device.dtype=float64", f"recompute.damping={damping}", "prompts.max_tokens=20"),
        "recompute.tolerance=0",
    )
    trajectory, iterations, summary = tables(folder)
    model = load_checkpoint(checkpoint_folder, dtype=torch.float64).model
    feedback = Feedback(FeedbackKind(kind), -0.7, layers=frozenset([1]))
    config = RecomputeConfig(iterations=12, tolerance=0, damping=damping)
    for number in range(2):
        name, text = built_in_text(number, tokens=20)
        seen = passes(model, text, feedback, config)
        ours = trajectory[trajectory["prompt_id"] == name]
        assert list(ours["token_id"]) == list(text) * 12
        assert list(ours["token"]) == [chr(byte) for byte in text] * 12
        estimates = estimates_of(ours, tokens=20)
        wanted = np.stack([iteration.log_probs[0].numpy() for iteration in seen])
        # two texts at once add float64 in another order than one by one
        np.testing.assert_allclose(estimates, wanted, rtol=0, atol=EXACT)

        rows = iterations[iterations["prompt_id"] == name].reset_index(drop=True)
        assert list(rows["iteration"]) == list(range(1, 13))
        steps = np.abs(np.diff(estimates, axis=0))
        assert pd.isna(rows["step_max"][0])
        assert pd.isna(rows["step_rms"][0])
        assert pd.isna(rows["kl_step"][0])
        np.testing.assert_allclose(rows["step_max"][1:], steps.max(axis=1), rtol=1e-12)
        np.testing.assert_allclose(
            rows["step_rms"][1:], np.sqrt((steps**2).mean(axis=1)), rtol=1e-12
        )
        with torch.no_grad():
            final = left_to_right(model, torch.tensor([list(text)]), feedback)[0].numpy()
        distance = np.abs(estimates - final)
        # the reader evaluates token by token: other shapes, other roundings of float64
        np.testing.assert_allclose(
            rows["oracle_error_max"], distance.max(axis=1), rtol=1e-9, atol=1e-11
        )
        away = distance > 1e-3
        prefixes = [int(row.argmax()) if row.any() else 20 for row in away]
        assert list(rows["settled_prefix"]) == prefixes
        np.testing.assert_allclose(rows["nll"], -estimates[:, 1:].mean(axis=1), rtol=1e-12)
        hidden = [iteration.hidden[0] for iteration in seen]
        effects = [mean_kl(model, hidden[0], now) for now in hidden]
        # a KL near 0 is a difference of rounded numbers
        np.testing.assert_allclose(rows["kl_effect"], effects, rtol=1e-9, atol=1e-13)
        between = [mean_kl(model, a, b) for a, b in pairwise(hidden)]
        np.testing.assert_allclose(rows["kl_step"][1:], between, rtol=1e-9, atol=1e-13)
        if kind != "none":
            assert effects[-1] > 1e-3, "nothing was fed back: this test would prove nothing"

        part = summary["prompts"][number]
        assert part["prompt_id"] == name
        assert part["text"] == text.decode()
        assert part["prompt_tokens"] == 20
        assert part["nll"] == rows["nll"].iloc[-1]
        assert part["kl_effect"] == rows["kl_effect"].iloc[-1]
        assert part["oracle_error_max"] == rows["oracle_error_max"].iloc[-1]
        plain = score_tokens(model, hidden[0][None], torch.tensor([list(text)])).log_probs[0, 1:]
        assert part["nll_plain"] == pytest.approx(-plain.mean().item(), rel=1e-12)
        within = [bool(row.max() <= 1e-3) for row in distance]
        reached = next((n + 1 for n in range(12) if all(within[n:])), None)
        assert part["iterations_to_tolerance"] == reached


def test_the_summary_of_the_run_is_that_of_its_prompts(compute: Compute) -> None:
    folder = compute("prompts.limit=3", "prompts.max_tokens=24", "recompute.iterations=4")
    _, iterations, summary = tables(folder)
    overall, prompts = summary["overall"], summary["prompts"]
    assert summary["run_id"] == folder.name
    assert overall["prompts"] == len(prompts) == 3
    assert overall["iterations"] == len(iterations)
    for key in ("nll", "nll_plain", "kl_effect", "oracle_error_max", "lyapunov"):
        values = [prompt[key] for prompt in prompts]
        assert None not in values
        assert overall[key] == pytest.approx(np.mean(values), rel=1e-12)
    assert overall["outcome"] == "iteration_limit"
    assert overall["iterations_to_tolerance"] is None, "missing where a prompt's is missing"


def test_a_missing_number_is_null_never_a_sentinel(compute: Compute) -> None:
    folder = compute("prompts.max_tokens=1", "recompute.iterations=2")
    trajectory, iterations, summary = tables(folder)
    assert trajectory["log_prob"].isna().all(), "nothing predicts the first token"
    assert iterations["nll"].isna().all()
    part = summary["prompts"][0]
    assert (part["nll"], part["nll_plain"], part["rate"], part["lyapunov"]) == (None,) * 4
    assert "NaN" not in (folder / "summary.json").read_text()


def test_a_tolerance_ends_each_prompt_on_its_own(compute: Compute, checkpoint_folder: Path) -> None:
    folder = compute("recompute.tolerance=0.5", "prompts.limit=4", "prompts.max_tokens=30")
    trajectory, _, summary = tables(folder)
    model = load_checkpoint(checkpoint_folder).model
    counts = []
    for number in range(4):
        name, text = built_in_text(number, tokens=30)
        seen = passes(
            model, text, Feedback(strength=0.5), RecomputeConfig(iterations=12, tolerance=0.5)
        )
        ours = trajectory[trajectory["prompt_id"] == name]
        assert ours["iteration"].max() == len(seen) == summary["prompts"][number]["iterations"]
        counts.append(len(seen))
    assert min(counts) < 12


def test_the_stored_numbers_of_a_float32_run_are_its_own(
    compute: Compute, checkpoint_folder: Path
) -> None:
    folder = compute("prompts.limit=1", "recompute.tolerance=0")
    trajectory, _, _ = tables(folder)
    seen = passes(
        load_checkpoint(checkpoint_folder).model,
        built_in_text(0, tokens=12)[1],
        Feedback(strength=0.5),
        RecomputeConfig(iterations=12, tolerance=0),
    )
    wanted = np.stack([iteration.log_probs[0].numpy() for iteration in seen])
    assert trajectory["log_prob"].dtype == np.float32
    # a few roundings: matrices of another shape are summed in another order
    np.testing.assert_allclose(
        estimates_of(trajectory, tokens=12), wanted, rtol=16 * np.finfo(np.float32).eps
    )


# --- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["cold", "carried"])
@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_a_generation_run_is_the_librarys_generate_past_the_block_too(
    compute: Compute, checkpoint_folder: Path, start: str, strategy: str
) -> None:
    length, new = 28, 8  # ends 4 tokens past the block
    folder = compute(
        *(
            f"generation.strategy={strategy}",
            f"generation.max_new_tokens={new}",
            "generation.top_k=40",
        ),
        *("generation.temperature=1.3", "generation.seed=5", "seed=2", "device.dtype=float64"),
        *(f"recompute.start={start}", "recompute.iterations=3", f"prompts.max_tokens={length}"),
        "recompute.tolerance=0",
    )
    trajectory, iterations, summary = tables(folder)
    model = load_checkpoint(checkpoint_folder, dtype=torch.float64).model
    settings = ConvergeSettings(seed=2, generation=GenerationSettings(seed=5))
    for number in range(2):
        name, text = built_in_text(number, tokens=length)
        recording = Recording(model)
        result = generate(
            model,
            [list(text)],
            max_new_tokens=new,
            feedback=Feedback(strength=0.5),
            config=RecomputeConfig(iterations=3, tolerance=0),
            start=Start(start),
            sampling=Sampling(
                temperature=1.3 if strategy == "sample" else None,
                top_k=40,
                vocab_size=257,
                end_tokens=[256],
            ),
            generators=[generator(settings, number, torch.device("cpu"))],
            watch=recording,
        )
        seen = [
            (w, w.starts[0], one)
            for w, passes_ in zip(recording.windows, recording.passes, strict=True)
            for one in passes_
        ]
        ours = trajectory[trajectory["prompt_id"] == name]
        tokens = result.tokens[0]
        wanted = np.concatenate([one.log_probs[0].numpy() for _, _, one in seen])
        positions = [begin + i for w, begin, _ in seen for i in range(w.lengths[0])]
        first = np.array([position == begin for w, begin, _ in seen for position in
                          range(begin, begin + w.lengths[0])])  # fmt: skip
        assert ours["log_prob"][first].isna().all(), "nothing predicts the first of a window"
        np.testing.assert_allclose(ours["log_prob"][~first], wanted[~first], rtol=0, atol=EXACT)
        assert list(ours["position"]) == positions
        assert list(ours["token_id"]) == [tokens[position] for position in positions]
        assert list(ours["step"]) == [w.step for w, _, _ in seen for _ in range(w.lengths[0])]

        last = ours[ours["step"] == len(tokens) - length]
        assert len(tokens) > BLOCK, "this text must slide out of the block"
        assert last["position"].min() == len(tokens) - BLOCK, "positions are of the whole text"
        assert last["position"].max() == len(tokens) - 1

        rows = iterations[iterations["prompt_id"] == name]
        with torch.no_grad():
            effects = [mean_kl(model, model.read(w.tokens)[0], one.hidden[0]) for w, _, one in seen]
        np.testing.assert_allclose(rows["kl_effect"], effects, rtol=1e-9, atol=1e-13)
        for step, group in rows.groupby("step"):
            assert list(group["iteration"]) == [1, 2, 3]
            window = tokens[: length + step][-BLOCK:]
            with torch.no_grad():
                final = left_to_right(model, torch.tensor([window]), Feedback(strength=0.5))[
                    0
                ].numpy()
            mine = estimates_of(ours[ours["step"] == step], tokens=len(window))
            np.testing.assert_allclose(
                group["oracle_error_max"], np.abs(mine - final).max(axis=1), rtol=1e-9, atol=1e-11
            )
        part = summary["prompts"][number]
        assert part["generated_tokens"] == len(tokens) - length
        drawn = (bytes([i]) if i < 256 else b"<|endoftext|>" for i in tokens[length:])
        assert part["generated_text"] == b"".join(drawn).decode(errors="replace")


def test_sampling_depends_on_the_seed_and_on_nothing_else(compute: Compute) -> None:
    def texts(*overrides: str) -> list[str]:
        folder = compute(
            *("generation.strategy=sample", "generation.max_new_tokens=20"),
            *("recompute.iterations=2", *overrides),
        )
        return [part["generated_text"] for part in tables(folder)[2]["prompts"]]

    once = texts("seed=1")
    assert texts("seed=1", "reporting_tolerance=0.01") == once
    assert texts("seed=2") != once
    # a prompt's draws do not depend on how many others there are
    assert texts("seed=1", "prompts.limit=1") == once[:1]
