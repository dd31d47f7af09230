"""The commands `python -m analysis figures`, `table` and `page`.

Results go to stdout, what was left out and what went wrong to stderr, each in one line. Exit codes:
0 done, 1 not all could be printed, 2 a source or path is no good, 130 interrupted.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from analysis import load
from analysis.output import with_steady_streams, write_whole
from analysis.read.saved import SourceError
from analysis.read.sources import left_out_line
from analysis.runs import Runs
from analysis.table import csv_tables, text_tables
from analysis.text import printable, some

SOURCE = (
    "a run folder, a study folder, a trained model, or of convergence runs also an offline W&B run "
    "(its folder or .wandb file) or wandb:ENTITY/PROJECT[/GROUP]"
)


def main(argv: Sequence[str] | None = None) -> int:
    return with_steady_streams(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        runs = load(*arguments.sources)
        for line in _news(runs, arguments.run):
            _complain(line)
        runs = runs.only(run_ids=arguments.run, prompt_ids=arguments.prompt)
        {"figures": _figures, "table": _table, "page": _page}[arguments.command](runs, arguments)
        if runs.damaged:
            _complain(left_out_line(runs.damaged))
    except SourceError as error:
        _complain(str(error))
        return 2
    return 0


def _news(runs: Runs, chosen: Sequence[str]) -> Iterator[str]:
    """What there is to tell besides the runs, or the chosen of them: one line each."""
    if runs.left_out:
        yield left_out_line(runs.left_out)
    if runs.repeated:
        count = len(runs.repeated)
        noun = "1 run that lies" if count == 1 else f"{count} runs that lie"
        yield f"Counted once: {noun} in several places: {some(runs.repeated)}."
    lacking = runs.only(run_ids=chosen).runs.dropna(subset=["lacking"])
    if len(lacking):
        noun = "1 run has" if len(lacking) == 1 else f"{len(lacking)} runs have"
        names = some([*(lacking["run_id"] + " (" + lacking["lacking"] + ")")])
        yield f"{noun} only W&B's history, which does not tell prompts apart: {names}."


def _figures(runs: Runs, arguments: argparse.Namespace) -> None:
    # a shell within a notebook hands on the notebook's backend, which may not be installed here
    os.environ.pop("MPLBACKEND", None)
    from analysis.draw.figures import write_figures  # a table needs no matplotlib

    again = _again(arguments, "--out", "figures")
    for made in write_figures(runs, arguments.out or _default(arguments), command=again):
        print(printable(str(made)), file=sys.stdout if isinstance(made, Path) else sys.stderr)


def _table(runs: Runs, arguments: argparse.Namespace) -> None:
    for place, (title, ending, text) in enumerate(csv_tables(runs) if arguments.csv else ()):
        path = arguments.csv
        path = path.with_stem(path.stem + ending) if place else path  # the first as it was named
        about = {
            "title": title,
            "runs": runs.run_ids,
            "redraw": _again(arguments, "--csv", str(arguments.csv)),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        write_whole(path, text.encode())
        beside = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        write_whole(path.with_name(f"{path.name}.json"), beside.encode())
    print(f"{text_tables(runs)}\n\nruns: {some(runs.run_ids)}; again: {_again(arguments)}")


def _page(runs: Runs, arguments: argparse.Namespace) -> None:
    from analysis.page.build import build  # only where a page is made

    if runs.runs.empty:
        raise SourceError("A page shows convergence runs, and there is none.")
    path = arguments.out
    if path is None or os.path.isdir(path) or not path.suffix:
        path = (path or _default(arguments)) / "study.html"
    write_whole(path, build(runs).encode())
    print(printable(str(path)))


def _default(arguments: argparse.Namespace) -> Path:
    """The folder of what is drawn of a source, where none is given."""
    return Path("figures", Path(arguments.sources[0].removeprefix("wandb:")).resolve().name)


def _complain(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _again(arguments: argparse.Namespace, *ending: str) -> str:
    """The command as typed; ``ending`` says where its result goes."""
    chosen = [word for run in arguments.run for word in ("--run", run)]
    chosen += [word for prompt in arguments.prompt for word in ("--prompt", prompt)]
    words = ["python", "-m", "analysis", arguments.command, *arguments.sources, *chosen, *ending]
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Saved runs to figures, tables and pages."
    )
    sources = argparse.ArgumentParser(add_help=False)
    sources.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE)
    for flag, value in (("--run", "RUN_ID"), ("--prompt", "ID")):
        chosen = f"only this {flag[2:]} (repeatable)"
        sources.add_argument(flag, action="append", default=[], metavar=value, help=chosen)
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, parents=[sources])
    figures = add("figures", help="draw PNG and SVG figures")
    here = "written here; default figures/ and the name of the source"
    figures.add_argument("--out", type=Path, metavar="DIR", help=here)
    table = add("table", help="print a table, and save it as CSV")
    kept = "every column, full precision; FILE.json says which runs and which command"
    table.add_argument("--csv", type=Path, metavar="FILE", help=kept)
    page = add("page", help="one HTML file to explore a study in")
    page.add_argument("--out", type=Path, metavar="FILE", help=f"{here}, there study.html")
    return parser


if __name__ == "__main__":
    sys.exit(main())
