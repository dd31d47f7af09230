"""Print what every pass said of every token of short texts, until nothing moves any more.

    python -m scripts.print_passes runs/names_feedback --prompt shanita [--tolerance 0.001]

A SOURCE is what `python -m analysis` takes. A row is a pass and a column a token, in nats: the
token's log-probability. The first token is left out, as nothing predicts it.
"""

import argparse
import sys

import numpy as np

from analysis.load import load
from analysis.runs import Grid
from analysis.saved import SourceError

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
        runs = load(options.sources).only(run_ids=[], prompt_ids=options.prompt)
        for prompt_id in runs.prompt_ids:
            for run, settings in runs.runs.iterrows():
                what = f"{settings['model']}, {settings['kind']}, strength {settings['strength']:g}"
                print(f"{prompt_id}: {what}")
                print(passes(runs.grid(run, prompt_id), tolerance=options.tolerance))
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def passes(grid: Grid, *, tolerance: float) -> str:
    """A table of a row for each pass, up to the first from which on all are near the last."""
    away = np.abs(grid.log_prob - grid.log_prob[:, -1:]).max(axis=0)  # (N,) nats
    far = np.flatnonzero(~(away <= tolerance))
    shown = min(int(far[-1]) + 2 if len(far) else 1, grid.log_prob.shape[1])
    lines = ["pass" + "".join(f"{token.replace(*END):>8}" for token in grid.tokens[1:])]
    for n in range(shown):
        values = "".join(f"{value:8.3f}" for value in grid.log_prob[1:, n])
        lines.append(f"{grid.iterations[n]:4d}{values}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
