"""Prepare the text that the bundled model is trained on: Jane Austen's six novels.

    python -m scripts.prepare_corpus [--package FILE.deb] [--out data/austen]

The novels (public domain) come from Debian's package r-cran-janeaustenr, fetched with
``apt-get download`` or given with ``--package``; R is not needed. Five are written to
``OUT/train/``, each twice: as it is printed, with lines of 70 characters, and reflowed to one line
a paragraph, as people type. *Persuasion* is written to ``OUT/held_out/``, and reflowed to
``OUT/held_out_reflowed/``; its two volumes, to choose on one and to confirm on the other, to
``OUT/validation/`` and ``OUT/test/``. Any folders of text files can take their place.
"""

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from experiments.runs.files import write_text
from scripts._command import command

PACKAGE = "r-cran-janeaustenr"
TITLES = {  # first words of each text -> file name
    "EMMA": "emma",
    "MANSFIELD PARK": "mansfield_park",
    "NORTHANGER ABBEY": "northanger_abbey",
    "Persuasion": "persuasion",
    "PRIDE AND PREJUDICE": "pride_and_prejudice",
    "SENSE AND SENSIBILITY": "sense_and_sensibility",
}
HELD_OUT = "persuasion"
VOLUME_ENDS = "(End of volume one.)"
CHARACTER_VECTOR = 16  # R's serialisation codes, R Internals section 1.8


@command("prepare_corpus", OSError, ValueError, zlib.error, subprocess.CalledProcessError)
def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the corpus of the bundled model.")
    parser.add_argument("--package", type=Path, help=f"a downloaded {PACKAGE} .deb file")
    parser.add_argument("--out", type=Path, default=Path("data/austen"))
    options = parser.parse_args()
    for name, text in read_novels(options.package).items():
        if name == HELD_OUT:
            write(options.out / "held_out" / f"{name}.txt", text)
            write(options.out / "held_out_reflowed" / f"{name}.txt", reflow(text))
            first, second = text.split(VOLUME_ENDS)
            write(options.out / "validation" / f"{name}_1.txt", first)
            write(options.out / "test" / f"{name}_2.txt", second)
        else:
            write(options.out / "train" / f"{name}.txt", text)
            write(options.out / "train" / f"{name}_reflowed.txt", reflow(text))


def reflow(text: str) -> str:
    """One line a paragraph, one space between words and between sentences."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    print(f"{path}  {len(text):,} characters  sha256 {digest}")


def read_novels(package: Path | None) -> dict[str, str]:
    """The six texts by file name, from a .deb file or a fresh download of it."""
    with tempfile.TemporaryDirectory() as scratch:
        if package is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True)
            package = next(Path(scratch).glob(f"{PACKAGE}*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        places = Path(scratch).rglob("janeaustenr/data/Rdata.rdb")
        database = b"".join(place.read_bytes() for place in places)
    novels = {}
    for lines in read_character_vectors(database):
        if name := TITLES.get("".join(lines[:1]).strip()):
            novels[name] = "\n".join(lines) + "\n"
    if missing := set(TITLES.values()) - set(novels):
        raise ValueError(f"{package} is no {PACKAGE}: it lacks {', '.join(sorted(missing))}")
    return novels


def read_character_vectors(database: bytes) -> list[list[str]]:
    """The string vectors of an R lazy-load database (a row of length-prefixed zlib streams)."""
    vectors = []
    while database:
        packed = zlib.decompressobj()
        stream = io.BytesIO(packed.decompress(database[4:]))
        database = packed.unused_data
        stream.seek(14)  # behind "X\n" and three version numbers
        stream.seek(_integer(stream), os.SEEK_CUR)  # the encoding's name
        if _integer(stream) & 0xFF != CHARACTER_VECTOR:
            raise ValueError("the package's data are not the expected vectors of lines")
        lines = []
        for _ in range(_integer(stream)):
            _integer(stream)  # the encoding, as flags
            lines.append(stream.read(_integer(stream)).decode("utf-8"))
        vectors.append(lines)
    return vectors


def _integer(stream: io.BytesIO) -> int:
    return int.from_bytes(stream.read(4), "big")


if __name__ == "__main__":
    sys.exit(main())
