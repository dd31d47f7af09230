"""Prepare the names that the names model is trained on: 5,163 American first names.

    python -m scripts.prepare_names [--out data/names]
                                              (pip install -e '.[names]' -c constraints.txt)

The names come from the package ``names`` (MIT), in lower case, each once, however many of its lists
it is in. A tenth is held out: those whose hash says so, which no other name can change. They are
written, one a line, to ``OUT/train/names.txt`` and ``OUT/held_out/names.txt``; the held-out ones
also, in the order of their hashes, to ``OUT/prompts.jsonl``, each between two start-and-stop tokens
of the byte tokenizer, as the model is trained on it.
"""

import argparse
import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path

from scripts._command import Failure, command
from scripts.prepare_corpus import write
from stateful_gpt.tokenizer import byte_tokenizer, end_token

PACKAGE = "names"
LISTS = ("dist.female.first", "dist.male.first")
EVERY = 10  # one name in so many is held out


@command("prepare_names", OSError)
def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the corpus of the names model.")
    parser.add_argument("--out", type=Path, default=Path("data/names"))
    options = parser.parse_args()
    train, held_out = split(read_names())
    prompts = map(prompt, sorted(held_out, key=digest))
    files = {"train/names.txt": train, "held_out/names.txt": held_out, "prompts.jsonl": prompts}
    for place, lines in files.items():
        write(options.out / place, "".join(f"{line}\n" for line in lines))


def read_names() -> list[str]:
    """The first names of the package in alphabetical order, each once."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        helps = "pip install -e '.[names]' -c constraints.txt"
        raise Failure(f"the package {PACKAGE!r} is not installed: {helps}") from None
    names = set()
    for name in LISTS:
        # a line: NAME, share in per cent, cumulative share, rank
        lines = Path(str(package.locate_file(f"{PACKAGE}/{name}"))).read_text("ascii").splitlines()
        names |= {line.split()[0].lower() for line in lines}
    return sorted(names)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def split(names: list[str]) -> tuple[list[str], list[str]]:
    """Names to train on and names held out, in the order given."""
    held_out = {name for name in names if int(digest(name), 16) % EVERY == 0}
    return [name for name in names if name not in held_out], [n for n in names if n in held_out]


def prompt(name: str) -> str:
    encoding = byte_tokenizer()
    end = end_token(encoding)
    return json.dumps({"id": name, "tokens": [end, *encoding.encode_ordinary(name), end]})


if __name__ == "__main__":
    sys.exit(main())
