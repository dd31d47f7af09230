"""How long it takes to load many saved runs, and how much memory.

    python -m scripts.benchmark.load            # 200 runs of 50,000 rows; --json for a last line

Writes runs of random numbers into a temporary folder, in the form of real ones. Then a fresh
process loads them as a table or figure does: the frames of all runs, and every trajectory read
once, into one frame. The memory is the peak of that process, with its libraries.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from tabulate import tabulate

import analysis

PROMPTS = 4
TOKENS = 125
VOCABULARY = 4096


def write_runs(folder: Path, *, runs: int, rows: int) -> int:
    """``runs`` run folders of about ``rows`` rows each; returns how many rows there are in all."""
    iterations = max(rows // (PROMPTS * TOKENS), 1)
    rng = np.random.default_rng(0)
    names = np.array([f" token{number}" for number in range(VOCABULARY)])
    texts = rng.integers(VOCABULARY, size=(PROMPTS, TOKENS))
    grid = pd.DataFrame(
        {
            "prompt_id": np.repeat([f"prompt{n}" for n in range(PROMPTS)], iterations * TOKENS),
            "step": np.int32(0),
            "iteration": np.tile(
                np.repeat(np.arange(1, iterations + 1, dtype=np.int32), TOKENS), PROMPTS
            ),
            "position": np.tile(np.arange(TOKENS, dtype=np.int32), PROMPTS * iterations),
            "token_id": np.repeat(texts, iterations, axis=0).ravel().astype(np.int32),
        }
    )
    grid["token"] = names[grid["token_id"]]
    for number in range(runs):
        place = folder / f"{number:010x}"
        place.mkdir(parents=True)
        noise = -rng.exponential(3.0, size=len(grid)).astype(np.float32)
        grid.assign(log_prob=noise).to_parquet(place / "trajectory.parquet", index=False)
        _write_records(place, strength=number / 100, iterations=iterations, rng=rng)
    return runs * len(grid)


def _write_records(
    place: Path, *, strength: float, iterations: int, rng: np.random.Generator
) -> None:
    names = ["step_max", "step_rms", "settled_prefix", "oracle_error_max", "nll", "kl_step"]
    values = rng.random((PROMPTS * iterations, len(names)))
    measures = pd.DataFrame(values, columns=names)
    measures.insert(0, "iteration", np.tile(np.arange(1, iterations + 1), PROMPTS))
    measures.insert(0, "step", 0)
    measures.insert(0, "prompt_id", np.repeat([f"prompt{n}" for n in range(PROMPTS)], iterations))
    measures.to_parquet(place / "iterations.parquet", index=False)
    config = {
        "study": "benchmark",
        "seed": 0,
        "model": {"name": "bundled", "path": "bundled", "tokenizer": None},
        "feedback": {"kind": "log_prob", "strength": strength, "layers": "all"},
        "recompute": {"solver": "full", "iterations": iterations, "damping": 1.0},
        "generation": {"strategy": "greedy", "max_new_tokens": 0},
        "device": {"name": "cpu", "dtype": "float32"},
    }
    prompts = [
        {
            "prompt_id": f"prompt{number}",
            "prompt_tokens": TOKENS,
            "outcome": "settled",
            "iterations": iterations,
            "iterations_to_tolerance": 7,
            "nll": 4.0,
            "nll_plain": 4.1,
        }
        for number in range(PROMPTS)
    ]
    overall = {"outcome": "settled", "nll": 4.0, "nll_plain": 4.1}
    (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    summary = {"run_id": place.name, "overall": overall, "prompts": prompts}
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    status = {"state": "finished", "commit": "0" * 40, "dirty": False}
    (place / "status.json").write_text(json.dumps(status), encoding="utf-8")


def measure(folder: Path) -> dict[str, float]:
    """Seconds and rows of loading everything under a folder, in this process."""
    began, cpu = time.perf_counter(), time.process_time()
    runs = analysis.load(str(folder))
    framed = time.perf_counter()
    rows = len(runs.trajectory)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "runs": len(runs.runs),
        "rows": rows,
        "frames_seconds": framed - began,
        "trajectories_seconds": done - framed,
        "seconds": done - began,
        "cpu_seconds": time.process_time() - cpu,  # of all threads: tells of a busy machine
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }


def main() -> int:
    arguments = _arguments()
    if arguments.folder is not None:  # the process that is measured
        print(json.dumps(measure(arguments.folder)))
        return 0
    with tempfile.TemporaryDirectory(prefix="benchmark-load-") as name:
        folder = Path(name) / "benchmark"
        written = write_runs(folder, runs=arguments.runs, rows=arguments.rows)
        words = [sys.executable, "-m", "scripts.benchmark.load", "--folder", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"error: the loading process failed: {done.stderr.strip()}", file=sys.stderr)
        return 1
    found = json.loads(done.stdout)
    assert found["rows"] == written, "every row is read"
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    cells = {
        "runs": f"{found['runs']}",
        "rows": f"{found['rows']:,}",
        "frames": f"{found['frames_seconds']:.2f} s",
        "trajectories": f"{found['trajectories_seconds']:.2f} s",
        "all": f"{found['seconds']:.2f} s",
        "CPU": f"{found['cpu_seconds']:.2f} s",
        "peak": f"{found['peak_bytes'] / 2**20:.0f} MB",
    }
    print(
        tabulate([cells], headers="keys", tablefmt="plain", disable_numparse=True, stralign="right")
    )
    if arguments.json:
        print(json.dumps(found))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark.load", description="Time and memory of loading many runs."
    )
    parser.add_argument("--runs", type=_count, default=200, metavar="N", help="how many (200)")
    parser.add_argument("--rows", type=_count, default=50_000, metavar="N", help="of each (50000)")
    parser.add_argument("--json", action="store_true", help="the numbers again, as a last line")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
