"""Whatever is wrong is one sentence: exit code 1 or 2, no traceback, nothing half-made left."""

import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.runs.folder import RunFolder
from stateful_gpt.checkpoint import save_checkpoint
from stateful_gpt.model import GPT

Converge = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

ROOT = Path(__file__).parents[2]
MANY = "1" * 5000  # more digits than Python makes an integer of


@pytest.fixture
def refused(converge: Converge, tmp_path: Path) -> Refused:
    """The one sentence with which these settings are refused, before anything is written."""

    def call(*overrides: str, code: int = 2) -> str:
        before = set(tmp_path.rglob("*"))
        found, out, err = converge(*overrides)
        assert found == code, err
        assert "Traceback" not in err + out
        assert re.fullmatch(r"error: .+\n", err), "one line"
        assert not out, "there is nothing to report"
        assert set(tmp_path.rglob("*")) == before, "nothing is written"
        return err

    return call


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("feedback.strength=abc", ["feedback.strength", "abc", "a valid number"]),
        ("feedback.strength=", ["feedback.strength", "a valid number", "''"]),
        ("feedback.strength=null", ["feedback.strength"]),
        ("feedback.strength=nan", ["feedback.strength", "finite", "nan"]),
        ("feedback.strength=inf", ["feedback.strength", "finite", "inf"]),
        ("feedback.strength=-inf", ["feedback.strength", "finite", "-inf"]),
        ("feedback.strength=1e400", ["feedback.strength", "finite", "inf"]),
        ("feedback.strength=1,2", ["feedback.strength=1,2"]),
        ("feedback.strength=${nowhere}", ["feedback.strength", "nowhere"]),
        ("feedback.strength=[1", ["feedback.strength=[1", "key=value"]),
        ("feedback.strength", ["feedback.strength", "key=value"]),
        ("=1", ["override"]),
        ("feedback=5", ["feedback must be one of hidden_state, log_prob", "got 5"]),
        ("feedback.strenght=1", ["feedback.strenght", "did you mean strength?", "kind, strength"]),
        ("feedback.nonsense=1", ["feedback.nonsense", "kind, strength, layers"]),
        ("nonsense=1", ["nonsense", "study, runs_dir"]),
        ("strength=1", ["'strength' (did you mean feedback.strength?)", "study, runs_dir"]),
        ("--feedback.strength=1", ["--feedback.strength must be written KEY=VALUE"]),
        ("+nonsense=1", ["nonsense", "study, runs_dir"]),
        ("+feedback.nonsense=1", ["feedback.nonsense", "kind, strength, layers"]),
        ("+recompute.iteration=3", ["recompute.iteration", "did you mean iterations?"]),
        (
            "feedback=nonsense",
            ["feedback/nonsense", "allowed: hidden_state, log_prob, logit, none, prob\n"],
        ),
        (
            "experiment=nonsense",
            ["experiment/nonsense", "speed, speed_kinds, strength_sweep\n"],
        ),
        ("experiment=names", ["experiment=names is for python -m experiments.train", "kinds"]),
        ("feedback.kind=nonsense", ["feedback.kind", "'log_prob', 'logit', 'prob'", "'nonsense'"]),
        ("feedback.layers=[2]", ["feedback.layers", "from 0 to 1", "[2]"]),
        ("feedback.layers=[-1]", ["feedback.layers", "'all' or a list", "[-1]"]),
        ("feedback.layers=0", ["feedback.layers", "'all' or a list", "0"]),
        ("feedback.layers=[]", ["feedback.layers", "'all' or a list", "[]"]),
        ("feedback.layers=[a]", ["feedback.layers", "'all' or a list", "'a'"]),
        ("feedback.layers=[true]", ["feedback.layers", "'all' or a list", "True"]),
        ("feedback.shift=0", ["feedback.shift", "1", "0"]),
        ("recompute.iterations=0", ["recompute.iterations", "or equal to 1", "0"]),
        ("recompute.iterations=-3", ["recompute.iterations", "or equal to 1", "-3"]),
        ("recompute.iterations=1.5", ["recompute.iterations", "1.5", "a valid integer"]),
        ("recompute.tolerance=-1", ["recompute.tolerance", "or equal to 0", "-1"]),
        ("recompute.tolerance=nan", ["recompute.tolerance", "finite", "nan"]),
        ("recompute.damping=0", ["recompute.damping", "above 0 and at most 1", "got 0"]),
        ("recompute.damping=1.5", ["recompute.damping", "above 0 and at most 1", "1.5"]),
        ("recompute.damping=nan", ["recompute.damping", "nan"]),
        ("recompute.start=warm", ["recompute.start", "'cold' or 'carried'", "'warm'"]),
        ("recompute.solver=magic", ["recompute.solver", "full", "'magic'"]),
        (
            "generation.max_new_tokens=-1",
            ["generation.max_new_tokens", "or equal to 0", "-1"],
        ),
        ("generation.top_k=0", ["generation.top_k", "or equal to 1", "0"]),
        ("generation.temperature=0", ["generation.temperature", "above 0", "got 0"]),
        ("generation.strategy=beam", ["generation.strategy", "'greedy' or 'sample'", "'beam'"]),
        ("generation.seed=-1", ["generation.seed", "or equal to 0", "-1"]),
        ("seed=-1", ["seed", "or equal to 0", "-1"]),
        (
            "seed=99999999999999999999",
            ["seed", "or equal to 4294967295"],
        ),
        ("prompts.limit=0", ["prompts.limit", "or equal to 1", "0"]),
        ("prompts.max_tokens=0", ["prompts.max_tokens", "or equal to 1", "0"]),
        ("prompts=file", ["prompts.file", ".txt or .jsonl"]),
        ("prompts.file=", ["prompts.file must be a file that ends in .txt or .jsonl, got ''"]),
        ("model.path=", ["model.path must be a file, folder or name, got ''"]),
        ("device.name=tpu", ["device.name", "'auto', 'cpu' or 'cuda'", "'tpu'"]),
        ("device.batch=0", ["device.batch", "'auto' or greater than or equal to 1", "0"]),
        ("generation.slide=0", ["generation.slide", "or equal to 1", "0"]),
        ("measures.kl=maybe", ["measures.kl", "a valid boolean", "'maybe'"]),
        ("recompute.tolerance=soon", ["recompute.tolerance", "'auto' or a valid number", "'soon'"]),
        ("recompute.iterations=true", ["recompute.iterations", "a number", "True"]),
        ("prompts.split=words", ["prompts.split", "'text' or 'lines'", "'words'"]),
        ("prompts.split=lines", ["prompts.split=lines", "prompts.file", ".txt"]),
        (
            "device.dtype=float16",
            ["device.dtype", "'float64' or 'bfloat16'", "'float16'"],
        ),
        ("tracking.mode=maybe", ["tracking.mode", "'online' or 'disabled'", "'maybe'"]),
        ("tracking.project=x/y", ["tracking.project must be 1 to 128 characters", "'x/y'"]),
        ("study=a/b", ["study", "letters, digits", "'a/b'"]),
        ("study=../up", ["study", "letters, digits", "'../up'"]),
        ("study=''", ["study", "letters, digits", "''"]),
        ("runs_dir=''", ["runs_dir", "empty"]),
        ("reporting_tolerance=0", ["reporting_tolerance", "greater than 0", "got 0"]),
        (f"recompute.iterations={MANY}", ["recompute.iterations", "fewer digits", "(5,000 char"]),
        (f"feedback.strength={MANY}", ["feedback.strength", "fewer digits", "(5,000 char"]),
        (f"feedback.layers=[0,-{MANY}]", ["feedback.layers", "fewer digits"]),
        (f"+feedback.more={MANY}", ["feedback.more", "fewer digits"]),
        (f"recompute.iterations={MANY[:4000]}", ["recompute.iterations", "10000", "(4,000 char"]),
        (f"feedback.strength={MANY[:400]}", ["feedback.strength", "valid number", "(400 char"]),
        ("feedback=null", ["feedback must be one of hidden_state, log_prob", "got null"]),
        ("generation=1", ["generation must be one of greedy, sample", "got 1"]),
        ("feedback.strength=1,2", ["'feedback.strength=1,2'", "-m sweeps over several values"]),
        ("feedback=[1]", ["feedback must be one of hidden_state, log_prob", "[1]"]),
        ("+recompute=[1,2]", ["recompute must be one of full, windowed", "[1,2]"]),
        ("prompts=[a]", ["prompts must be one of builtin, file", "[a]"]),
        ("experiment=[names,kinds]", ["experiment must be one of", "[names,kinds]"]),
        ("study=${study}", ["study", "Recursive interpolation"]),
        ("seed=${seed}", ["seed", "Recursive interpolation"]),
        ("recompute.damping=${recompute.damping}", ["recompute.damping", "Recursive"]),
        (f"runs_dir={'a' * 300}", ["runs_dir", "255 between slashes", "(302 char"]),
        (f"runs_dir={'a/' * 2500}", ["runs_dir", "at most 2,000", "(5,002 char"]),
        (f"study={'a' * 5000}", ["study", "1 to 100", "(5,002 char"]),
        (f"model.path={'a' * 5000}", ["model.path", "(5,002 char"]),
        (f"model.tokenizer={'a' * 5000}", ["model.tokenizer", "(5,000 char"]),
        (f"prompts.file={'a' * 5000}.txt", ["prompts.file", "(5,004 char"]),
        (f"tracking.mode={'a' * 5000}", ["tracking.mode", "(5,002 char"]),
        (f"{'a' * 300}=1", ["the key aaa", "(300 char", "at most 255 bytes"]),
        (f"{'β' * 200}=x", ["the key βββ", "at most 255 bytes"]),
        ("prompts.file=/home/josé/a.txt", ["josé", "in quotes where a value has odd characters"]),
        (f"~{'a' * 300}", ["the key ~aaa", "at most 255 bytes"]),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
def test_an_impossible_setting_is_one_sentence(
    refused: Refused, override: str, words: list[str]
) -> None:
    said = refused(override)
    for word in words:
        assert word in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    "override",
    [
        f"recompute.iterations=3,{MANY}",
        "feedback=[1],[2]",
        "study=a,${study}",
        f"runs_dir=a,{'a' * 300}",
        "recompute.iterations=1,0",
        "feedback.strength=range(0,0)",
        "feedback.strength=range(0,1,0)",
        "feedback.strength=range(0,1,0.0)",
        "experiment=kinds,strength_sweep",
    ],
    ids=lambda value: value[:60],
)
def test_an_impossible_setting_of_one_cell_is_one_sentence_before_any_job(
    in_process: Converge, settings: list[str], tmp_path: Path, override: str
) -> None:
    code, out, err = in_process("converge", "-m", *settings, override)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err)
    assert override.partition("=")[0] in err
    assert len(err) < 1000
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is not absent here")
def test_cuda_asked_for_and_absent_is_one_sentence(refused: Refused) -> None:
    said = refused("device=cuda")
    assert "device.name" in said
    assert "no CUDA device" in said


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["is empty"]),
        ("blank.txt", b" \n\t\n", ["is empty"]),
        ("nul.txt", b"text\0text", ["not text", "NUL"]),
        ("latin.txt", b"caf\xe9", ["not text", "UTF-8"]),
        ("bits.jsonl", bytes(range(256)), ["not text"]),
        ("empty.jsonl", b"\n\n", ["is empty"]),
        ("prompts.csv", b"a,b\n", [".txt or .jsonl"]),
        ("plain.jsonl", b"Once upon a time\n", ["line 1", "not a JSON object"]),
        (".jsonl", b"Once upon a time\n", ["line 1", "not a JSON object"]),
        ("list.jsonl", b'["a"]\n', ["line 1", "not a JSON object"]),
        ("deep.jsonl", b"[" * 100_000, ["line 1", "not a JSON object"]),
        ("torn.jsonl", b'{"id": "a", "text": "b"}\n{"id": "c", "te', ["line 2", "not a JSON"]),
        ("null.jsonl", b'{"id": null, "text": "b"}\n', ["line 1", "id", "None"]),
        ("id.jsonl", b'{"id": 7, "text": "b"}\n', ["line 1", "id", "7"]),
        ("half.jsonl", b'{"id": "\\ud800", "text": "b"}\n', ["line 1", "not a JSON"]),
        ("twice.jsonl", b'{"id": "a", "text": "b"}\n\n{"id": "a", "text": "c"}\n', ["3", "'a'"]),
        ("both.jsonl", b'{"id": "a", "text": "b", "tokens": [1]}\n', ["line 1", "either"]),
        ("neither.jsonl", b'{"id": "a"}\n', ["line 1", "either text or tokens"]),
        ("number.jsonl", b'{"id": "a", "text": 5}\n', ["line 1", "text", "5"]),
        ("words.jsonl", b'{"id": "a", "tokens": ["b"]}\n', ["line 1", "tokens.0", "integer"]),
        ("floats.jsonl", b'{"id": "a", "tokens": [1.0]}\n', ["line 1", "tokens.0", "integer"]),
        ("bools.jsonl", b'{"id": "a", "tokens": [true]}\n', ["line 1", "tokens.0", "integer"]),
        ("nothing.jsonl", b'{"id": "a", "text": ""}\n', ["'a'", "empty", "at least one token"]),
        ("none.jsonl", b'{"id": "a", "tokens": []}\n', ["'a'", "empty", "at least one token"]),
        ("outside.jsonl", b'{"id": "a", "tokens": [1, 257]}\n', ["'a'", "257", "from 0 to 256"]),
        ("negative.jsonl", b'{"id": "a", "tokens": [-1]}\n', ["'a'", "-1", "from 0 to 256"]),
        ("vast.jsonl", b'{"id": "a", "tokens": [1' + b"0" * 30 + b"]}\n", ["'a'", "0 to 256"]),
    ],
)
def test_a_malformed_prompt_file_is_one_sentence(
    refused: Refused, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    said = refused(f"prompts.file={tmp_path / name}")
    for word in words:
        assert word in said
    assert name in said or "prompt 'a'" in said


def test_a_missing_prompt_file_is_one_sentence(refused: Refused, tmp_path: Path) -> None:
    said = refused(f"prompts.file={tmp_path / 'nowhere.txt'}")
    assert "prompts.file" in said
    assert "nowhere.txt" in said
    assert "No such file" in said
    (tmp_path / "folder.txt").mkdir()
    assert "not a regular file" in refused(f"prompts.file={tmp_path / 'folder.txt'}")


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "terminal": lambda path: path.symlink_to("/dev/tty"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("key", ["prompts.file", "model.tokenizer", "corpus.train"])
def test_what_is_no_file_is_never_waited_for(
    refused: Refused, in_process: Converge, tmp_path: Path, key: str, kind: str
) -> None:
    NO_FILES[kind](tmp_path / "text.txt")
    if key == "corpus.train":
        words = (f"corpus.train={tmp_path}", f"corpus.held_out={tmp_path}", "output=o")
        code, _, said = in_process("train", *words)
        assert code == 2
    else:
        said = refused(f"{key}={tmp_path / 'text.txt'}")
    assert re.fullmatch(rf"error: {key}.*text.txt cannot be read: .*\n", said)


def test_a_missing_prompt_file_is_one_sentence_for_a_whole_sweep(
    in_process: Callable[..., tuple[int, str, str]], settings: list[str], tmp_path: Path
) -> None:
    absent = f"prompts.file={tmp_path / 'absent.txt'}"
    code, out, err = in_process(
        "converge", "-m", *settings, "prompts=file", absent, "feedback.strength=0,1,2"
    )
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "absent.txt" in err
    assert not (tmp_path / "runs").exists()


def test_a_huge_prompt_file_is_refused_unread(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: a terabyte that takes no room
    said = refused(f"prompts.file={path}")
    assert "1,099,511,627,776 bytes" in said
    assert "at most 67,108,864" in said


def test_a_prompt_longer_than_the_block_names_the_remedy(refused: Refused) -> None:
    said = refused("prompts.max_tokens=33")
    assert "'prose'" in said
    assert "33 tokens" in said
    assert "prompts.max_tokens=32" in said


# --- models -------------------------------------------------------------------------------------


class _Payload:
    """Would leave a file behind if the checkpoint were unpickled blindly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_a_model_that_cannot_be_loaded_is_one_sentence(
    refused: Refused, checkpoint_folder: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in refused(f"model.path={missing}")

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("nothing of interest")
    assert "not a model folder" in refused(f"model.path={foreign}")

    torn = tmp_path / "torn"
    shutil.copytree(checkpoint_folder, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in refused(f"model.path={torn}")

    trace = tmp_path / "executed"
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps({"model": _Payload(trace), "model_args": {}}))
    assert "evil.pt" in refused(f"model.path={evil}")
    assert not trace.exists(), "no code in a checkpoint is executed"
    zipped = tmp_path / "zipped.pt"
    torch.save({"model": _Payload(trace), "model_args": {}}, zipped)
    assert "asks to run code" in refused(f"model.path={zipped}")
    assert not trace.exists()

    odd = tmp_path / "odd"
    (odd / "config.json").mkdir(parents=True)
    said = refused(f"model.path={odd}")
    assert "model.path" in said
    assert "runs_dir" not in said


def test_a_tokenizer_that_does_not_fit_is_one_sentence(
    refused: Refused, make_gpt: Callable[..., GPT], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    save_checkpoint(make_gpt(1, vocab_size=200), small, tokenizer="byte")
    said = refused(f"model.path={small}")
    assert "257 ids" in said
    assert "200 embeddings" in said
    said = refused("model.tokenizer=gpt2")
    assert "50257 ids" in said
    assert "257 embeddings" in said
    said = refused(f"model.tokenizer={tmp_path / 'nowhere.json'}")
    assert "model.tokenizer must be gpt2, byte or a readable file" in said
    (tmp_path / "broken.json").write_text('{"format": "other"}')
    assert "not a tokenizer file" in refused(f"model.tokenizer={tmp_path / 'broken.json'}")


# --- places -------------------------------------------------------------------------------------


def test_an_unwritable_runs_dir_is_one_sentence(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    said = refused(f"runs_dir={tmp_path / 'file'}", code=1)
    assert "runs_dir" in said
    assert str(tmp_path / "file") in said
    assert (tmp_path / "file").read_text() == "kept"
    said = refused("runs_dir=/proc/nowhere", code=1)
    assert "runs_dir" in said
    assert "/proc/nowhere" in said
    said = refused("hydra.run.dir=/proc/nowhere", code=1)
    assert said.startswith("error: '/proc/nowhere' cannot be written"), "it is no runs_dir"


def test_a_finished_study_that_cannot_be_written_is_reported(
    converge: Converge,
    tmp_path: Path,
    freeze: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert converge("feedback.strength=0,1", "-m")[0] == 0
    freeze(tmp_path / "runs")
    for words in (["feedback.strength=0,1", "-m"], ["feedback.strength=0"]):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # one disk for all
            code, out, err = converge(*words)
        assert (code, err) == (0, "")
        assert "2 runs: 2 finished" in out


def test_an_interrupt_before_there_are_settings_is_one_sentence(
    converge: Converge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.command.to_settings", interrupt)
    assert converge() == (130, "", "error: interrupted; the same command carries on\n")


def test_a_sweep_into_an_unwritable_runs_dir_is_one_sentence(
    in_process: Converge, settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    code, _, err = in_process(
        "converge", "-m", *settings, f"runs_dir={tmp_path / 'file'}", "feedback.strength=0,1"
    )
    assert code == 1
    assert re.fullmatch(r"error: runs_dir: .*file.* cannot be written .*\n", err)


def test_a_run_folder_in_whose_place_lies_a_file_is_one_sentence(
    converge: Converge, runs: Callable[[], list[Path]]
) -> None:
    converge()
    (folder,) = runs()
    shutil.rmtree(folder)
    folder.write_text("in the way")
    code, _, err = converge()
    assert code == 1
    assert re.fullmatch(r"error: runs_dir: .* cannot be written .*\n", err)
    assert folder.read_text() == "in the way"


def test_a_full_disk_is_one_sentence_and_the_run_resumes_once_there_is_room(
    converge: Converge,
    small_disk: Callable[[int], Path],
    status: Callable[[Path], dict[str, Any]],
) -> None:
    disk = small_disk(512)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(484 * 1024))
    words = (f"runs_dir={disk / 'runs'}", "prompts.limit=5")
    code, _, err = converge(*words, "-m", "seed=range(0,40)")
    assert code == 1
    assert re.fullmatch(r"error: runs_dir: '.*/plans/.*' cannot be written \(No space .*\)\n", err)
    shutil.rmtree(disk / "runs")
    code, _, err = converge(*words)
    assert code == 1
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "runs_dir" in errors[0]
    assert "No space left on device" in errors[0]
    (folder,) = (disk / "runs" / "s").iterdir()
    assert not (folder / "status.json").exists() or status(folder)["state"] != "finished"
    ballast.unlink()
    assert converge(*words)[0] == 0
    assert status(folder)["state"] == "finished"


def test_a_limit_on_file_sizes_is_one_sentence(
    converge: Converge, runs: Callable[[], list[Path]], status: Callable[[Path], dict[str, Any]]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        code, out, err = converge(
            *("prompts.limit=1", "prompts.max_tokens=32", "recompute.iterations=31"),
            "device.dtype=float64",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert re.fullmatch(r"error: runs_dir: .* cannot be written \(.*File too large.*\)\n", err)
    assert status(runs()[0])["state"] == "failed"
    assert "File too large" in status(runs()[0])["error"]
    assert "File too large" in out, "the table shows it"


def test_a_file_of_settings_that_cannot_be_read_is_one_sentence(
    refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    for content, said in ((b"study: [", "mine.yaml"), (b"\xff", "'utf-8' codec can't decode")):
        (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
        assert said in refused("experiment=mine", f"--config-dir={tmp_path}")


def test_quantized_weights_are_studied_without_what_needs_float64(
    in_process: Converge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from tests.tiny_transformers import tiny

    tiny("llama", dtype=torch.float32, vocab_size=257).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "is_quantized", True, raising=False)
    words = ["model=hugging_face", f"model.path={tmp_path / 'm'}", "model.tokenizer=byte"]
    words += ["prompts.limit=1", "prompts.max_tokens=8", f"runs_dir={tmp_path}"]
    words += ["tracking.mode=disabled", "device=cpu"]
    code, _, err = in_process("converge", *words)
    said = "error: quantized weights have no float64: choose measures.lyapunov=false\n"
    assert (code, err) == (1, said)
    assert in_process("converge", *words, "measures.lyapunov=false")[0] == 0


def test_a_study_that_is_moved_while_its_run_computes_is_not_begun_again_at_the_old_place(
    in_process: Converge, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = RunFolder.keep

    def keep_and_move(folder: RunFolder, *batch: Any) -> None:
        keep(folder, *batch)
        folder.path.parent.rename(tmp_path / "moved")

    monkeypatch.setattr(RunFolder, "keep", keep_and_move)
    code, out, err = in_process("converge", *settings, "device.batch=1")
    assert (code, out) == (1, "")
    gone = rf"error: runs_dir: '{tmp_path}/runs/s/.*' cannot be written \(No such file .*\)\n$"
    assert re.search(gone, err)
    assert not [*(tmp_path / "runs").iterdir()]


# --- sweeps -------------------------------------------------------------------------------------


def test_a_job_that_fails_stops_no_other_and_each_failure_is_said(
    in_process: Converge,
    settings: list[str],
    runs: Callable[[], list[Path]],
    status: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    good, outside = tmp_path / "good.jsonl", tmp_path / "outside.jsonl"
    good.write_text(json.dumps({"id": "a", "tokens": [1, 2, 3]}) + "\n")
    outside.write_text(json.dumps({"id": "a", "tokens": [999]}) + "\n")
    words = [f"prompts.file={tmp_path / 'nowhere.txt'},{outside},{good}"]
    code, out, err = in_process("converge", "-m", *settings, *words)
    assert code == 1
    assert len(err.splitlines()) == 2
    assert "nowhere.txt" in err
    assert "999" in err
    assert sorted(status(folder)["state"] for folder in runs()) == ["failed", "finished"]
    assert runs()[0].name in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is not absent here")
def test_a_run_that_somebody_computes_is_not_called_failed_by_who_cannot_begin_it(
    in_process: Converge, settings: list[str], runs: Callable[[], list[Path]],
    status: Callable[[Path], dict[str, Any]],
) -> None:  # fmt: skip
    assert in_process("converge", "-m", *settings)[0] == 0
    (folder,) = runs()
    before = {**status(folder), "state": "running"}
    (folder / "status.json").write_text(json.dumps(before))
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        code, out, err = in_process("converge", "-m", *settings, "device=cuda")
    assert code == 1
    assert re.fullmatch("error: device.name: .*cuda.*\n", err)
    assert "1 run: 1 running" in out
    assert status(folder) == before


def test_a_failed_run_is_in_the_table_beside_the_others(
    in_process: Converge, settings: list[str], runs: Callable[[], list[Path]]
) -> None:
    def sweep() -> tuple[int, str, str]:
        return in_process("converge", "-m", *settings, "feedback.strength=0,1,2")

    assert sweep()[0] == 0
    broken = runs()[1]
    name = broken.name
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / "trajectory.parquet").mkdir()  # cannot be replaced by a file
    code, out, err = sweep()
    assert code == 1
    assert re.fullmatch(rf"error: runs_dir: .*{name}.* cannot be written .*\n", err)
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    assert "failed: runs_dir" in line
    assert out.count("settled") == 2
    (broken / "trajectory.parquet").rmdir()
    code, out, _ = sweep()
    assert code == 0
    assert out.startswith("3 runs, 2 finished already\nrun 3 of 3: ")
    assert "failed: runs_dir" not in out


def test_a_command_of_its_own_exits_with_the_same_codes(command: Callable[..., list[str]]) -> None:
    done = subprocess.run(
        command("recompute.iterations=-3"), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    said = "error: recompute.iterations must be greater than or equal to 1, got -3\n"
    assert done.stderr == said
    assert done.stdout == ""
