"""Study how a GPT's estimates of its tokens settle when they are fed back: one run, or a sweep.

    python -m experiments.converge feedback.strength=0.5
    python -m experiments.converge -m feedback.strength=-1,0,1 recompute.iterations=32

One run is one configuration and one folder, ``<runs_dir>/<study>/<run_id>/``. A finished run is
not computed again; a failed or killed one carries on with its first batch of prompts that is not
done.
"""

import sys

from experiments.command import run_command
from experiments.converge.settings import ConvergeSettings
from experiments.sweeps.sweep import Runner


def main() -> int:
    runner = Runner(
        name="converge",
        settings=ConvergeSettings,
        compute="experiments.converge.run:converge",
        locate="experiments.converge.identity:locate",
    )
    return run_command(runner)


if __name__ == "__main__":
    sys.exit(main())
