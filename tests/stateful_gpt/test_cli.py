"""The command line: what it prints, how it exits, and one line for whatever is wrong."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stateful_gpt import cli
from stateful_gpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from stateful_gpt.cli import main
from stateful_gpt.device import DEVICES, DTYPES
from stateful_gpt.feedback import KINDS, Feedback, FeedbackKind
from stateful_gpt.generate import Sampling, Start, generate
from stateful_gpt.hugging_face import HuggingFaceModel, quiet
from stateful_gpt.model import GPT
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.tokenizer import byte_tokenizer, decode, save_tokenizer
from tests.tiny_transformers import tiny

Capture = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]

PROMPT = "The ship"
OUTGROWN = (
    "generate: the text has outgrown the model's block of 32 tokens: from here on {} a recompute of"
    " the whole block (--slide)\n"
)
PLAIN = "generate: at --strength 0 nothing is fed back: this is the plain model\n"


@pytest.fixture
def run(checkpoint_folder: Path, capsys: Capture) -> Run:
    """Run the command in this process: exit code, standard output, standard error."""

    def call(*arguments: str, model: str | Path = checkpoint_folder) -> tuple[int, str, str]:
        options = ["--model", str(model), "--device", "cpu", *arguments]
        if "--prompt" not in arguments:
            options += ["--prompt", PROMPT]
        try:
            code = main(options)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def command(folder: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "stateful_gpt.generate",
        "--model",
        str(folder),
        "--device",
        "cpu",
        *arguments,
    ]


# --- what it prints -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind.value for kind in FeedbackKind])
@pytest.mark.parametrize("strength", ["0", "0.5", "-0.5"])
def test_the_text_is_what_the_library_generates(
    run: Run, checkpoint_folder: Path, kind: str, strength: str
) -> None:
    code, out, _ = run(
        *("--max_new_tokens", "12", "--greedy"),
        *("--feedback", kind, "--strength", strength, "--iterations", "3", "--tolerance", "0"),
    )
    checkpoint = load_checkpoint(checkpoint_folder)
    feedback = Feedback(FeedbackKind(kind), float(strength))
    result = generate(
        checkpoint.model,
        [list(PROMPT.encode())],
        max_new_tokens=12,
        feedback=feedback,
        config=RecomputeConfig(iterations=3),
        start=Start.CARRIED,
        sampling=Sampling(vocab_size=257, end_tokens=[256]),
    )
    new = [token for token in result.tokens[0][len(PROMPT) :] if token != 256]
    assert code == 0
    assert out == PROMPT + decode(checkpoint.tokenizer, new) + "\n"


def test_sampling_is_the_librarys_with_the_seed(run: Run, checkpoint_folder: Path) -> None:
    code, out, err = run(
        *("--max_new_tokens", "20", "--temperature", "1.3", "--top_k", "9", "--seed", "5")
    )
    checkpoint = load_checkpoint(checkpoint_folder)
    result = generate(
        checkpoint.model,
        [list(PROMPT.encode())],
        max_new_tokens=20,
        feedback=Feedback(strength=0.0),
        config=RecomputeConfig(iterations=1),
        sampling=Sampling(temperature=1.3, top_k=9, vocab_size=257, end_tokens=[256]),
        generators=torch.Generator().manual_seed(5),
    )
    new = [token for token in result.tokens[0][len(PROMPT) :] if token != 256]
    assert (code, err) == (0, PLAIN)
    assert out == PROMPT + decode(checkpoint.tokenizer, new) + "\n"


def test_standard_output_has_only_the_text(run: Run) -> None:
    # one pass a token cannot settle, which is said on standard error
    code, out, err = run(
        *("--max_new_tokens", "5", "--greedy", "--strength", "1", "--iterations", "1"),
        *("--start", "cold"),
    )
    assert code == 0
    assert out.startswith(PROMPT)
    assert "settled" not in out
    assert "had not settled after 1 passes" in err
    assert err.count("\n") == 1


def test_no_new_tokens_is_the_prompt(run: Run) -> None:
    assert run("--max_new_tokens", "0") == (0, PROMPT + "\n", PLAIN)


def test_the_same_seed_is_the_same_text(run: Run) -> None:
    texts = [run("--max_new_tokens", "30", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = [run("--max_new_tokens", "30", "--greedy", "--seed", seed)[1] for seed in "12"]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("strength", ["-1", "-.5", "-0.5", "-1e-3", "-2.5E-1"])
def test_a_negative_strength_needs_no_equals_sign(run: Run, strength: str) -> None:
    # argparse takes what begins with a dash for an option unless it looks like a number
    code, out, _ = run("--max_new_tokens", "2", "--greedy", "--strength", strength)
    assert code == 0
    assert (code, out) == run("--max_new_tokens", "2", "--greedy", f"--strength={strength}")[:2]


@pytest.mark.parametrize("prompt", ["-- A well-known fact", "-40 degrees", "-hello", "-h", "-=-"])
def test_a_prompt_that_begins_with_dashes_stays_as_it_is(run: Run, prompt: str) -> None:
    assert run("--prompt", prompt, "--max_new_tokens", "0")[:2] == (0, prompt + "\n")


def test_the_smallest_strength_and_the_largest_seed_are_accepted(run: Run) -> None:
    code, _, err = run("--max_new_tokens", "2", "--seed", str(2**63 - 1), "--strength=-1e-300")
    assert code == 0
    assert "Traceback" not in err


def test_a_dash_reads_the_prompt_from_standard_input(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Anna said\nno"))
    code, out, err = run("--prompt", "-", "--max_new_tokens", "0")
    assert (code, out, err) == (0, "Anna said\nno\n", PLAIN)


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["--prompt", ""], b""),
        (["--prompt", "-"], b""),
        (["--begin"], PROMPT.encode()),
        (["--prompt", "", "--begin"], b""),
    ],
)
def test_a_text_that_begins_follows_the_start_and_stop_token(
    run: Run,
    checkpoint_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    prompt: bytes,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, out, err = run(*arguments, "--max_new_tokens", "9", "--greedy")
    checkpoint = load_checkpoint(checkpoint_folder)
    result = generate(
        checkpoint.model,
        [[256, *prompt]],
        max_new_tokens=9,
        feedback=Feedback(strength=0.0),
        config=RecomputeConfig(iterations=1),
        sampling=Sampling(vocab_size=257, end_tokens=[256]),
    )
    shown = [token for token in result.tokens[0] if token != 256]
    assert (code, err) == (0, PLAIN)
    assert out == decode(checkpoint.tokenizer, shown) + "\n"


@pytest.mark.parametrize("feedback", [[], ["--strength", "0.5"]])
def test_samples_are_the_librarys_in_their_order(
    run: Run, checkpoint_folder: Path, feedback: list[str]
) -> None:
    code, out, _ = run(
        *("--samples", "3", "--max_new_tokens", "12", "--temperature", "0.4", "--seed", "3"),
        *feedback,
    )
    checkpoint = load_checkpoint(checkpoint_folder)
    strength = float(feedback[1]) if feedback else 0.0
    result = generate(
        checkpoint.model,
        [list(PROMPT.encode())] * 3,
        max_new_tokens=12,
        feedback=Feedback(strength=strength),
        config=RecomputeConfig(iterations=64 if feedback else 1, tolerance=1e-3, window="all"),
        start=Start.CARRIED,
        sampling=Sampling(temperature=0.4, vocab_size=257, end_tokens=[256]),
        generators=torch.Generator().manual_seed(3),
    )
    texts = [decode(checkpoint.tokenizer, [i for i in t if i != 256]) for t in result.tokens]
    assert code == 0
    assert out == "\n---------------\n".join(texts) + "\n"
    assert len(set(texts)) > 1, "they differ"


def test_samples_that_end_are_printed_without_their_end(make_ending: Path, run: Run) -> None:
    code, out, err = run("--samples", "3", "--prompt", "", model=make_ending)
    assert (code, out, err) == (0, "\n---------------\n" * 2 + "\n", PLAIN)


def test_a_prompt_longer_than_the_block_is_continued(run: Run) -> None:
    prompt = "a long prompt, " * 5  # 75 bytes for a block of 32
    code, out, err = run("--prompt", prompt, "--max_new_tokens", "3", "--greedy")
    assert (code, err) == (0, PLAIN + OUTGROWN.format("one token in 8 costs"))
    assert out.startswith(prompt)


@pytest.mark.parametrize("samples", ["1", "2"])
def test_that_the_block_is_outgrown_is_said_once_and_when_it_happens(
    run: Run, monkeypatch: pytest.MonkeyPatch, samples: str
) -> None:
    new = 32 - len(PROMPT) + 9
    said_at: list[int] = []
    drawn: list[int] = []

    def watched(*arguments: Any, on_token: Callable[[int, int], None], **options: Any) -> Any:
        def watch(row: int, token: int) -> None:
            drawn.append(token)
            on_token(row, token)

        return generate(*arguments, on_token=watch, **options)

    def tell(sentence: str, code: int = 0) -> int:
        said_at.append(len(drawn))
        return told(sentence, code)

    told = cli._tell
    monkeypatch.setattr(cli, "_tell", tell)
    monkeypatch.setattr(sys.modules["stateful_gpt.generate"], "generate", watched)
    options = ("--slide", "1", "--samples", samples, "--temperature", "0.1", "--strength", "0.1")
    code, _, err = run("--max_new_tokens", str(new), *options)
    assert (code, err) == (0, OUTGROWN.format("every token costs"))
    assert said_at == [int(samples) * (32 - len(PROMPT) + 1)], "at the first tokens past the block"


def test_a_text_that_just_fills_the_block_has_not_outgrown_it(run: Run) -> None:
    assert run("--max_new_tokens", str(32 - len(PROMPT)), "--greedy")[2] == PLAIN


# --- any model ----------------------------------------------------------------------------------


def test_a_folder_of_transformers_is_read_as_its_library_reads_it(run: Run, tmp_path: Path) -> None:
    with quiet():
        tiny("llama", dtype=torch.float32, vocab_size=257).save_pretrained(tmp_path)
    model = HuggingFaceModel(tiny("llama", dtype=torch.float32, vocab_size=257))
    config = RecomputeConfig(iterations=64, tolerance=1e-3, window="all")
    code, out, err = run(
        *("--tokenizer", "byte", "--max_new_tokens", "9", "--greedy", "--strength", "0.5"),
        model=tmp_path,
    )
    result = generate(
        model,
        [list(PROMPT.encode())],
        max_new_tokens=9,
        feedback=Feedback(strength=0.5),
        config=config,
        start=Start.CARRIED,
        sampling=Sampling(vocab_size=257, end_tokens=[256]),
    )
    shown = [token for token in result.tokens[0] if token != 256]
    assert (code, err) == (0, "")
    assert out == decode(byte_tokenizer(), shown) + "\n"


def test_a_published_gpt2_is_read_as_ours(tmp_path: Path) -> None:
    tiny("gpt2", dtype=torch.float32, vocab_size=257).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path, tokenizer="byte").model, GPT)
    other = load_model(tmp_path, library="transformers", tokenizer="byte").model
    assert isinstance(other, HuggingFaceModel)


def test_smollm2_says_which_command_makes_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(run(model="smollm2"), "make it with python -m scripts.prepare_smollm2")
    tiny("llama", dtype=torch.float32, vocab_size=257).save_pretrained("data/models/smollm2")
    assert run("--tokenizer", "byte", "--max_new_tokens", "0", model="smollm2")[0] == 0


def test_characters_cut_by_tokens_are_put_together(run: Run, checkpoint_folder: Path) -> None:
    # whatever bytes a byte model draws, the output is text
    code, out, _ = run("--prompt", "é☃", "--max_new_tokens", "40", "--temperature", "3")
    assert code == 0
    assert out.startswith("é☃")
    out.encode("utf-8")


def test_the_end_token_is_not_printed(make_ending: Path, run: Run) -> None:
    code, out, err = run("--max_new_tokens", "50", "--greedy", model=make_ending)
    assert (code, out, err) == (0, PROMPT + "\n", PLAIN)


@pytest.fixture
def make_ending(make_gpt: Callable[..., GPT], tmp_path: Path) -> Path:
    """A model that always ends the text."""
    model = make_gpt(1, vocab_size=257, tied=False, dtype=torch.float32)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[256] = 5.0
    save_checkpoint(model, tmp_path / "ending", tokenizer="byte")
    return tmp_path / "ending"


# --- as a process -------------------------------------------------------------------------------


def test_the_process_prints_the_text_and_exits_with_0(run: Run, checkpoint_folder: Path) -> None:
    arguments = ["--prompt", "-", "--max_new_tokens", "8", "--greedy", "--strength", "0.5"]
    done = subprocess.run(
        command(checkpoint_folder, *arguments), input=PROMPT.encode(), capture_output=True
    )
    assert done.returncode == 0
    assert done.stderr == b""
    _, out, _ = run(*("--max_new_tokens", "8", "--greedy", "--strength", "0.5"))
    assert done.stdout.decode() == out


def test_a_closed_pipe_is_silent(checkpoint_folder: Path) -> None:
    process = subprocess.Popen(
        command(checkpoint_folder, "--prompt", "x" * 20, "--max_new_tokens", "2000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(10) == b"x" * 10  # as ``head -c 10`` would
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0
    assert b"Traceback" not in err
    assert b"Broken pipe" not in err


def test_a_process_given_nonsense_exits_with_2_and_no_traceback(checkpoint_folder: Path) -> None:
    done = subprocess.run(
        command(checkpoint_folder, "--prompt", "x", "--strength", "nan"), capture_output=True
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    assert b"must be a finite number, got nan" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("by", ["stdin", "argument"])
def test_a_prompt_that_is_no_utf8_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    raw = b"\xff\xfe\x80"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    prompt = "-" if by == "stdin" else os.fsdecode(raw)
    code, out, err = run("--max_new_tokens", "2", "--prompt", prompt)
    assert code == 1
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("generate: ")


# --- refused arguments: exit code 2 -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strength", "nan"], "finite"),
        (["--strength", "inf"], "finite"),
        (["--strength=-inf"], "finite"),
        (["--strength", "1e999"], "finite"),
        (["--strength", "strong"], "strength"),
        (["--strength", "--greedy"], "--strength: expected one argument"),
        (["--prompt", "--greedy"], "--prompt: expected one argument"),
        (["--iterations", "0"], "at least 1"),
        (["--iterations", "-3"], "at least 1"),
        (["--iterations", "2.5"], "whole number"),
        (["--max_new_tokens", "-1"], "at least 0"),
        (["--max_new_tokens", "many"], "whole number"),
        (["--temperature", "0"], "above 0"),
        (["--temperature", "-1"], "above 0"),
        (["--temperature", "nan"], "finite"),
        (["--top_k", "0"], "at least 1"),
        (["--seed", "-1"], "0 to"),
        (["--seed", "1.5"], "whole number"),
        (["--seed", str(2**70)], "seed"),
        (["--tolerance", "-0.1"], "at least 0"),
        (["--tolerance", "nan"], "finite"),
        (["--greedy", "--temperature", "1"], "--greedy"),
        (["--greedy", "--top_k", "5"], "--greedy"),
        (["--greedy", "--samples", "2"], "--greedy"),
        (["--samples", "0"], "at least 1"),
        (["--samples", "some"], "whole number"),
        (["--feedback", "magic"], "log_prob"),
        (["--start", "warm"], "carried"),
        (["--device", "tpu"], "cuda"),
        (["--dtype", "int8"], "float32"),
        (["--beam", "4"], "--beam"),
        (["surplus"], "surplus"),
        (["--strength", "abc"], "must be a finite number, got abc"),
        (["--strength", "9" * 5000], "(5,000 characters)"),
        (["--iterations", "9" * 5000], "whole number"),
        (["--layers", "0,x"], "--layers: must be all"),
        (["--layers", "-1"], "--layers"),
        (["--layers", "0", "--feedback", "hidden_state"], "--layers"),
        (["--shift", "2"], "--shift"),
        (["--shift", "0"], "--shift 0"),
        (["--damping", "0"], "above 0 and at most 1"),
        (["--damping", "1.5"], "above 0 and at most 1"),
        (["--hidden_strength", "x"], "finite"),
        (["--hidden_strength", "1", "--feedback", "none"], "--hidden_strength"),
        (["--feedback", "\x1b[31m"], r"\x1b"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(
    run: Run, arguments: list[str], words: str
) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert "error: " in last
    assert words in last


def test_a_missing_prompt_is_exit_code_2(checkpoint_folder: Path, capsys: Capture) -> None:
    assert main(["--model", str(checkpoint_folder)]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_help_names_every_option(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for option in (
        "prompt",
        "begin",
        "samples",
        "max_new_tokens",
        "temperature",
        "greedy",
        "top_k",
        "model",
    ):
        assert f"--{option}" in out
    for option in ("feedback", "strength", "iterations", "seed", "tolerance", "start"):
        assert f"--{option}" in out


# --- failures: exit code 1 ----------------------------------------------------------------------


def assert_one_line(result: tuple[int, str, str], words: str) -> None:
    code, out, err = result
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert err.startswith("generate: ")
    assert words in err


@pytest.mark.parametrize("arguments", [["--prompt", ""], ["--begin"]])
def test_a_tokenizer_that_cannot_begin_a_text_is_one_line(
    run: Run, tmp_path: Path, arguments: list[str]
) -> None:
    path = tmp_path / "no_end.json"
    save_tokenizer(byte_tokenizer(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"special_tokens": {}}))
    assert_one_line(run("--tokenizer", str(path), *arguments), "has no <|endoftext|>")


@pytest.mark.parametrize("name", ["/missing", "missing.pt", "x" * 5000, "a\nb"])
def test_a_missing_model_is_one_line(run: Run, name: str) -> None:
    assert_one_line(run(model=name), "there is no model")


def test_a_damaged_model_is_one_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"not a model")
    assert_one_line(run(model=path), str(path))
    (tmp_path / "empty").mkdir()
    assert_one_line(run(model=tmp_path / "empty"), "config.json")


def test_a_tokenizer_that_does_not_fit_is_one_line(run: Run) -> None:
    assert_one_line(run("--tokenizer", "gpt2"), "50257 ids")
    assert_one_line(run("--tokenizer", "nowhere.json"), "must be gpt2, byte")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_asked_for_and_absent_is_one_line(run: Run) -> None:
    assert_one_line(run("--device", "cuda"), "no CUDA device")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "1e-300"],
        ["--temperature", "1e-44"],
        ["--temperature", "1e300"],
        ["--temperature", "1e-300", "--top_k", "3"],
    ],
)
def test_an_extreme_temperature_still_draws(run: Run, arguments: list[str]) -> None:
    code, out, err = run("--max_new_tokens", "3", *arguments)
    assert code == 0
    assert out.startswith(PROMPT)
    assert err == PLAIN


@pytest.mark.parametrize("kind", ["log_prob", "logit", "prob"])
@pytest.mark.parametrize("strength", ["1e38", "-1e38", "1e300", "-1e300"])
@pytest.mark.parametrize("mode", [["--greedy"], ["--temperature", "1"]])
def test_an_absurd_strength_ends_in_a_sentence_at_worst(
    run: Run, kind: str, strength: str, mode: list[str]
) -> None:
    code, out, err = run(
        "--max_new_tokens", "4", "--feedback", kind, f"--strength={strength}", *mode
    )
    assert out.startswith(PROMPT)
    assert "Traceback" not in err
    if code:
        assert code == 1
        assert "diverged" in err


def test_a_plain_model_without_numbers_is_told_of_its_weights(
    run: Run, make_gpt: Callable[..., GPT], tmp_path: Path
) -> None:
    model = make_gpt(1, vocab_size=257)
    torch.nn.init.constant_(model.transformer.ln_f.weight, torch.nan)
    save_checkpoint(model, tmp_path / "m", tokenizer="byte")
    code, _, err = run("--max_new_tokens", "2", model=tmp_path / "m")
    assert code == 1
    assert "the model's own outputs are not finite" in err
    assert "--strength" not in err.removeprefix(PLAIN)


# --- every setting of a feedback ------------------------------------------------------------------


def test_the_choices_are_the_librarys() -> None:
    assert set(cli.KINDS) == set(KINDS)
    assert tuple(start.value for start in Start) == cli.STARTS
    assert cli.DEVICES == DEVICES
    assert tuple(DTYPES) == cli.DTYPES


@pytest.mark.parametrize(
    ("options", "feedback", "damping"),
    [
        (["--strength", "0.5", "--layers", "1"], Feedback(strength=0.5, layers=(1,)), 1.0),
        (["--strength", "0.5", "--damping", "0.5"], Feedback(strength=0.5), 0.5),
        (
            ["--strength", "0.5", "--hidden-strength", "-2e-1"],
            Feedback(strength=0.5, hidden_strength=-0.2),
            1.0,
        ),
        (
            ["--feedback", "hidden_state", "--strength", "0.3", "--shift", "0"],
            Feedback.of_kind("hidden_state", 0.3, shift=0),
            1.0,
        ),
    ],
)
def test_every_setting_of_the_feedback_reaches_the_library(
    run: Run,
    make_gpt: Callable[..., GPT],
    tmp_path: Path,
    options: list[str],
    feedback: Feedback,
    damping: float,
) -> None:
    model = make_gpt(3, block_size=32, vocab_size=257, hidden_feedback=True, dtype=torch.float32)
    save_checkpoint(model, tmp_path / "m", tokenizer="byte")
    code, out, _ = run(
        *("--max-new-tokens", "12", "--greedy", "--iterations", "4", "--tolerance", "0"),
        *options,
        model=tmp_path / "m",
    )
    checkpoint = load_checkpoint(tmp_path / "m")
    texts = [
        generate(
            checkpoint.model,
            [list(PROMPT.encode())],
            max_new_tokens=12,
            feedback=of,
            config=RecomputeConfig(iterations=4, damping=damping),
            start=Start.CARRIED,
            sampling=Sampling(vocab_size=257, end_tokens=[256]),
        ).tokens[0]
        for of in (feedback, Feedback(strength=0.5))
    ]
    shown = decode(checkpoint.tokenizer, [token for token in texts[0] if token != 256])
    assert (code, out) == (0, shown + "\n")
    assert texts[0] != texts[1] or damping != 1.0


def test_a_layer_that_the_model_lacks_is_one_line(run: Run) -> None:
    assert_one_line(run("--layers", "0,2", "--strength", "1"), "--layers must be from 0 to 1")


def test_a_text_beyond_all_memory_is_one_line(run: Run) -> None:
    assert_one_line(run("--max_new_tokens", str(10**12)), "bytes of memory, and the machine has")


def test_the_line_feed_of_echo_is_no_part_of_the_prompt(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Anna said\n\n"))
    assert run("--prompt", "-", "--max_new_tokens", "0")[1] == "Anna said\n\n"


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", "utf-16-le"])
def test_a_terminal_of_any_encoding_is_printed_to(
    run: Run, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    shown = io.BytesIO()
    terminal = io.TextIOWrapper(shown, encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    assert run("--prompt", "é☃", "--max_new_tokens", "20")[0] == 0
    terminal.flush()
    assert shown.getvalue().startswith("é☃".encode(encoding, errors="backslashreplace"))


def test_a_node_without_a_locale_reads_and_prints_utf8(checkpoint_folder: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for prompt in ("-", "é☃"):
        done = subprocess.run(
            command(checkpoint_folder, "--prompt", prompt, "--max_new_tokens", "0"),
            input="é☃".encode(),
            capture_output=True,
            env=env,
        )
        assert (done.returncode, done.stdout) == (0, rb"\xe9\u2603" + b"\n")


@pytest.mark.parametrize("full", [True, False], ids=["full", "closed"])
@pytest.mark.parametrize(("stream", "code"), [("stdout", 1), ("stderr", 0)])
def test_the_exit_code_says_whether_the_text_was_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, stream: str, code: int, full: bool
) -> None:
    # a process whose streams are so: tests/test_streams.py
    with open("/dev/full", "w") as place:
        monkeypatch.setattr(f"sys.{stream}", place if full else None)
        found, _, err = run("--prompt", "x", "--max_new_tokens", "2")
    assert found == code
    assert "Traceback" not in err
    assert ("standard output is lost" in err) == (code == 1)
