"""How a study stands: its runs, why some are not finished, and the command that completes it.

    python -m experiments.status runs/mine

Exit codes: 0 all that was begun or planned is finished, 1 something is not, 2 there is no study.
"""

import argparse
import sys
from pathlib import Path

from experiments.sweeps.report import report
from experiments.sweeps.study import survey
from stateful_gpt.console import cut, run_command


def main() -> int:
    return run_command("status", _main)


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.status",
        description="How a study stands, and the command that completes it.",
        epilog="Exit codes: 0 complete, 1 something is not finished, 2 there is no study.",
    )
    parser.add_argument("study", metavar="STUDY", type=Path, help="its folder, such as runs/mine")
    path: Path = parser.parse_args().study
    problem = "holds no run and no plan" if path.is_dir() else "is not a folder"
    try:
        study = survey(path)
    except OSError as error:
        study, problem = None, f"cannot be read ({error.strerror or error})"
    if study is None or not study.runs:
        said = f"STUDY must be a study's folder; {cut(repr(str(path)))} {problem}"
        print(f"error: {said}", file=sys.stderr)
        return 2
    print(report(study))
    return 0 if study.complete else 1


if __name__ == "__main__":
    sys.exit(main())
