"""The number that a model card quotes is the library's own."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from scripts import held_out_loss
from stateful_gpt.checkpoint import load_checkpoint

TEXTS = {"b.txt": "It was a dark – and stormy – night.\n" * 9, "a.txt": "The door was open.\n" * 7}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        # one with a byte order mark, as some editors write
        (folder / name).write_text(text, encoding="utf-8-sig" if name == "b.txt" else "utf-8")
    (folder / "notes.md").write_text("Not a text of the corpus.")
    return folder


def test_the_printed_number_is_the_loss_by_characters_and_by_tokens(
    texts: Path,
    checkpoint_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["held_out_loss", "--model", str(checkpoint_folder), "--texts", str(texts)]
    monkeypatch.setattr(sys, "argv", words)
    assert held_out_loss.main() == 0
    found = re.fullmatch(
        r"(.*) on a\.txt, b\.txt: ([\d.]+) nats per character, ([\d.]+) nats per token,"
        r" ([\d,]+) characters\n",
        capsys.readouterr().out,
    )
    assert found is not None
    # files in the order of their names, each begun by the end-of-text token
    ids = [i for name in sorted(TEXTS) for i in [256, *TEXTS[name].encode()]]
    model = load_checkpoint(checkpoint_folder).model
    block = model.config.block_size
    nats = 0.0
    for start in range(0, len(ids) - 1, block):  # each token but the first is predicted once
        window = torch.tensor(ids[start : start + block + 1])
        with torch.no_grad():
            logits = model.lm_head(model(window[None, :-1]))[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    characters = sum(len(text) for text in TEXTS.values())
    assert float(found[2]) == pytest.approx(nats / characters, abs=5e-5)  # four digits are printed
    assert float(found[3]) == pytest.approx(nats / (len(ids) - 1), abs=5e-5)
    assert found[4] == f"{characters:,}"


def test_no_texts_or_no_model_is_one_sentence(
    texts: Path,
    tmp_path: Path,
    checkpoint_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model, folder, word in [
        (checkpoint_folder, tmp_path / "nowhere", "nowhere"),
        (checkpoint_folder, "", "a folder of .txt files, got ''"),  # not the current one
        (checkpoint_folder, "a" * 300, "a folder of .txt files"),
        (tmp_path / "no_model", texts, "no_model"),
    ]:
        monkeypatch.setattr(
            sys, "argv", ["held_out_loss", "--model", str(model), "--texts", str(folder)]
        )
        assert held_out_loss.main() == 1
        err = capsys.readouterr().err
        assert word in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("documents", ["file", "line"])
def test_blank_texts_are_one_sentence_in_the_words_of_this_command(
    documents: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").touch()
    words = ["held_out_loss", "--texts", str(tmp_path), "--documents", documents]
    monkeypatch.setattr(sys, "argv", words)
    assert held_out_loss.main() == 1
    err = capsys.readouterr().err
    assert err.startswith("held_out_loss: --texts must have ")
    assert (err.count("\n"), "corpus." in err) == (1, False)
