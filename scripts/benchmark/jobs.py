"""What a run of a sweep costs beside its model: settings, tracking, files.

    python -m scripts.benchmark.jobs            # two minutes; --json for a last line

Sweeps the bundled model over one prompt in a process of its own, with few runs and with many. What
is measured is the time of the process less the ``seconds`` that its runs say they computed; the
difference between many and few, by run, leaves out what a process does once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from scripts.benchmark.contestants import Row, hardware, row

FEW, MANY = 2, 14
TARGET = "<= 0.3"
WORDS = "prompts.limit=1 prompts.max_tokens=48 recompute.iterations=16"


def beside_the_model(runs: int, mode: str) -> float:
    """Seconds that a sweep of so many runs takes beside what they compute."""
    with tempfile.TemporaryDirectory(prefix="benchmark-jobs-") as folder:
        strengths = ",".join(f"{number / 10}" for number in range(1, runs + 1))
        words = ["-m", f"runs_dir={folder}", "study=jobs", f"tracking.mode={mode}", *WORDS.split()]
        words.append(f"feedback.strength={strengths}")
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "experiments.converge", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        summaries = [json.loads(path.read_text()) for path in Path(folder).glob("*/*/summary.json")]
        assert len(summaries) == runs, "every strength is a run"
    return seconds - sum(summary["overall"]["seconds"] for summary in summaries)


def job_cost(mode: str, *, repeats: int) -> Row:
    costs = [
        (beside_the_model(MANY, mode) - beside_the_model(FEW, mode)) / (MANY - FEW)
        for _ in range(repeats)
    ]
    note = f"seconds a run beside its model; {MANY} runs less {FEW}, tracking.mode={mode}"
    return row(f"job_seconds_{mode}", costs, target=TARGET, note=note)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark.jobs", description="Cost of a run beside its model."
    )
    parser.add_argument("--json", action="store_true", help="the numbers again, as a last line")
    asked = parser.parse_args()
    machine = hardware()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for mode in ("disabled", "offline"):
        try:
            found = job_cost(mode, repeats=3)
        except RuntimeError as error:
            print(f"error: a sweep failed: {error}", file=sys.stderr)
            return 1
        rows.append(found)
        spread = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
        print(f"{found.key}  {spread}, asked {found.target}: {found.note}")
    if asked.json:
        values = {found.key: found.value for found in rows}
        print(json.dumps({**values, **machine, "rows": [asdict(found) for found in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
