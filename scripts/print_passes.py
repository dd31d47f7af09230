"""Print what every pass said of every token of short texts, until nothing moves any more.

    python -m scripts.print_passes runs/names_feedback --prompt shanita [--tolerance 0.001]

A SOURCE is what `python -m analysis` takes. A row is a pass and a column a token, in nats: the
token's log-probability. The first token is left out, as nothing predicts it.
"""

import argparse
import sys

import pandas as pd
from tabulate import tabulate

import analysis
from analysis.read.saved import SourceError
from analysis.text import visible
from scripts._command import command

END = ("<|endoftext|>", "■")  # a long name for what begins and ends a text


@command("print_passes")
def main() -> int:
    parser = argparse.ArgumentParser(description="Print the passes over short texts.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--prompt", action="append", default=[], help="its id; default: all")
    helps = "passes are printed until none is further than this from the last; default 0.001"
    parser.add_argument("--tolerance", type=float, default=1e-3, metavar="NATS", help=helps)
    options = parser.parse_args()
    try:
        runs = analysis.load(*options.sources).only(prompt_ids=options.prompt)
        trajectory = runs.trajectory
        if trajectory.empty:
            raise SourceError("There is no trajectory in these sources.")
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    for prompt_id in runs.prompt_ids:
        of_prompt = trajectory[trajectory["prompt_id"] == prompt_id]
        for run, frame in of_prompt.groupby("run", observed=True, sort=False):
            settings = runs.runs.loc[run]
            print(f"{visible(prompt_id)}: {settings['model']}, {settings['label']}")
            print(passes(frame, tolerance=options.tolerance), end="\n\n")
    return 0


def passes(trajectory: pd.DataFrame, *, tolerance: float) -> str:
    """A table of a row for each pass, up to the first from which on all are near the last.

    The last step of a trajectory of one run and prompt is printed.
    """
    last = trajectory[trajectory["step"] == trajectory["step"].max()]
    wide = last.pivot(index="iteration", columns="position", values="log_prob").iloc[:, 1:]
    away = (wide - wide.iloc[-1]).abs().max(axis=1, skipna=False)  # nats
    far = away.index[~(away <= tolerance)]
    shown = wide.loc[: far[-1] + 1] if len(far) else wide.iloc[:1]
    tokens = last.drop_duplicates("position").set_index("position")["token"].astype(str)
    names = [visible(tokens[place].replace(*END)) for place in wide]
    return tabulate(shown, headers=["pass", *names], floatfmt=".3f", tablefmt="plain")


if __name__ == "__main__":
    sys.exit(main())
