"""Print what every pass said of every token of short texts, until nothing moves any more.

    python -m scripts.print_passes runs/names_feedback --prompt shanita [--tolerance 0.001]

A SOURCE is what `python -m analysis` takes. A row is a pass and a column a token, in nats: the
token's log-probability. The first token is left out, as nothing predicts it.
"""

import argparse
import sys

import numpy as np
import pandas as pd

import analysis
from analysis.read.saved import SourceError
from analysis.text import visible

END = ("<|endoftext|>", "■")  # a long name for what begins and ends a text


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the passes over short texts.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--prompt", action="append", default=[], help="its id; default: all")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="NATS",
        help="passes are printed until none is further than this from the last; default 0.001",
    )
    options = parser.parse_args()
    try:
        runs = analysis.load(*options.sources).only(run_ids=[], prompt_ids=options.prompt)
        frame = runs.trajectory
        for prompt_id in runs.prompt_ids:
            for run, settings in runs.runs.iterrows():
                of_run = frame[(frame["run"] == run) & (frame["prompt_id"] == prompt_id)]
                if len(of_run):
                    print(f"{visible(prompt_id)}: {settings['model']}, {settings['label']}")
                    print(passes(of_run, tolerance=options.tolerance))
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def passes(trajectory: pd.DataFrame, *, tolerance: float) -> str:
    """A table of a row for each pass, up to the first from which on all are near the last.

    Args:
        trajectory: of one run and prompt, as `Runs.trajectory` has it; the last step is printed.
    """
    last = trajectory[trajectory["step"] == trajectory["step"].max()]
    wide = last.pivot(index="iteration", columns="position", values="log_prob").iloc[:, 1:]
    away = (wide - wide.iloc[-1]).abs().max(axis=1, skipna=False)  # nats
    far = np.flatnonzero(~(away <= tolerance))
    shown = wide.iloc[: int(far[-1]) + 2 if len(far) else 1]
    tokens = last.drop_duplicates("position").set_index("position")["token"].astype(str)
    names = [visible(tokens[place].replace(*END)) for place in wide]
    lines = ["pass" + "".join(f"{name:>8}" for name in names)]
    for iteration, values in shown.iterrows():
        lines.append(f"{iteration:4d}" + "".join(f"{value:8.3f}" for value in values))
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
