"""How long it takes to load many saved runs, and how much memory: 200 runs of 50,000 rows.

Writes runs of random numbers into a temporary folder, in the form of real ones. Then a fresh
process loads them as a table or figure does: the frames of all runs, and every trajectory read
once, into one frame. The memory is the peak of that process, with its libraries.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

import analysis
from scripts.benchmark.rows import Measures, Row, row

PROMPTS = [f"prompt{number}" for number in range(4)]
TOKENS = 125
MEASURES = ["step_max", "step_rms", "settled_prefix", "oracle_error_max", "nll", "kl_step"]
NOTES = {
    "runs": "",
    "rows": "of trajectories, in all",
    "frames_seconds": "runs, prompts and measures",
    "trajectories_seconds": "every estimate, in one frame",
    "seconds": "both",
    "cpu_seconds": "of all threads: tells of a busy machine",
    "peak_bytes": "of the loading process",
}


def write_runs(folder: Path, *, runs: int, iterations: int) -> None:
    """``runs`` run folders, in which every text of TOKENS has ``iterations`` passes."""
    rng = np.random.default_rng(0)
    index = [PROMPTS, [0], range(1, iterations + 1)]
    names = ["prompt_id", "step", "iteration", "position"]
    measures = pd.MultiIndex.from_product(index, names=names[:3]).to_frame(index=False)
    measures[MEASURES] = rng.random((len(measures), len(MEASURES)))
    trajectory = pd.MultiIndex.from_product([*index, range(TOKENS)], names=names)
    grid = trajectory.to_frame(index=False).astype(dict.fromkeys(names[1:], np.int32))
    texts = rng.integers(4096, size=(len(PROMPTS), TOKENS))
    grid["token_id"] = np.repeat(texts, iterations, axis=0).ravel().astype(np.int32)
    grid["token"] = " token" + grid["token_id"].astype(str)
    ends = {"outcome": "settled", "nll": 4.0, "nll_plain": 4.1}
    of_prompt = {**ends, "prompt_tokens": TOKENS, "iterations": iterations}
    prompts = [{"prompt_id": name, **of_prompt, "iterations_to_tolerance": 7} for name in PROMPTS]
    for number in range(runs):
        config = {
            "study": "benchmark",
            "seed": 0,
            "model": {"name": "bundled", "path": "bundled", "tokenizer": None},
            "feedback": {"kind": "log_prob", "strength": number / 100, "layers": "all"},
            "recompute": {"solver": "full", "iterations": iterations, "damping": 1.0},
            "generation": {"strategy": "greedy", "max_new_tokens": 0},
            "device": {"name": "cpu", "dtype": "float32"},
        }
        place = folder / f"{number:010x}"
        place.mkdir(parents=True)
        noise = -rng.exponential(3.0, size=len(grid)).astype(np.float32)
        grid.assign(log_prob=noise).to_parquet(place / "trajectory.parquet", index=False)
        measures.to_parquet(place / "iterations.parquet", index=False)
        (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        summary = {"run_id": place.name, "overall": ends, "prompts": prompts}
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
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }


def loading(*, quick: bool) -> list[Row]:
    runs, iterations = (20, 10) if quick else (200, 100)
    with tempfile.TemporaryDirectory(prefix="benchmark-load-") as name:
        write_runs(Path(name) / "benchmark", runs=runs, iterations=iterations)
        words = [sys.executable, "-m", "scripts.benchmark.load", name]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["rows"] == runs * iterations * len(PROMPTS) * TOKENS, "every row is read"
    return [row(key, [value], note=NOTES[key]) for key, value in found.items()]


ROWS: Measures = {tuple(NOTES): loading}

if __name__ == "__main__":  # the process that is measured
    print(json.dumps(measure(Path(sys.argv[1]))))
