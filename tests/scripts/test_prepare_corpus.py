"""The text of a corpus is read from R's files without R."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from scripts.prepare_corpus import read_character_vectors, read_novels

ROOT = Path(__file__).parents[2]
STRING, CHARACTERS, INTEGERS = 16, 9, 13  # R's serialisation codes


def integer(value: int) -> bytes:
    return struct.pack(">i", value)


def serialised(lines: list[str], *, code: int = STRING) -> bytes:
    """What R's serialize(version = 3, xdr = TRUE) writes for a character vector."""
    header = b"X\n" + integer(3) + integer(0x040201) + integer(0x030500)
    header += integer(len("UTF-8")) + b"UTF-8"
    body = integer(code) + integer(len(lines))
    for line in lines:
        raw = line.encode("utf-8")
        flags = CHARACTERS | (0x8000 if not line.isascii() else 0x40000)
        body += integer(flags) + integer(len(raw)) + raw
    return header + body


def lazy_load(*vectors: bytes) -> bytes:
    """A lazy-load database: each value compressed, after its length in four bytes."""
    return b"".join(integer(len(vector)) + zlib.compress(vector) for vector in vectors)


def test_every_vector_of_a_lazy_load_database_is_read_line_by_line() -> None:
    one = ["EMMA", "", "By Jane Austen", "    indented", "café – “quoted”"]
    other = ["Persuasion"] + [f"line {number}" for number in range(1000)]
    database = lazy_load(serialised(one), serialised([]), serialised(other))
    assert read_character_vectors(database) == [one, [], other]


def test_flags_beside_the_type_do_not_matter() -> None:
    attributes = 0x200  # R marks an object that has attributes, names for example
    assert read_character_vectors(lazy_load(serialised(["a"], code=STRING | attributes))) == [["a"]]


def test_other_data_are_refused() -> None:
    with pytest.raises(ValueError, match="not the expected vectors"):
        read_character_vectors(lazy_load(serialised(["a"], code=INTEGERS)))
    with pytest.raises(zlib.error):
        read_character_vectors(b"\0\0\0\x10not compressed")


def test_a_file_that_is_no_package_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "not.deb").write_text("not a package")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.prepare_corpus", "--package", str(tmp_path / "not.deb"),
         "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("prepare_corpus: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held", [None, ["Another novel"]])
def test_another_package_is_one_sentence(tmp_path: Path, held: list[str] | None) -> None:
    (tmp_path / "DEBIAN").mkdir()
    about = "Package: other\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    (tmp_path / "DEBIAN" / "control").write_text(about)
    if held is not None:
        database = tmp_path / "janeaustenr" / "data" / "Rdata.rdb"
        database.parent.mkdir(parents=True)
        database.write_bytes(lazy_load(serialised(held)))
    package = tmp_path / "other.deb"
    subprocess.run(["dpkg-deb", "-b", tmp_path, package], check=True, capture_output=True)
    with pytest.raises(ValueError, match=r"other\.deb is no r-cran-janeaustenr: it lacks emma, "):
        read_novels(package)
