"""The corpus of names: every name once, never on both sides, always the same split."""

import json
import resource
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from scripts import prepare_names
from scripts.prepare_names import split

Prepare = Callable[[Path], int]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Prepare:
    def run(out: Path) -> int:
        monkeypatch.setattr("sys.argv", ["prepare_names", "--out", str(out)])
        return prepare_names.main()

    return run


def test_every_name_of_the_package_is_on_one_side_once(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare(tmp_path) == 0
    train, held_out = (
        (tmp_path / side / "names.txt").read_text().splitlines() for side in ("train", "held_out")
    )
    package = metadata.distribution("names")
    expected: set[str] = set()
    for kind in ("female", "male"):
        content = Path(str(package.locate_file(f"names/dist.{kind}.first"))).read_bytes()
        expected.update(row.split(b" ")[0].decode().lower() for row in content.splitlines())
    assert len(expected) == 5163
    assert sorted(train + held_out) == sorted(expected), "the split is of unique names"
    assert 450 < len(held_out) < 580  # a tenth of 5,163, within three standard deviations
    assert {"mary", "john", "guillermina"} <= expected
    assert all(name.isalpha() and name.islower() and name.isascii() for name in train + held_out)


def test_the_split_is_always_the_same(prepare: Prepare, tmp_path: Path) -> None:
    for attempt in ("one", "other"):
        assert prepare(tmp_path / attempt) == 0
    for file in ("train/names.txt", "held_out/names.txt", "prompts.jsonl"):
        first, second = ((tmp_path / attempt / file).read_bytes() for attempt in ("one", "other"))
        assert first == second
    # a name's side does not depend on which other names there are
    names = (tmp_path / "one" / "train" / "names.txt").read_text().splitlines()
    assert split(names) == (names, [])
    assert split(names[::7]) == (names[::7], [])


def test_prompts_are_the_held_out_names_as_the_model_reads_them(
    prepare: Prepare, tmp_path: Path
) -> None:
    assert prepare(tmp_path) == 0
    held_out = (tmp_path / "held_out" / "names.txt").read_text().splitlines()
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert sorted(prompt["id"] for prompt in prompts) == held_out
    for prompt in prompts:
        assert prompt["tokens"] == [256, *prompt["id"].encode(), 256]


def test_a_missing_package_is_one_sentence_with_the_command_that_helps(
    prepare: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare_names, "PACKAGE", "no-such-package-of-names")
    assert prepare(tmp_path) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "pip install -e '.[names]' -c constraints.txt" in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(Path("/proc/nowhere")) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("prepare_names: ")
    assert "/proc/nowhere" in err


def test_a_file_that_a_full_disk_cuts_short_is_not_there(prepare: Prepare, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # of 33 kB of names to train on
    try:
        assert prepare(tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
