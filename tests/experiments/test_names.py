"""One text a line: what is read, what is refused, and the names model from end to end."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.settings import ConfigError
from experiments.train.corpus import read_corpus
from scripts import held_out_loss, print_passes
from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.cli import main as generate
from stateful_gpt.feedback import Feedback
from stateful_gpt.oracle import left_to_right
from stateful_gpt.tokenizer import byte_tokenizer
from stateful_gpt.train import IGNORE

Train = Callable[..., tuple[int, str, str]]

NAMES = ["ada", "bob", "cleo", "dora", "edna", "guillermina", "io"]
HELD_OUT = ["abe", "cleopatra", "dot"]


# --- what is read -------------------------------------------------------------------------------


def test_every_line_is_a_text_between_two_tokens_and_padding() -> None:
    corpus = read_corpus("k", ["ada\n\nio\n", "bob"], byte_tokenizer(), block_size=6, lines=True)
    assert corpus.tokens.tolist() == [
        [256, *b"ada", 256, IGNORE, IGNORE],
        [256, *b"io", 256, IGNORE, IGNORE, IGNORE],
        [256, *b"bob", 256, IGNORE, IGNORE],
    ]
    assert corpus.size == 14
    assert corpus.characters == 4 + 3 + 4  # with the ends of lines, which are predicted, too
    assert torch.equal(corpus.windows(), corpus.tokens)


def test_only_the_end_of_a_line_ends_a_document() -> None:
    text = "a\x0cb\u2028c\nd"
    corpus = read_corpus("k", [text], byte_tokenizer(), block_size=12, lines=True)
    assert len(corpus.tokens) == 2
    assert corpus.characters == len(text) + 1


def test_a_batch_is_whole_texts_and_every_text_comes() -> None:
    corpus = read_corpus("k", ["\n".join(NAMES)], byte_tokenizer(), block_size=12, lines=True)
    rows = {tuple(row.tolist()) for row in corpus.tokens}
    seen = {tuple(row.tolist()) for step in range(30) for row in corpus.batch(step, size=4, seed=1)}
    assert seen == rows
    assert torch.equal(corpus.batch(3, size=4, seed=1), corpus.batch(3, size=4, seed=1))
    assert not torch.equal(corpus.batch(3, size=9, seed=1), corpus.batch(3, size=9, seed=2))


def test_a_line_fits_exactly_or_is_refused_by_name() -> None:
    encoding = byte_tokenizer()
    assert (
        read_corpus("k", ["guillermina"], encoding, block_size=12, lines=True).tokens.size(1) == 13
    )
    with pytest.raises(ConfigError, match=r"k: a line of 11 tokens .*block_size=11.*'guillermina'"):
        read_corpus("k", ["ada\nguillermina"], encoding, block_size=11, lines=True)
    with pytest.raises(ConfigError, match="k must have a line of text"):
        read_corpus("k", ["\n\n"], encoding, block_size=11, lines=True)


def test_the_passes_over_a_prompt_of_ids_are_printed_whole(
    compute: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [json.dumps({"id": name, "tokens": [256, *name.encode(), 256]}) for name in HELD_OUT]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    file = f"prompts.file={tmp_path / 'prompts.jsonl'}"
    run = compute("prompts.source=file", file, "prompts.limit=3", "feedback.strength=0.5")
    monkeypatch.setattr(sys, "argv", ["print_passes", str(run), "--prompt", "abe"])
    assert print_passes.main() == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "abe: checkpoint, β = 0.5"
    assert header.split() == ["pass", "a", "b", "e", "■"]
    # four tokens to predict: settled by the fourth pass, whatever the model
    assert [row.split()[0] for row in rows if row] in (["1", "2", "3"], ["1", "2", "3", "4"])

    monkeypatch.setattr(sys, "argv", ["print_passes", str(run), "--prompt", "zoe"])
    assert print_passes.main() == 2
    assert "zoe" in capsys.readouterr().err


# --- from end to end ----------------------------------------------------------------------------


@pytest.mark.parametrize("stateful", [False, True])
def test_names_are_learned_stated_and_drawn(
    in_process: Train,
    tmp_path: Path,
    stateful: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for side, names in [("train", NAMES), ("held_out", HELD_OUT)]:
        (tmp_path / side).mkdir()
        (tmp_path / side / "names.txt").write_text("\n".join(names) + "\n")
    folder = tmp_path / "model"
    more = ["architecture.hidden_feedback=true", "training.passes=2"] if stateful else []
    code, out, err = in_process(
        "train",
        "experiment=names",
        *(f"corpus.{side}={tmp_path / side}" for side in ("train", "held_out")),
        f"output={folder}",
        *("training.steps=60", "training.batch_size=8", "training.evaluate_every=60"),
        *("architecture.dropout=0", "device=cpu", "tracking.mode=disabled"),
        *more,
    )
    assert (code, err) == (0, "")

    model = load_checkpoint(folder).model
    texts = [torch.tensor([[256, *name.encode(), 256]]) for name in HELD_OUT]
    characters = sum(len(name) + 1 for name in HELD_OUT)

    def nats(feedback: Feedback) -> float:
        total = -sum(left_to_right(model, text, feedback).sum().item() for text in texts)
        return total / characters

    expected = [nats(Feedback(strength=0.0))]
    if stateful:
        expected.append(nats(Feedback.of_kind("hidden_state", 1.0)))
        assert abs(expected[0] - expected[1]) > 1e-3, "the feedback matters"
    stated = [float(number) for number in re.findall(r"\d\.\d{4}", out.splitlines()[-1])]
    assert stated == pytest.approx(expected, abs=6e-5)  # four digits, in float32
    assert (folder / "README.md").read_text(encoding="utf-8").count("--documents line") == 1

    # the command that the card names prints the numbers of the card
    words = ["held_out_loss", "--model", str(folder), "--texts", str(tmp_path / "held_out")]
    monkeypatch.setattr(sys, "argv", [*words, "--documents", "line"])
    assert held_out_loss.main() == 0
    printed = capfd.readouterr().out
    found = re.findall(r"([\d.]+) nats per character, ([\d.]+) nats per token", printed)
    assert [float(pair[0]) for pair in found] == pytest.approx(expected, abs=6e-5)
    assert all(pair[0] == pair[1] for pair in found), "a letter is a token, and so is an end"
    assert "18 characters" in printed

    # seven names were learned by heart: what it draws ends by itself and is one of them
    words = ["--model", str(folder), "--prompt", "", "--samples", "20", "--temperature", "0.2"]
    feedback = ["--feedback", "hidden_state", "--strength", "1"] if stateful else []
    assert generate([*words, "--device", "cpu", *feedback]) == 0
    drawn = capfd.readouterr().out.splitlines()[::2]  # a line of dashes between two
    assert len(drawn) == 20
    assert set(drawn) <= set(NAMES)
