"""The whole nine-strength study, from the command to the last file, against the naive loop.

Rows: ``sweep_vs_naive`` with everything measured and W&B offline, ``sweep_bare_vs_naive`` with the
measures off, ``overhead`` (measures, and telling W&B of them, over the passes alone),
``job_seconds`` (of a run beside all that: files and the end of W&B's run), ``scaling_T`` and
``scaling_prompts`` (exponents of time).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from math import log
from pathlib import Path

import torch
import yaml

from scripts.benchmark.cuda import sweep as passes_alone
from scripts.benchmark.naive import read_texts
from scripts.benchmark.rows import Measures, Row, in_turns, ratio, row, seconds
from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.model import GPT, GPTConfig

STRENGTHS = "-1,-0.5,-0.25,-0.1,0,0.1,0.5,1,2"
FEW = "-1,0.1,1"
TEXTS, TOKENS = 4, 96
ALONE = "hydra.sweeper.processes=1"  # where the seconds of runs are added up
OFF = ("measures.oracle=false", "measures.lyapunov=false", "measures.kl=false")


def naive(strengths: str) -> dict[float, float]:
    """Run the naive loop in a process of its own; where each strength's loss ends (nats/token)."""
    words = [sys.executable, "-m", "scripts.benchmark.naive", strengths, str(TEXTS), str(TOKENS)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {found["strength"]: found["nll"] for found in rows}


def study(strengths: str, *words: str) -> dict[float, dict[str, float]]:
    """Run the study's command; the summary of each strength, with the seconds that it computed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-sweep-") as folder:
        command = [
            *(sys.executable, "-m", "experiments.converge", "-m", "experiment=strength_sweep"),
            *(f"runs_dir={folder}", f"feedback.strength={strengths}", *words),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        found = {}
        for path in Path(folder).glob("*/*/summary.json"):
            config = yaml.safe_load(path.with_name("config.yaml").read_text(encoding="utf-8"))
            summary = json.loads(path.read_text(encoding="utf-8"))
            found[config["feedback"]["strength"]] = summary["overall"]
        return found


def against_the_naive_loop(*, quick: bool) -> list[Row]:
    strengths, largest = FEW if quick else STRENGTHS, 0.0
    ends: dict[float, float] = {}
    found: dict[float, dict[str, float]] = {}
    peer, whole, bare = [], [], []
    for _ in range(1 if quick else 3):
        peer.append(seconds(lambda: ends.update(naive(strengths))))
        whole.append(seconds(lambda: found.update(study(strengths))))
        bare.append(seconds(lambda: study(strengths, *OFF, "tracking.mode=disabled")))
        largest = max(largest, *(abs(found[s]["nll"] - nll) for s, nll in ends.items()))
    of_peer, of_whole, of_bare = (f"{statistics.median(t):.1f} s" for t in (peer, whole, bare))
    note = f"{of_whole}; naive {of_peer}; their losses differ by at most {largest:.1g} nats/token"
    off = f"{of_bare}, measures and tracking off"
    return [
        ratio("sweep_vs_naive", peer, whole, target=">= 3", note=note),
        ratio("sweep_bare_vs_naive", peer, bare, target=">= 10", note=off),
    ]


def overhead(*, quick: bool) -> list[Row]:
    """What computing the study takes beyond the passes, over the passes; files, start and end of a
    run apart.
    """
    checkpoint = load_checkpoint("bundled")
    texts = read_texts(checkpoint.tokenizer, TEXTS, TOKENS)
    passes = partial(passes_alone, checkpoint.model, texts)
    strengths = FEW if quick else STRENGTHS
    ratios = []
    for _ in range(1 if quick else 3):
        passes(0.5)
        alone = seconds(partial(passes, *map(float, strengths.split(","))))
        whole = sum(found["seconds"] for found in study(strengths, ALONE).values())
        ratios.append((whole - alone) / alone)
    return [row("overhead", ratios, target="<= 1.0", note="(computing - passes alone) / passes")]


def job_seconds(*, quick: bool) -> list[Row]:
    """A run's cost beside what it computes: many runs less few, by run."""
    few, many = 2, 8 if quick else 14

    def beside(runs: int) -> float:
        strengths = ",".join(str(number / 10) for number in range(1, runs + 1))
        found: dict[float, dict[str, float]] = {}
        words = (ALONE, "prompts.limit=1", "prompts.max_tokens=32")
        taken = seconds(lambda: found.update(study(strengths, *words)))
        return taken - sum(one["seconds"] for one in found.values())

    costs = [(beside(many) - beside(few)) / (many - few) for _ in range(1 if quick else 3)]
    return [row("job_seconds", costs, target="<= 0.25", note="W&B offline")]


def scaling(key: str, target: str, sizes: dict[int, tuple[int, int]], *, quick: bool) -> list[Row]:
    """The exponent of time against what varies of (texts, tokens), at GPT-2's shape, 2 layers."""
    sizes = dict([*sizes.items()][: 3 if quick else None])
    model = GPT(GPTConfig(n_layer=2))
    model.initialize(generator=torch.Generator().manual_seed(0))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    works = [
        partial(passes_alone, model, torch.randint(50257, size, generator=generator).tolist(), 0.5)
        for size in sizes.values()
    ]
    times = in_turns(*works, repeats=1 if quick else 3)
    logs, turns = list(map(log, sizes)), zip(*times, strict=True)
    slopes = [statistics.linear_regression(logs, list(map(log, turn))).slope for turn in turns]
    medians = zip(sizes, map(statistics.median, times), strict=True)
    note = ", ".join(f"{varied}: {taken:.2f} s" for varied, taken in medians)
    return [row(key, slopes, target=target, note=note)]


LENGTHS = {length: (1, length) for length in (64, 128, 256, 512, 1024)}
COUNTS = {count: (count, 32) for count in (1, 4, 16, 64)}
ROWS: Measures = {
    ("sweep_vs_naive", "sweep_bare_vs_naive"): against_the_naive_loop,
    ("overhead",): overhead,
    ("job_seconds",): job_seconds,
    ("scaling_T",): partial(scaling, "scaling_T", "<= 1.5", LENGTHS),
    ("scaling_prompts",): partial(scaling, "scaling_prompts", "<= 1.0", COUNTS),
}
