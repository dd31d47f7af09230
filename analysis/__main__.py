"""The commands `python -m analysis figures`, `table` and `page`.

Results go to stdout, what was left out and what went wrong to stderr, each in one line. Exit codes:
0 done, 2 a source or path is no good, 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.load import load
from analysis.news import lacking_line, left_out_line, repeated_line, some
from analysis.output import write_whole
from analysis.runs import Runs
from analysis.saved import SourceError
from analysis.table import csv_table, text_table

SOURCE = (
    "a run folder, a study folder, an offline W&B run (its folder or .wandb file), or "
    "wandb:ENTITY/PROJECT[/GROUP]"
)

if TYPE_CHECKING:
    from analysis.figures.drawing import Skipped


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # β on any terminal
    try:
        runs = load(arguments.sources)
        runs = runs.only(run_ids=arguments.run, prompt_ids=arguments.prompt)
        chosen = [runs.saved[key] for key in runs.runs.index]
        for line in (
            left_out_line(runs.left_out),
            repeated_line(runs.repeated),
            lacking_line(chosen),
        ):
            if line:
                print(line, file=sys.stderr)
        code = COMMANDS[arguments.command](runs, arguments)
        sys.stdout.flush()
        return code
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _figures(runs: Runs, arguments: argparse.Namespace) -> int:
    from analysis.figures import write_figures  # a table needs no matplotlib
    from analysis.figures.drawing import Skipped

    def tell(news: Path | Skipped) -> None:
        if isinstance(news, Skipped):
            print(f"Not drawn: {news.name}: {news.reason}.", file=sys.stderr)
        else:
            print(news)

    write_figures(runs, arguments.out, command=_again(arguments, "--out", "figures"), tell=tell)
    return 0


def _table(runs: Runs, arguments: argparse.Namespace) -> int:
    command = _again(arguments)
    if arguments.csv is not None:
        content = csv_table(runs).encode("utf-8")
        about = {
            "title": "A row per run and prompt, and one over all prompts of each run",
            "runs": list(dict.fromkeys(runs.runs["run_id"])),
            "redraw": _again(arguments, "--csv", "table.csv"),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_whole(arguments.csv, content)
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        write_whole(arguments.csv.with_name(f"{arguments.csv.name}.json"), text.encode("utf-8"))
    print(text_table(runs))
    print(f"runs: {some(list(dict.fromkeys(runs.runs['run_id'])))}; again: {command}")
    return 0


def _page(runs: Runs, arguments: argparse.Namespace) -> int:
    from analysis.page.build import build  # only where a page is made

    write_whole(arguments.out, build(runs).encode("utf-8"))
    print(arguments.out)
    return 0


def _again(arguments: argparse.Namespace, *ending: str) -> str:
    """The command as typed, but for where its result goes: that does not change it."""
    chosen = [word for run in arguments.run for word in ("--run", run)]
    chosen += [word for prompt in arguments.prompt for word in ("--prompt", prompt)]
    words = ["python", "-m", "analysis", arguments.command, *arguments.sources, *chosen, *ending]
    return shlex.join(words)


COMMANDS = {"figures": _figures, "table": _table, "page": _page}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Saved runs to figures and tables."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE)
    source.add_argument(
        "--run", action="append", default=[], metavar="RUN_ID", help="only this run (repeatable)"
    )
    shared = argparse.ArgumentParser(add_help=False, parents=[source])
    shared.add_argument(
        "--prompt", action="append", default=[], metavar="ID", help="only this prompt (repeatable)"
    )
    figures = commands.add_parser("figures", parents=[shared], help="draw PNG and SVG figures")
    figures.add_argument("--out", type=Path, required=True, metavar="DIR", help="written here")
    table = commands.add_parser("table", parents=[shared], help="print a table, and save it as CSV")
    table.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="every column, full precision; FILE.json says which runs and which command",
    )
    page = commands.add_parser("page", parents=[shared], help="one HTML file to explore a study in")
    page.add_argument("--out", type=Path, required=True, metavar="FILE", help="written here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
