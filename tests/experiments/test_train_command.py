"""Training from the command line: it learns, resumes to the same bits, and says what it made."""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from analysis import load
from analysis.read.saved import SourceError
from experiments.runs import provenance
from experiments.runs.files import read_json
from experiments.runs.provenance import Changes
from experiments.tracking.tracker import stop_helper
from experiments.train import run as training
from experiments.train.__main__ import main
from experiments.train.corpus import read_corpus
from scripts import held_out_loss
from stateful_gpt.checkpoint import load_checkpoint, save_checkpoint
from stateful_gpt.depth import depth_profile
from stateful_gpt.feedback import Feedback
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import left_to_right
from stateful_gpt.tokenizer import Characters, decode, load_tokenizer, save_tokenizer
from tests.experiments.test_tracking import records, values
from tests.forked import Forked
from tests.wandb_server import WandbServer

Called = tuple[int, str, str]
Train = Callable[..., Called]
Start = Callable[..., Forked]

DEADLINE = 120.0
ROOT = Path(__file__).parents[2]
WORDS = ["the dog", "a cat", "the old horse", "ran home", "slept", "and then", "said nothing", "."]


def text(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(words)) + "\n"


def settings_in(place: Path) -> list[str]:
    """A training of a second or two, on a few kilobytes, into ``place / "out"``."""
    for name, seed, words in [("train", 1, 700), ("held_out", 2, 60)]:
        (place / name).mkdir()
        (place / name / "text.txt").write_text(text(seed, words), encoding="utf-8")
    return [
        f"corpus.train={place / 'train'}",
        f"corpus.held_out={place / 'held_out'}",
        f"output={place / 'out'}",
        "tokenizer=byte",
        "device=cpu",
        "tracking.mode=disabled",
        *("architecture.block_size=16", "architecture.vocab_size=257", "architecture.n_layer=2"),
        *("architecture.n_head=2", "architecture.n_embd=16", "architecture.dropout=0.1"),
        *("training.steps=60", "training.batch_size=8", "training.warmup_steps=5"),
        *("training.evaluate_every=20", "training.precision=float32"),
    ]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return settings_in(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a finished training of two steps, and its settings."""
    place = tmp_path_factory.mktemp("trained")
    words = [*settings_in(place), "training.steps=2", "tokenizer=bpe"]
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train", *words])
        assert main() == 0
    return place / "out", words


@pytest.fixture
def train(in_process: Train, settings: list[str]) -> Train:
    def call(*overrides: str) -> Called:
        return in_process("train", *settings, *overrides)

    return call


# --- what comes of it ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_it_learns_and_the_folder_is_a_model_whose_card_states_its_loss(
    train: Train,
    tmp_path: Path,
    tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids = {"byte": 257, "bpe": 300}[tokenizer]
    code, out, err = train(f"tokenizer={tokenizer}", f"architecture.vocab_size={ids}")
    assert (code, err) == (0, "")
    folder = tmp_path / "out"
    losses = [row["held_out_loss"] for row in json.loads((folder / "history.json").read_text())]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]

    checkpoint = load_checkpoint(folder)
    # a corpus of so few words can run out of pairs to merge
    known = checkpoint.tokenizer.n_vocab
    assert known == 257 if tokenizer == "byte" else 257 < known <= ids
    held_out = (tmp_path / "held_out" / "text.txt").read_text()
    corpus = read_corpus("k", [held_out], checkpoint.tokenizer, block_size=16, lines=False)
    profile = depth_profile(checkpoint.model, corpus.windows(), depth=0, full=False)
    per_character = profile.nll[0] * profile.tokens / len(held_out)
    tokens = corpus.tokens
    card = (folder / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\*\*([\d.]+) nats per character\*\*", card)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(per_character, abs=5e-5)  # four digits are written
    assert f"{per_character:.4f} nats per character" in out
    assert f"{checkpoint.model.count_parameters():,} parameters" in card
    seconds = json.loads((folder / "history.json").read_text())[-1]["seconds"]
    (stated_seconds,) = re.findall(r"time \| ([\d,.]+) s \|", card)
    assert float(stated_seconds.replace(",", "")) >= seconds > 0
    (measured,) = re.findall(r"measured by \| `python -m scripts\.held_out_loss (.+)` \|", card)
    words = measured.replace("THIS_FOLDER", str(folder)).split()
    monkeypatch.setattr(sys, "argv", ["held_out_loss", *words])
    capfd.readouterr()
    assert held_out_loss.main() == 0
    assert f"{stated[1]} nats per character" in capfd.readouterr().out
    uniform = torch.tensor(float(ids)).log().item()
    assert losses[-1] < 0.75 * uniform, "it knows far more than that there are so many ids"
    if tokenizer == "bpe":
        assert decode(checkpoint.tokenizer, tokens[1:].tolist()) == held_out
        assert len(tokens) < 0.6 * len(held_out), "words became tokens"


@pytest.mark.parametrize(("windows", "told"), [(3, True), (10_000, False)])
def test_a_loss_on_a_part_of_the_text_is_stated_as_one(
    train: Train, tmp_path: Path, windows: int, told: bool
) -> None:
    code, out, err = train("training.steps=2", f"training.final_windows={windows}")
    assert (code, err) == (0, "")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    part = f"nats per character (on {windows} windows spread over it)"
    assert (part in card.replace("**", ""), part in out) == (told, told)


def test_a_card_names_the_files_that_were_read_whatever_becomes_of_them(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "train" / os.fsdecode(b"caf\xe9.txt")  # no UTF-8
    named.write_text("the dog ran home ")
    save = training.save_checkpoint

    def at_the_end(*arguments: object, **named: object) -> None:
        (tmp_path / "train" / "later.txt").touch()
        save(*arguments, **named)

    monkeypatch.setattr(training, "save_checkpoint", at_the_end)
    code, _, err = train("training.steps=1")
    assert (code, err) == (0, "")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| trained on | caf\\udce9, text (" in card


def test_a_card_says_whether_the_source_was_that_of_its_commit_when_it_began(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, words in [(0, ""), (9, ", with uncommitted changes")]:  # new data leave a patch empty
        folder = tmp_path / str(size)

        def found(size: int = size, folder: Path = folder) -> Changes:
            edited = (folder / "history.json").exists()  # while it trained, or taken back
            return Changes(b"", {"sha256": "5e", "bytes": 9 - size if edited else size})

        monkeypatch.setattr(provenance, "changes", found)
        assert train("training.steps=1", f"output={folder}")[0] == 0
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert re.search(rf"\| commit \| (None|\w{{40}}){words} \|", card)


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_a_model_called_like_a_tokenizer_keeps_its_own(
    train: Train, tmp_path: Path, name: str
) -> None:
    words = ("tokenizer=bpe", "architecture.vocab_size=300", "training.steps=2")
    code, _, err = train(*words, f"output={tmp_path / name}")
    assert (code, err) == (0, "")
    encoding = load_checkpoint(tmp_path / name).tokenizer
    assert encoding.n_vocab > 257
    assert encoding.encode_ordinary("dog") != list(b"dog"), "its words are in it"
    tuned = (f"start_from={tmp_path / name}", f"output={tmp_path / 'tuned'}")
    assert train(*words, *tuned)[0] == 0
    assert load_checkpoint(tmp_path / "tuned").tokenizer.n_vocab == encoding.n_vocab


def test_a_finished_training_is_not_touched_again(train: Train, tmp_path: Path) -> None:
    train()
    folder = tmp_path / "out"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    code, out, _ = train()
    assert code == 0
    assert "nothing to do" in out
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert after == before
    assert not [path for path in before if path.name.startswith(".")], "nothing half-written"


def test_a_finished_training_that_cannot_be_written_is_reported(
    train: Train, tmp_path: Path, freeze: Callable[[Path], None]
) -> None:
    train("training.steps=2")
    freeze(tmp_path / "out")
    assert train("training.steps=2") == (
        0,
        f"{tmp_path / 'out'} is trained already: nothing to do\n",
        "",
    )


# --- killed and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_training_resumes_to_the_same_bits(
    start: Start, train: Train, settings: list[str], tmp_path: Path, kills: int
) -> None:
    steps = ("training.steps=150", "training.evaluate_every=25")
    words = [sys.executable, "-m", "experiments.train", *settings, *steps]
    words += ["training.save_every_seconds=0"]
    state = tmp_path / "out" / "training_state.pt"
    chance = random.Random(kills)
    for _ in range(kills):
        process = start(words)
        deadline, saved, last = time.monotonic() + DEADLINE, 0, None
        wanted = chance.randint(1, 12)
        while saved < wanted and process.poll() is None:  # saves seen since it began
            assert time.monotonic() < deadline
            now = state.stat().st_mtime_ns if state.exists() else None
            saved += now != last and now is not None
            last = now
            time.sleep(0.001)
        assert process.poll() is None or kills > 1, "it was to be killed on its way"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if kills == 1:
        assert not (tmp_path / "out" / "model.safetensors").exists()
    code, _, err = train(*steps, "training.save_every_seconds=0")
    assert (code, err) == (0, "")
    assert train(*steps, "training.save_every_seconds=0", f"output={tmp_path / 'whole'}")[0] == 0
    for name in ("model.safetensors", "config.json"):
        one, other = (tmp_path / folder / name for folder in ("out", "whole"))
        assert one.read_bytes() == other.read_bytes(), name
    histories = [
        [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in json.loads((tmp_path / folder / "history.json").read_text())
        ]
        for folder in ("out", "whole")
    ]
    assert histories[0] == histories[1]
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("out", "whole")]
    assert names[0] == names[1], "what the killed attempts left half-written is gone"


def test_a_training_that_is_resumed_elsewhere_says_so(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = {**provenance.provenance(torch.device("cpu")), "commit": "now"}
    now = ("now", 1, True)
    for commit, threads, warned in [("before", 7, False), now, now, ("before", 7, True)]:
        found = {
            **origin,
            "commit": commit,
            "threads": threads,
            "device": f"a CPU, {threads} threads",
        }
        monkeypatch.setattr(training, "provenance", lambda _, found=found: found)
        code, _, err = train("training.steps=2")
        said = f"{tmp_path / 'out'}: of its first 2 steps, an earlier attempt computed some with"
        said += " another commit, other threads; its README.md will say which"
        assert (code, err) == (0, f"warning: {said}\n" if warned else "")
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        (tmp_path / "out" / "README.md").unlink()  # as if killed before the end
    assert "| hardware | a CPU, 7 threads, then a CPU, 1 thread |" in card
    assert re.search(r"\| commit \| before(, with uncommitted changes)?, then now", card)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_killed_training_that_is_resumed_is_one_curve_of_wandb(
    start: Start,
    train: Train,
    settings: list[str],
    tmp_path: Path,
    wandb_server: WandbServer,
    mode: str,
) -> None:
    steps = ("training.steps=150", "training.evaluate_every=25", f"tracking.mode={mode}")
    steps += ("training.save_every_seconds=0",)
    process = start([sys.executable, "-m", "experiments.train", *settings, *steps])
    out, deadline = tmp_path / "out", time.monotonic() + DEADLINE
    while len(read_json(out / "history.json") or []) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "README.md").exists(), "it was killed on its way"
    code, _, err = train(*steps)
    assert (code, err) == (0, "")
    stop_helper()  # W&B's process is still writing when an offline run has ended
    (place,) = out.glob("wandb/*run-*/*.wandb")
    if mode == "online":
        (run,) = wandb_server.runs.values()
        assert run.exit_code == 0
        history = run.history
    else:
        found = [r for r in records(place) if r.WhichOneof("record_type") == "history"]
        history = [values(r.history.item) for r in found]
        assert not wandb_server.runs
    kept = json.loads((out / "history.json").read_text())
    for name in ("step", "held_out_loss", "train_loss"):
        assert [row[name] for row in history] == [row[name] for row in kept], name


def test_a_training_killed_at_its_very_first_file_can_begin(train: Train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".training.yaml.k3j4x").write_text("corpus:\n  tra")
    code, _, err = train("training.steps=2")
    assert (code, err) == (0, "")
    assert not list((tmp_path / "out").glob(".*"))


Tuned = tuple[tuple[str, ...], Callable[[], None]]


@pytest.fixture(params=["train", "held_out", "start", "tokenizer"])
def tuned(train: Train, tmp_path: Path, request: pytest.FixtureRequest) -> Tuned:
    """The words of a training that is done, and what changes what it has read."""
    start = ("training.steps=1", f"output={tmp_path / 'start'}")
    words = ("training.steps=2", f"start_from={tmp_path / 'start'}")
    characters = sorted(set(text(1, 700)))
    tokenizer = tmp_path / "t.json"
    save_tokenizer(Characters("c", characters), tokenizer)
    if request.param == "tokenizer":
        words = ("training.steps=2", f"tokenizer={tokenizer}")
    assert train(*start)[0] == train(*words)[0] == 0

    def change() -> None:
        if request.param == "tokenizer":
            save_tokenizer(Characters("c", characters[::-1]), tokenizer)
        elif request.param == "start":
            shutil.rmtree(tmp_path / "start")
            train(*start, "seed=1")
        else:
            (tmp_path / request.param / "text.txt").write_text(text(3, 500), encoding="utf-8")

    return words, change


def test_a_training_of_other_texts_or_starting_weights_begins_anew(
    train: Train, tuned: Tuned, tmp_path: Path
) -> None:
    words, change = tuned
    (tmp_path / "out" / "README.md").unlink()  # as if killed before the end
    assert train(*words)[2] == "", "nothing has changed"
    (tmp_path / "out" / "README.md").unlink()
    change()
    code, _, err = train(*words)
    assert code == 0
    assert re.fullmatch(r"warning: .* texts or starting weights: .* begins anew\n", err)
    assert train(*words, f"output={tmp_path / 'fresh'}")[0] == 0
    one, other = (tmp_path / folder / "history.json" for folder in ("out", "fresh"))
    losses = [json.loads(path.read_text())[-1]["held_out_loss"] for path in (one, other)]
    assert losses[0] == losses[1]


def test_a_finished_training_of_other_texts_or_starting_weights_is_refused_and_kept(
    train: Train, tuned: Tuned, tmp_path: Path
) -> None:
    words, change = tuned
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change()
    code, _, err = train(*words)
    assert code == 2
    said = "holds a training of other texts, tokenizer or starting weights: choose another folder"
    assert re.fullmatch(rf"error: output '.*out' {said}, or remove it\n", err)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("activation", "ours"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh")])
def test_a_training_starts_from_a_gpt2_of_transformers(
    train: Train, tmp_path: Path, activation: str, ours: str
) -> None:
    import transformers

    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(activation_function=activation, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    words = ("architecture.vocab_size=50257", "architecture.bias=true", "training.steps=1")
    assert train(*words, f"start_from={tmp_path / 'start'}")[0] == 0
    assert load_checkpoint(tmp_path / "out").model.config.activation == ours


def test_a_finished_training_of_a_version_that_did_not_say_its_texts_is_finished(
    in_process: Train, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(trained[0], tmp_path / "out"))
    depths = json.loads((out / "depths.json").read_text())
    del depths["sources"]
    (out / "depths.json").write_text(json.dumps(depths))
    code, said, err = in_process("train", *trained[1], f"output={out}")
    assert (code, err) == (0, "")
    assert "nothing to do" in said


# --- beside others ------------------------------------------------------------------------------


def test_who_comes_second_waits_and_finds_nothing_to_do(
    start: Start, settings: list[str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "experiments.train", *settings]
    outputs = [process.communicate(timeout=DEADLINE) for process in [start(words), start(words)]]
    assert [err for _, err in outputs] == ["", ""]
    assert sum("is being computed elsewhere: waiting" in out for out, _ in outputs) == 1
    assert sum("nothing to do" in out for out, _ in outputs) == 1
    assert not list((tmp_path / "out").glob(".*"))


class Told:
    """In place of W&B: which runs began, and how they ended."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.failed: list[bool] = []

    def __call__(self, settings: object, *, run_id: str, **described: object) -> "Told":
        self.ids.append(run_id)
        return self

    def log(self, row: dict[str, object]) -> None: ...

    def summarize(self, values: dict[str, object]) -> None: ...

    def finish(self, *, failed: bool = False) -> None:
        self.failed.append(failed)


def test_trainings_of_one_name_are_runs_of_their_own_and_a_crash_is_a_failure(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(training, "Tracker", told)
    for place in ("one/model", "other/model"):
        assert train("training.steps=2", f"output={tmp_path / place}")[0] == 0
    (tmp_path / "one" / "model" / "README.md").unlink()  # as if killed before the end

    def crash(*arguments: object, **named: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(training, "load_checkpoint", crash)
    with pytest.raises(RuntimeError):
        train("training.steps=2", f"output={tmp_path / 'one/model'}")
    (tmp_path / "train" / "text.txt").write_text(text(3, 500), encoding="utf-8")
    with pytest.raises(RuntimeError):  # of other texts, it is another curve
        train("training.steps=2", f"output={tmp_path / 'one/model'}")
    assert told.ids[2] == told.ids[0]
    assert len(set(told.ids)) == 3
    assert told.failed == [False, False, True, True]
    assert not (tmp_path / "one" / "model" / "README.md").exists()


def test_a_sweep_of_trainings_leaves_nothing_that_git_would_see(
    in_process: Train, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    words = ["training.steps=1", "output=${seed}", "seed=1,2"]
    code, _, err = in_process("train", "-m", *settings, *words)
    assert (code, err) == (0, "")
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {path.name for path in Path().iterdir()} - {"1", "2"} == {"runs"}
    assert "/runs/" in ignored


def test_every_training_of_a_sweep_that_fails_is_told_with_its_command(
    in_process: Train, settings: list[str], tmp_path: Path
) -> None:
    rates = "training.matrix_learning_rate=1e30,0.02,1e31"
    places = f"output={tmp_path}/${{training.matrix_learning_rate}}"
    code, out, err = in_process("train", "-m", *settings, "training.steps=3", places, rates)
    assert code == 1
    assert f"{tmp_path / '0.02'}: held out" in out
    lines = err.splitlines()
    assert [line[:28] for line in lines if line.startswith("error")] == [
        "error: the training diverged"
    ] * 2
    commands = [line for line in lines if line.startswith("that was python -m experiments.train ")]
    assert [line.rpartition("=")[2] for line in commands] == ["1e+30", "1e+31"]


def test_every_mistake_of_ours_in_a_sweep_of_trainings_keeps_its_traceback(
    in_process: Train, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise TypeError("a mistake")

    monkeypatch.setattr(training, "read_texts", wrong)
    code, _, err = in_process("train", "-m", *settings, "seed=1,2")
    assert (code, err.count("Traceback"), err.count("\nTypeError: a mistake\n")) == (1, 2, 2)
    assert re.findall(r"^that was python -m experiments.train .*seed=(\d)$", err, re.M) == [
        "1",
        "2",
    ]


def test_texts_that_memory_does_not_hold_are_a_sentence_in_a_sweep_of_trainings_too(
    in_process: Train, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(training, "read_texts", large)
    code, _, err = in_process("train", "-m", *settings, "seed=1,2")
    assert (code, err.count("Traceback")) == (1, 0)
    assert err.endswith("\ntrain: the machine's memory does not hold this\n")


def test_a_dry_run_of_a_training_says_which_commands_have_one(train: Train) -> None:
    code, out, err = train("--dry-run")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: --dry-run .* experiments.converge and .*_tracking have\n", err)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a pipe", "garbage", "a list", "recursion"])
def test_a_training_whose_settings_cannot_be_read_is_refused(
    train: Train, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "out" / "training.yaml"
    place.parent.mkdir()
    if kind == "a pipe":
        os.mkfifo(place)
    else:
        place.write_text({"garbage": "a: [\x00", "a list": "[1]", "recursion": "&a [*a]"}[kind])
    code, _, err = train()
    assert code == 2
    assert re.fullmatch(r"error: output .* holds a training with an unreadable .+\n", err)


def test_another_training_in_the_same_folder_is_refused(train: Train, tmp_path: Path) -> None:
    train("training.steps=2")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, _, err = train("training.steps=3")
    assert code == 2
    assert re.fullmatch(r"error: output .*out' holds a training with other settings: .+\n", err)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    # where it is computed and tracked, and how often it is saved, is not what is trained
    others = ("device=auto", "tracking.project=another", "training.save_every_seconds=7")
    assert "nothing to do" in train("training.steps=2", *others)[1]
    (tmp_path / "out" / "README.md").unlink()  # as if killed before the end
    code, out, err = train("training.steps=2", *others)
    assert (code, err) == (0, "")
    assert "step      2" not in out, "it goes on behind its last step"


def test_a_refused_training_does_not_take_its_folder(train: Train) -> None:
    tokens = ("tokenizer=bpe", "architecture.vocab_size=300")  # its tokenizer is made before
    assert train(*tokens, "architecture.block_size=100000")[0] == 2
    code, _, err = train(*tokens, "training.steps=2")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("steps", [1, 5])
def test_a_training_that_diverges_is_one_sentence(train: Train, tmp_path: Path, steps: int) -> None:
    rates = ("training.learning_rate=1e30", "training.warmup_steps=1")
    for _ in range(2):  # the state that is kept helps nobody out
        code, _, err = train(*rates, f"training.steps={steps}", "training.save_every_seconds=0")
        assert code == 1
        assert re.fullmatch(
            r"error: the training diverged: its loss is no number at step 1; use a smaller"
            r" training\.learning_rate or training\.matrix_learning_rate\n",
            err,
        )
        assert not (tmp_path / "out" / "README.md").exists()


def test_a_state_that_cannot_be_written_is_one_sentence(train: Train) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code, _, err = train("training.steps=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert re.fullmatch(r"error: output: .* cannot be written \(.*File too large.*\)\n", err)
    assert train("training.steps=2")[0] == 0


def test_a_folder_of_something_else_is_refused_and_kept(train: Train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = train()
    assert code == 2
    assert re.fullmatch(r"error: output .*out' is not empty and holds no training: .+\n", err)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("corpus.train=/nowhere", ["corpus.train", "/nowhere", "prepare_corpus"]),
        ("corpus.held_out=/nowhere", ["corpus.held_out", "/nowhere"]),
        ("training.steps=0", ["training.steps", "greater than or equal to 1", "0"]),
        ("training.learning_rate=nan", ["training.learning_rate", "nan"]),
        ("training.learning_rate=0", ["training.learning_rate", "greater than 0"]),
        ("training.weight_decay=-1", ["training.weight_decay", "greater than or equal to 0", "-1"]),
        ("training.final_fraction=2", ["training.final_fraction", "less than or equal to 1", "2"]),
        ("training.precision=int8", ["training.precision", "'float32' or 'bfloat16'", "'int8'"]),
        ("training.attention=slow", ["training.attention", "'sdpa' or 'reference'", "'slow'"]),
        ("device.dtype=float64", ["device.dtype", "float32", "'float64'"]),
        ("architecture.n_head=3", ["n_head", "3"]),
        ("architecture.dropout=1.5", ["dropout", "1.5"]),
        ("architecture.vocab_size=100", ["architecture.vocab_size", "257", "100"]),
        ("architecture.block_size=100000", ["corpus.train", "architecture.block_size=100000"]),
        ("tokenizer=/nowhere.json", ["error: tokenizer must be gpt2", "/nowhere.json"]),
        ("experiment=kinds", ["experiment=kinds is for python -m experiments.converge", "names"]),
        ("training.stpes=5", ["training.stpes", "did you mean steps?"]),
        ("+nonsense=5", ["nonsense", "allowed here"]),
        ("seed=-1", ["seed", "greater than or equal to 0", "-1"]),
        ("output=/proc/nowhere", ["output", "/proc/nowhere"]),
    ],
)
def test_an_impossible_training_is_one_sentence(
    train: Train, override: str, words: list[str]
) -> None:
    code, _, err = train(override)
    assert code == 2
    assert re.fullmatch(r"error: .+\n", err), "one line"
    for word in words:
        assert word in err


def test_a_corpus_that_is_not_text_is_one_sentence(train: Train, tmp_path: Path) -> None:
    (tmp_path / "train" / "photo.txt").write_bytes(b"\xff\xd8\xff\xe0")
    code, _, err = train()
    assert code == 2
    assert re.fullmatch(r"error: corpus\.train: .+ is no text .+\n", err)


def test_a_text_that_the_starting_model_has_no_ids_for_is_one_sentence(
    train: Train, tmp_path: Path
) -> None:
    known = sorted(set((tmp_path / "train" / "text.txt").read_text()))  # as nanoGPT keeps them
    shape = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16}
    save_checkpoint(GPT(GPTConfig(**shape, bias=False)), tmp_path, tokenizer=Characters("c", known))
    (tmp_path / "held_out" / "text.txt").write_text("the cat @ home\n" * 9)
    code, _, err = train(f"start_from={tmp_path}")
    assert code == 2
    assert re.fullmatch(r"error: corpus\.held_out: the character '@' at position 8 .+\n", err)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def of_another(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["settings"]["seed"] += 1
    torch.save(state, path)


def of_nobody(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["settings"]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training_state.pt", lambda path: path.write_bytes(b"PK\x03\x04 torn")),
        ("training_state.pt", lambda path: path.write_bytes(b"")),
        ("training_state.pt", flip),
        ("training_state.pt", of_another),
        ("training_state.pt", of_nobody),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("config.json", lambda path: path.write_text("{")),
        ("tokenizer.json", Path.unlink),
        ("tokenizer.json", lambda path: path.write_text("[]")),
        ("depths.json", lambda path: path.write_bytes(b"")),
        ("model.safetensors", flip),
        ("tokenizer.json", lambda path: path.write_text(path.read_text() + " ")),
        ("history.json", Path.unlink),
    ],
)
def test_a_damaged_training_is_made_again(
    in_process: Train,
    trained: tuple[Path, list[str]],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], object],
) -> None:
    out = Path(shutil.copytree(trained[0], tmp_path / "out"))
    words = [*trained[1], f"output={out}"]
    weights = (out / "model.safetensors").read_bytes()
    if name == "training_state.pt":
        (out / "README.md").unlink()  # as if killed before the end
    damage(out / name)
    if damage is flip and name != "training_state.pt":
        with pytest.raises(SourceError, match=f"{name} is not as it was written"):
            load(str(out))
    code, _, err = in_process("train", *words)
    assert code == 0
    assert re.fullmatch(rf"warning: .*{name}.*\n", err) or "is trained again" in err
    assert (out / "model.safetensors").read_bytes() == weights
    assert "nothing to do" in in_process("train", *words)[1]


def test_a_tokenizer_that_changed_between_two_attempts_is_not_believed(
    in_process: Train, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(trained[0], tmp_path / "out"))
    (out / "README.md").unlink()  # as if killed before the end
    before = (out / "tokenizer.json").read_text()
    changed = json.loads(before)
    *others, one, two = changed["ranks"]
    (out / "tokenizer.json").write_text(json.dumps(changed | {"ranks": [*others, two, one]}))
    load_tokenizer(out / "tokenizer.json")
    assert in_process("train", *trained[1], f"output={out}")[0] == 0
    assert (out / "tokenizer.json").read_text() == before


# --- stateful models ----------------------------------------------------------------------------

STATEFUL = ("architecture.hidden_feedback=true", "training.passes=2", "training.evaluate_depth=5")


@pytest.mark.parametrize("through", ["true", "false"])
def test_a_stateful_training_tells_loss_and_movement_at_every_depth(
    train: Train, tmp_path: Path, through: str
) -> None:
    part = "training.evaluate_windows=2"  # of 25
    code, out, err = train(*STATEFUL, f"training.through_passes={through}", part)
    assert (code, err) == (0, "")
    folder = tmp_path / "out"
    rows = json.loads((folder / "history.json").read_text())
    for row in rows:
        assert (len(row["nll_by_depth"]), len(row["kl_by_depth"])) == (6, 5)
        falling = [b < a for a, b in pairwise(row["kl_by_depth"])]
        assert row["contracts"] == all(falling)
    assert ", of up to 2 windows " in out  # a text may have fewer
    assert rows[-1]["tokens_read"] == 60 * 8 * 16 * 2

    checkpoint = load_checkpoint(folder)
    assert checkpoint.trained_passes == 2
    held_out = (tmp_path / "held_out" / "text.txt").read_text()
    windows = read_corpus(
        "k", [held_out], checkpoint.tokenizer, block_size=16, lines=False
    ).windows()
    profile = depth_profile(checkpoint.model, windows, depth=5, full=True)
    saved = json.loads((folder / "depths.json").read_text())
    assert saved["nll"] == pytest.approx(profile.nll, rel=1e-12)
    # of the whole text, as of a plain model; weights rounded to float16 move it less
    assert rows[-1]["held_out_loss"] == pytest.approx(profile.nll[0], rel=1e-3)
    assert rows[-1]["nll_by_depth"][0] != pytest.approx(profile.nll[0], rel=1e-2)
    assert saved["kl"] == pytest.approx(profile.kl, rel=1e-9)
    assert saved["nll_full"] == pytest.approx(profile.nll_full, rel=1e-12)
    assert saved["trained_passes"] == 2
    per_character = [
        f"{nll * profile.tokens / len(held_out):.4f}" for nll in (profile.nll[0], saved["nll_full"])
    ]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for number in per_character:
        assert number in card


def test_fine_tuning_starts_from_the_plain_model(train: Train, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert train(f"output={plain}")[0] == 0
    code, _, err = train(*STATEFUL, f"start_from={plain}", "training.steps=1")
    assert (code, err) == (0, "")
    before, after = load_checkpoint(plain), load_checkpoint(tmp_path / "out")
    assert after.tokenizer.name == before.tokenizer.name == "byte"
    ours = after.model.state_dict()
    for name, weight in before.model.state_dict().items():
        # one step at a fifth of the peak rate moves no weight far
        assert (ours[name] - weight).abs().max() < 0.05, name
    assert after.model.gate is not None


def test_a_document_a_line_is_read_whole_and_alone(train: Train, tmp_path: Path) -> None:
    names = ["ann", "bob", "carol", "dave"] * 20
    for folder in ("train", "held_out"):
        (tmp_path / folder / "text.txt").write_text("\n".join(names) + "\n")
    code, _, err = train(
        *STATEFUL, "corpus.documents=line", "training.steps=150", "training.learning_rate=0.03"
    )
    assert (code, err) == (0, "")
    model = load_checkpoint(tmp_path / "out").model
    end = 256
    ids = torch.tensor([[end, *b"carol", end]])
    log_probs = left_to_right(model, ids, Feedback.of_kind("hidden_state", 1.0))[0]
    assert log_probs[1:].mean() > -1.5, "four names: a quarter each for the first letter"
    assert log_probs[-1] > -0.7, "it knows where they end"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.passes=2"], ["training.passes", "hidden_feedback=true", "2"]),
        (["training.passes=0"], ["training.passes", "greater than or equal to 1", "0"]),
        (["training.evaluate_depth=0"], ["training.evaluate_depth", "greater than or equal to 1"]),
        (
            [*STATEFUL, "training.through_passes=true", "training.update_every_pass=true"],
            ["training.through_passes", "training.update_every_pass"],
        ),
        (["corpus.documents=page"], ["corpus.documents", "'file' or 'line'", "'page'"]),
        (["corpus.documents=line"], ["corpus.train", "does not fit", "block_size=16", "15"]),
        (
            ["tokenizer=bpe", "architecture.vocab_size=256"],
            ["architecture.vocab_size", "at least 257 with tokenizer=bpe", "256"],
        ),
        (["start_from=/nowhere.pt"], ["start_from", "/nowhere.pt"]),
        (["start_from=bundled"], ["architecture.block_size", "256", "start_from=bundled", "16"]),
    ],
)
def test_an_impossible_stateful_training_is_one_sentence(
    train: Train, overrides: list[str], words: list[str]
) -> None:
    code, _, err = train(*overrides)
    assert code == 2
    assert re.fullmatch(r"error: .+\n", err), "one line"
    for word in words:
        assert word in err
