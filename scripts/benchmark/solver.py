"""What the recompute costs on this machine, against the naive way and against transformers.

    python -m scripts.benchmark.solver --quick --json

The naive contestant is the project's own reference: attention written out, logits of the whole
text at once, every token in every pass. Contestants take turns in one process, and the median of
their ratios counts; memory is measured in a fresh process each. GPT-2's shape has random weights,
query and key projections scaled so that attention is not uniform.
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmark.contestants import (
    Row,
    as_transformers,
    gpt2_shape,
    hardware,
    in_turns,
    naive_pass,
    random_tokens,
    ratio,
    row,
)
from stateful_gpt.checkpoint import Checkpoint, load_checkpoint
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.solving import token_pass
from stateful_gpt.stepping import Stepper
from stateful_gpt.windowed import Windowed

STRENGTHS = (0.1, 0.5, 1.0)
SETTLED_TO = 1e-4  # nats from the oracle
TOLERANCE = 1e-5  # nats: what the windowed solver is asked for, so as to end within SETTLED_TO


def text_tokens(checkpoint: Checkpoint) -> Tensor:
    """One block of the studies' built-in prompts: what a trained model makes of text counts."""
    lines = (
        (Path(__file__).parents[2] / "experiments" / "converge" / "prompts.jsonl")
        .read_text()
        .splitlines()
    )
    text = "\n".join(json.loads(line)["text"] for line in lines)
    ids = checkpoint.tokenizer.encode_ordinary(text)
    return torch.tensor([ids[: checkpoint.model.config.block_size]])


# --- memory -------------------------------------------------------------------------------------


def peak_mb(contestant: str) -> float:
    """Peak resident memory of a fresh process that runs one pass at T = 1024, in MB."""
    command = [sys.executable, "-m", "scripts.benchmark.solver", "--memory", contestant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@torch.inference_mode()
def run_for_memory(contestant: str) -> float:
    """The peak while the second pass runs, read from the kernel after its mark was reset."""
    model = gpt2_shape()
    tokens = random_tokens(model, 1024)
    run = token_pass(model, tokens, Feedback(strength=0.5))
    state = torch.full((1, 1024), -5.0)

    def work() -> object:
        return model(tokens) if contestant == "hidden" else run(state)

    work()  # the libraries' own buffers are made here
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    work()
    with open("/proc/self/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6


def pass_extra_mb(*, repeats: int) -> Row:
    pairs = [(peak_mb("hidden"), peak_mb("pass")) for _ in range(repeats)]
    return row(
        "pass_extra_mb",
        [ours - plain for plain, ours in pairs],
        target="<= 100 MB",
        note=f"hidden states alone peak at {statistics.median(p for p, _ in pairs):.0f} MB",
    )


# --- one pass -----------------------------------------------------------------------------------


def pass_overhead(model: GPT, *, repeats: int) -> Row:
    tokens = random_tokens(model, model.config.block_size)
    state = torch.full(tokens.shape, -5.0)
    fed = token_pass(model, tokens, Feedback(strength=0.5))
    plain = token_pass(model, tokens, Feedback(strength=0.0))
    ours, theirs = in_turns(lambda: fed(state), lambda: plain(state), repeats=repeats)
    note = f"bundled model, T = {tokens.size(1)}: {1e3 * statistics.median(ours):.1f} ms a pass"
    return ratio("pass_overhead", ours, theirs, target="<= 1.05 x", note=note)


def pass_gemm_fraction(model: GPT, *, length: int, repeats: int) -> Row:
    """Time of a pass's matrix products alone over the time of the pass."""
    config = model.config
    C, T, V = config.n_embd, length, config.vocab_size
    tokens = random_tokens(model, length)
    state = torch.full(tokens.shape, -5.0)
    fed = token_pass(model, tokens, Feedback(strength=0.5))
    x, wide = torch.randn(T, C), torch.randn(T, 4 * C)
    block = model.transformer.blocks[0]
    q = torch.randn(config.n_head, T, C // config.n_head)
    weights = torch.randn(config.n_head, T, T)

    def products() -> None:
        for _ in range(config.n_layer):
            x @ block.attn.c_attn.weight.T
            q @ q.transpose(1, 2)
            weights @ q
            x @ block.attn.c_proj.weight.T
            x @ block.mlp.c_fc.weight.T
            wide @ block.mlp.c_proj.weight.T
        x @ model.lm_head.weight.T

    theirs, ours = in_turns(products, lambda: fed(state), repeats=repeats)
    return ratio(
        "pass_gemm_fraction",
        theirs,
        ours,
        target=">= 0.8 of",
        note=f"T = {T}, C = {C}, V = {V}; {statistics.median(ours):.3f} s a pass; attention counted"
        " as if it were not causal",
    )


# --- the fixed point ----------------------------------------------------------------------------


class Counted:
    """How many passes the model made, and over how many positions in all."""

    def __init__(self, model: GPT) -> None:
        self.passes = self.tokens = 0
        self._handle = model.register_forward_pre_hook(self._of_model)
        self._run = Stepper.run

        def run(stepper: Stepper, tokens: Tensor, **options: Any) -> None:
            self._add(tokens)
            self._run(stepper, tokens, **options)

        Stepper.run = run  # type: ignore[method-assign, assignment]

    def _of_model(self, _: object, given: tuple[Tensor, ...]) -> None:
        self._add(given[0])

    def _add(self, tokens: Tensor) -> None:
        self.passes += 1
        self.tokens += tokens.size(1)

    def stop(self) -> None:
        self._handle.remove()
        Stepper.run = self._run  # type: ignore[method-assign]


def solve(model: GPT, tokens: Tensor, strength: float) -> Tensor:
    result = generate(
        model,
        tokens.tolist(),
        max_new_tokens=0,
        feedback=Feedback(strength=strength),
        config=RecomputeConfig(iterations=tokens.size(1), tolerance=TOLERANCE),
        solver=Windowed(),
    )
    return result.log_probs[0]


def fixed_point(key: str, model: GPT, tokens: Tensor, *, target: str, repeats: int) -> Row:
    """T - 1 naive passes against the windowed solver, geometric mean over the strengths."""
    T = tokens.size(1)
    state = torch.full(tokens.shape, -5.0)
    rounds = [1.0] * repeats
    said = []
    exact = copy.deepcopy(model).double()  # the same weights, read without float32's rounding
    oracles = {
        strength: left_to_right(exact, tokens, Feedback(strength=strength))[0]
        for strength in STRENGTHS
    }
    del exact
    for strength in STRENGTHS:
        counted = Counted(model)
        settled = solve(model, tokens, strength)
        counted.stop()
        feedback = Feedback(strength=strength)
        error = (settled - oracles[strength]).abs().max().item()
        naive, ours = in_turns(
            lambda feedback=feedback: naive_pass(model, tokens, feedback, state),
            lambda strength=strength: solve(model, tokens, strength),
            repeats=repeats,
        )
        ratios = [(T - 1) * a / b for a, b in zip(naive, ours, strict=True)]
        rounds = [
            total * value ** (1 / len(STRENGTHS))
            for total, value in zip(rounds, ratios, strict=True)
        ]
        said.append(
            f"β={strength:g}: {statistics.median(ratios):.0f}x, {counted.passes} passes,"
            f" {counted.tokens} tokens, {error:.0e} nats"
            + ("" if error <= SETTLED_TO else " (MISSED)")
        )
    note = (
        f"T = {T}, one naive pass timed and taken {T - 1} times; errors against the oracle in"
        " float64; " + "; ".join(said)
    )
    return row(key, rounds, target=target, note=note)


def scaling_exponent(model: GPT, *, lengths: tuple[int, ...], repeats: int) -> Row:
    """The slope of log time against log T of the windowed solver at strength 0.5."""
    contestants = [
        lambda T=T: solve(model, random_tokens(model, T), 0.5)  # type: ignore[misc]
        for T in lengths
    ]
    times = in_turns(*contestants, repeats=repeats)
    x = [math.log(T) for T in lengths]
    slopes = [
        statistics.linear_regression(x, [math.log(t) for t in one]).slope
        for one in zip(*times, strict=True)
    ]
    shown = ", ".join(
        f"{T}: {statistics.median(t):.2f} s" for T, t in zip(lengths, times, strict=True)
    )
    return row("scaling_exponent", slopes, target="<= 1.5", note=f"GPT-2 width, 2 layers; {shown}")


# --- generation ---------------------------------------------------------------------------------


def generation(key: str, model: GPT, *, new: int, target: str, repeats: int) -> Row:
    """Tokens a second with exact feedback over transformers' without any, greedily.

    Settling the prompt of 16 tokens is part of our time, as reading it is of theirs.
    """
    peer = as_transformers(model)
    prompt = random_tokens(model, 16)

    def theirs() -> list[int]:
        ids = peer.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
        )
        return list(ids[0].tolist())

    def ours(strength: float = 0.5) -> list[int]:
        return generate(
            model,
            prompt.tolist(),
            max_new_tokens=new,
            feedback=Feedback(strength=strength),
            config=RecomputeConfig(iterations=model.config.block_size, tolerance=1e-12),
            solver=Windowed(),
            start=Start.CARRIED,
        ).tokens[0]

    same = ours(0.0) == theirs()
    slow, fast = in_turns(theirs, ours, repeats=repeats)
    note = (
        f"{new / statistics.median(fast):.0f} against {new / statistics.median(slow):.0f} tokens/s;"
        f" at β = 0 both draw the same text: {'yes' if same else 'no'}"
    )
    return ratio(key, slow, fast, target=target, note=note)


# --- the whole ----------------------------------------------------------------------------------


def measure(*, quick: bool, only: list[str]) -> list[Row]:
    checkpoint = load_checkpoint("bundled")
    bundled = checkpoint.model
    large = gpt2_shape()
    repeats, long = (3, 256) if quick else (5, 1024)
    slim = GPT(GPTConfig(n_layer=2))
    slim.initialize(generator=torch.Generator().manual_seed(0))
    jobs: dict[str, Callable[[], Row]] = {
        "pass_extra_mb": lambda: pass_extra_mb(repeats=1 if quick else 3),
        "pass_overhead": lambda: pass_overhead(bundled, repeats=20),
        "fixed_point_bundled": lambda: fixed_point(
            "fixed_point_bundled",
            bundled,
            text_tokens(checkpoint),
            target=">= 40 x",
            repeats=repeats,
        ),
        "generate_bundled": lambda: generation(
            "generate_bundled", bundled, new=200, target=">= 2.5 x", repeats=repeats
        ),
        "pass_gemm_fraction": lambda: pass_gemm_fraction(large, length=long, repeats=repeats),
        "generate_gpt2": lambda: generation(
            "generate_gpt2", large, new=48 if quick else 256, target=">= 1.2 x", repeats=repeats
        ),
        "scaling_exponent": lambda: scaling_exponent(
            slim.eval(), lengths=(64, 128, 256) if quick else (128, 256, 512, 1024), repeats=1
        ),
        "fixed_point_gpt2": lambda: fixed_point(
            "fixed_point_gpt2",
            large,
            random_tokens(large, 128 if quick else 1024),
            target=">= 100 x",
            repeats=1,
        ),
    }
    rows = []
    for key, job in jobs.items():
        if not only or key in only:
            rows.append(job())
            show(rows[-1])
    return rows


def show(one: Row) -> None:
    mark = "met" if one.met else "MISSED"
    spread = f"{one.value:8.2f}  ({one.low:.2f} to {one.high:.2f})"
    print(f"{one.key:20} {spread:30} {one.target:10} {mark:6}  {one.note}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark.solver", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter texts: two minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY", help="some rows")
    parser.add_argument("--memory", choices=("hidden", "pass"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(run_for_memory(options.memory))
        return 0
    machine = hardware()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'':20} {'median (range)':30} target")
    with torch.inference_mode():
        rows = measure(quick=options.quick, only=options.only)
    if options.json:
        values = {row.key: row.value for row in rows}
        details = {"quick": options.quick, "rows": [asdict(row) for row in rows]}
        print(json.dumps({**values, **machine, **details}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
