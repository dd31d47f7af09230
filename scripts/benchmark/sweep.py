"""The whole nine-strength study, from the command to the last file, against the naive loop.

Rows: ``sweep_vs_naive`` with everything measured and W&B offline, ``sweep_bare_vs_naive`` with the
measures off, ``overhead`` (measures, files and tracking over the passes alone), ``job_seconds``
(a run beside its model), ``scaling_T`` and ``scaling_prompts`` (exponents of time).
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from scripts.benchmark.rows import Row, arguments, in_turns, ratio, report, row, seconds
from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.recompute import RecomputeConfig

STRENGTHS = "-1,-0.5,-0.25,-0.1,0,0.1,0.5,1,2"
FEW = "-1,0.1,1"
TEXTS, TOKENS = 4, 96
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
            summary = json.loads(path.read_text(encoding="utf-8"))
            config = (path.parent / "config.yaml").read_text(encoding="utf-8")
            (strength,) = (
                float(line.split(":")[1]) for line in config.splitlines() if "  strength:" in line
            )
            found[strength] = summary["overall"]
    return found


def against_the_naive_loop(*, quick: bool) -> list[Row]:
    strengths, repeats = (FEW, 1) if quick else (STRENGTHS, 3)
    times: dict[str, list[float]] = {"naive": [], "whole": [], "bare": []}
    largest = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        ends = naive(strengths)
        times["naive"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        found = study(strengths)
        times["whole"].append(time.perf_counter() - begin)
        times["bare"].append(seconds(lambda: study(strengths, *OFF, "tracking.mode=disabled")))
        largest = max(abs(found[s]["nll"] - nll) for s, nll in ends.items())
    medians = {name: f"{statistics.median(taken):.1f} s" for name, taken in times.items()}
    note = f"naive {medians['naive']}; their losses differ by at most {largest:.1g} nats/token"
    return [
        ratio(
            "sweep_vs_naive",
            times["naive"],
            times["whole"],
            target=">= 3",
            note=f"{medians['whole']}; {note}",
        ),
        ratio(
            "sweep_bare_vs_naive",
            times["naive"],
            times["bare"],
            target=">= 10",
            note=f"{medians['bare']}, measures and tracking off",
        ),
    ]


def passes_alone(texts: list[list[int]], model: LanguageModel, strength: float) -> None:
    generate(
        model,
        texts,
        max_new_tokens=0,
        feedback=Feedback(strength=strength),
        config=RecomputeConfig(iterations=len(texts[0]) - 1),
    )


def overhead(*, quick: bool) -> Row:
    """What the study's runs take beyond the passes, over the passes; model and start-up apart."""
    checkpoint = load_checkpoint("bundled")
    texts = _texts(checkpoint.tokenizer, TEXTS, TOKENS)
    strengths = [float(word) for word in (FEW if quick else STRENGTHS).split(",")]
    ratios = []
    for _ in range(1 if quick else 3):
        passes_alone(texts, checkpoint.model, 0.5)
        alone = sum(
            seconds(lambda s=s: passes_alone(texts, checkpoint.model, s))  # type: ignore[misc]
            for s in strengths
        )
        whole = sum(found["seconds"] for found in study(",".join(map(str, strengths))).values())
        ratios.append((whole - alone) / alone)
    return row("overhead", ratios, target="<= 1.0", note="(computing - passes alone) / passes")


def job_seconds(*, quick: bool) -> Row:
    """A run's cost beside what it computes: many runs less few, by run."""
    few, many = 2, 8 if quick else 14

    def beside(runs: int) -> float:
        strengths = ",".join(str(number / 10) for number in range(1, runs + 1))
        words = ("prompts.limit=1", "prompts.max_tokens=32")
        begin = time.perf_counter()
        found = study(strengths, *words)
        return time.perf_counter() - begin - sum(one["seconds"] for one in found.values())

    costs = [(beside(many) - beside(few)) / (many - few) for _ in range(1 if quick else 3)]
    return row("job_seconds", costs, target="<= 0.25", note="W&B offline")


def scaling(key: str, sizes: list[tuple[int, int]], *, quick: bool) -> Row:
    """The exponent of time against what varies of (texts, tokens), at GPT-2's shape, 2 layers."""
    model = GPT(GPTConfig(n_layer=2))
    model.initialize(generator=torch.Generator().manual_seed(0))
    model.eval()
    generator = torch.Generator().manual_seed(1)
    works = []
    for count, length in sizes:
        texts = torch.randint(50257, (count, length), generator=generator).tolist()
        works.append(lambda texts=texts: passes_alone(texts, model, 0.5))
    times = in_turns(*works, repeats=1 if quick else 3)
    varied = [length if sizes[0][0] == sizes[-1][0] else count for count, length in sizes]
    slopes = [
        statistics.linear_regression(
            [math.log(v) for v in varied], list(map(math.log, taken))
        ).slope
        for taken in zip(*times, strict=True)
    ]
    each = ", ".join(
        f"{v}: {statistics.median(taken):.2f} s" for v, taken in zip(varied, times, strict=True)
    )
    target = "<= 1.5" if key == "scaling_T" else "<= 1.0"
    return row(key, slopes, target=target, note=each)


def _texts(tokenizer: object, count: int, length: int) -> list[list[int]]:
    from scripts.benchmark.naive import TEXTS as FILE

    lines = FILE.read_text(encoding="utf-8").splitlines()[:count]
    encode = tokenizer.encode_ordinary  # type: ignore[attr-defined]
    return [encode(json.loads(line)["text"])[:length] for line in lines]


def rows(*, quick: bool, only: list[str]) -> Iterator[Row]:
    def wanted(*keys: str) -> bool:
        return not only or any(key in only for key in keys)

    if wanted("sweep_vs_naive", "sweep_bare_vs_naive"):
        yield from against_the_naive_loop(quick=quick)
    if wanted("overhead"):
        yield overhead(quick=quick)
    if wanted("job_seconds"):
        yield job_seconds(quick=quick)
    if wanted("scaling_T"):
        lengths = (64, 128, 256) if quick else (64, 128, 256, 512, 1024)
        yield scaling("scaling_T", [(1, length) for length in lengths], quick=quick)
    if wanted("scaling_prompts"):
        counts = (1, 4, 16) if quick else (1, 4, 16, 64)
        yield scaling("scaling_prompts", [(count, 32) for count in counts], quick=quick)


def main() -> int:
    options = arguments("sweep", __doc__)
    found = rows(quick=options.quick, only=options.only)
    return report(found, as_json=options.json, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
