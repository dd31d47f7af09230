"""Which models can follow a state? One contestant on one task, or a sweep of them.

    python -m experiments.state_tracking contestant.layers=3
    python -m experiments.state_tracking -m experiment=state_tracking

One run is one folder, ``<runs_dir>/<study>/<run_id>/``: ``config.yaml``, ``status.json``,
``accuracy.parquet`` (by depth and level), ``history.parquet`` and ``summary.json``. A finished run
is not run again; one that was killed starts afresh, which takes seconds and gives the same numbers.
"""

import sys

from experiments.command import run_command
from experiments.state_tracking.settings import StateTrackingSettings
from experiments.sweeps.sweep import Runner


def main() -> int:
    runner = Runner(
        name="state_tracking",
        settings=StateTrackingSettings,
        compute="experiments.state_tracking.run:track",
        locate="experiments.state_tracking.run:locate",
    )
    return run_command(runner)


if __name__ == "__main__":
    sys.exit(main())
