"""What feedback costs on a GPU, in one call that needs no network: GPT-2's shape, random weights.

    python -m scripts.benchmark.cuda --json

Needs torch with CUDA and this repository on the path (``pip install -e .``, or its root as working
directory): of its other dependencies only numpy, which torch brings. What is timed is first checked
against the reference. The step of generation is timed as a CUDA graph, and once more with
``torch.compile``, where the machine has what that takes; ``transformers`` is the peer for
generation where it is installed.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.benchmark.contestants import (
    Row,
    as_transformers,
    gpt2_shape,
    naive_pass,
    random_tokens,
    row,
)
from stateful_gpt.attention import (
    Attention,
    causal_mask,
    key_columns,
    score_mask,
    sdpa_attention,
)
from stateful_gpt.decoding import Decoder
from stateful_gpt.feedback import CHUNK, Feedback, score_targets
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.solving import token_pass
from stateful_gpt.windowed import Windowed

STRENGTH = 0.5


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the smaller ones are for a test on a CPU."""

    batch: int = 16
    length: int = 1024
    new: int = 512
    copy_mb: int = 1024
    square: int = 8192
    repeats: int = 7


TINY = Sizes(batch=2, length=24, new=8, copy_mb=1, square=64, repeats=1)


class Clock:
    """Seconds of work on a device: warmed up, waited for, the median of several."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, work: Callable[[], object], *, inner: int = 1) -> list[float]:
        work()
        found = []
        for _ in range(self.repeats):
            self.wait()
            begin = time.perf_counter()
            for _ in range(inner):
                work()
            self.wait()
            found.append((time.perf_counter() - begin) / inner)
        return found

    def median(self, work: Callable[[], object], *, inner: int = 1) -> float:
        return statistics.median(self.times(work, inner=inner))


# --- the same numbers as the reference ----------------------------------------------------------


def check(model: GPT, device: torch.device, length: int) -> list[str]:
    """Compare what is timed with the reference; says how far apart they are.

    Raises:
        ValueError: further apart than rounding explains.
    """
    tokens = random_tokens(model, length).to(device)
    exact = copy.deepcopy(model).to(device, torch.float64)
    feedback = Feedback(strength=STRENGTH)
    oracle = left_to_right(exact, tokens, feedback)
    exact.use_attention(Attention.REFERENCE)
    reference = token_pass(exact, tokens, feedback)(oracle)
    lines = []

    def compare(name: str, values: Tensor, truth: Tensor, within: float) -> None:
        error = (values.double() - truth).abs().max().item()
        lines.append(f"{name}: {error:.1e} nats from float64 (at most {within:g})")
        if not error <= within:
            raise ValueError(f"{name} is {error:g} nats from the reference, allowed are {within:g}")

    # log-probabilities near -10: float32 rounds them at 1e-6, a bfloat16 model's logits at 0.03
    for dtype, within in ((torch.float32, 1e-2), (torch.bfloat16, 1.0)):
        rounded = copy.deepcopy(model).to(device, dtype)
        name = str(dtype).removeprefix("torch.")
        said = token_pass(rounded, tokens, feedback)(oracle.float()).log_probs
        compare(f"a pass in {name}", said, reference.log_probs, within)
        decoder = Decoder(rounded, feedback)
        decoder.run(tokens[0].tolist(), max_new_tokens=0)
        compare(f"the decoder in {name}", decoder.log_probs[:length], oracle[0], within)
        made = generate(
            rounded,
            [tokens[0, : length // 2].tolist()],
            max_new_tokens=length - length // 2,
            feedback=feedback,
            config=RecomputeConfig(iterations=length),
            solver=Windowed(),
            start=Start.CARRIED,
        )
        text = torch.tensor(made.tokens, device=device)
        truth = left_to_right(exact, text, feedback)[0].cpu()
        compare(f"generate in {name}", made.log_probs[0], truth, within)
    return lines


# --- the rows -----------------------------------------------------------------------------------


def attention(model: GPT, device: torch.device, sizes: Sizes, clock: Clock) -> list[Row]:
    """Causal attention with a bias per key: a float mask, extra key columns, FlexAttention."""
    H = model.config.n_head
    D = model.config.n_embd // H
    shape, dtype = (sizes.batch, H, sizes.length, D), torch.bfloat16
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    bias = -5 * torch.rand(sizes.batch, sizes.length, device=device)
    visible = causal_mask(sizes.length, sizes.length, device=device)
    mask = score_mask(visible, bias, dtype=dtype)
    columns = key_columns(bias, head_size=D, dtype=dtype)
    exact = sdpa_attention(
        q.float(),
        k.float(),
        v.float(),
        mask=score_mask(visible, bias, dtype=torch.float32),
        key_factor=None,
    )
    contestants: dict[str, Callable[[], Tensor]] = {
        "mask": lambda: sdpa_attention(q, k, v, mask=mask, key_factor=None),
        "columns": lambda: sdpa_attention(q, k, v, mask=columns, key_factor=None),
        "plain": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if device.type == "cuda":
        contestants["flex"] = flex(q, k, v, bias)
    said, times = [], {}
    for name, work in contestants.items():
        try:
            error = (work().float() - exact).abs().max().item()
            times[name] = clock.median(work)
        except Exception as failure:  # a machine without a compiler, say: the others still count
            said.append(f"{name}: {type(failure).__name__}")
            continue
        apart = "" if name == "plain" else f", {error:.0e} from float32"
        said.append(f"{name} {1e3 * times[name]:.3f} ms{apart}")
    value = times["mask"] / times["columns"]
    return [row("mask_over_columns", [value], target=">= 1 x", note="; ".join(said))]


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.size(2)
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def work() -> Tensor:
        out: Tensor = compiled(
            q, k, v, score_mod=lambda score, b, h, i, j: score + bias[b, j], block_mask=causal
        )
        return out

    return work


def jacobi_pass(model: GPT, device: torch.device, sizes: Sizes, clock: Clock) -> list[Row]:
    """Floating-point rate of a full pass with feedback over the device's own matrix rate."""
    config = model.config
    C, B, T = config.n_embd, sizes.batch, sizes.length
    tokens = torch.randint(config.vocab_size, (B, T), device=device)
    state = torch.full((B, T), -5.0, device=device)
    run = token_pass(model, tokens, Feedback(strength=STRENGTH))
    a, b = (
        torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    rate = 2 * sizes.square**3 / clock.median(lambda: a @ b, inner=5)
    # attention counted as causal: half of its T x T products
    work = (
        2 * B * T * (12 * config.n_layer * C * C + C * config.vocab_size + config.n_layer * T * C)
    )
    times = clock.times(lambda: run(state))
    note = (
        f"batch {B} x T = {T}: {1e3 * statistics.median(times):.1f} ms a pass,"
        f" matrices at {rate / 1e12:.0f} TFLOP/s"
    )
    return [
        row("pass_gemm_fraction", [work / t / rate for t in times], target=">= 0.4 of", note=note)
    ]


def log_prob_chunks(model: GPT, device: torch.device, sizes: Sizes, clock: Clock) -> list[Row]:
    """Scoring in our chunks of positions, which never holds T x V, over scoring in large ones."""
    N = sizes.batch * sizes.length
    hidden = torch.randn(N, model.config.n_embd, device=device, dtype=torch.bfloat16)
    targets = torch.randint(model.config.vocab_size, (N,), device=device)
    said, times = [], {}
    for chunk in (CHUNK, 1024, 4096):
        times[chunk] = clock.median(
            lambda chunk=chunk: score_targets(model, hidden, targets, chunk=chunk)
        )
        said.append(f"{chunk}: {1e3 * times[chunk]:.2f} ms")
    value = times[CHUNK] / min(times.values())
    return [row("log_prob_chunk", [value], target="<= 1.2 x", note="chunks of " + ", ".join(said))]


def generation(model: GPT, device: torch.device, sizes: Sizes, clock: Clock) -> list[Row]:
    """Tokens a second with exact feedback against the rate at which weights can be read."""
    prompt = random_tokens(model, 16)[0].tolist()
    block = torch.empty(sizes.copy_mb * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    bandwidth = 2 * block.numel() / clock.median(lambda: other.copy_(block), inner=3)
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    limit = bandwidth / sum(weights.values())  # tokens a second
    rates = generate_rates(model, prompt, sizes, clock)
    said = [
        f"copies at {bandwidth / 1e12:.2f} TB/s allow {limit:.0f} tokens/s",
        f"generate() {statistics.median(rates):.0f}",
        *decoder_rates(model, prompt, sizes, clock),
    ]
    rows = [
        row(
            "generate_bandwidth",
            [r / limit for r in rates],
            target=">= 0.5 of",
            note="; ".join(said),
        )
    ]
    peer = plain_generation(model, device, sizes, clock)
    if peer is not None:
        note = f"transformers {peer:.0f} tokens/s without feedback"
        rows.append(row("generate_gpt2", [r / peer for r in rates], target=">= 10 x", note=note))
    return rows


def generate_rates(model: GPT, prompt: list[int], sizes: Sizes, clock: Clock) -> list[float]:
    """New tokens a second of ``generate``, its prompt settled first, as users call it."""

    def work() -> None:
        generate(
            model,
            [prompt],
            max_new_tokens=sizes.new,
            feedback=Feedback(strength=STRENGTH),
            config=RecomputeConfig(iterations=model.config.block_size),
            solver=Windowed(),
            start=Start.CARRIED,
        )

    return [sizes.new / t for t in clock.times(work)]


def decoder_rates(model: GPT, prompt: list[int], sizes: Sizes, clock: Clock) -> list[str]:
    """Tokens a second of the recorded step alone, as it is and compiled."""
    steps, said = len(prompt) + sizes.new - 1, []
    for name, compiled in (("graph", False), ("compiled graph", True)):
        if compiled and clock.device.type != "cuda":
            continue
        try:
            decoder = Decoder(model, Feedback(strength=STRENGTH), compiled=compiled)
            time_taken = clock.median(lambda d=decoder: d.run(prompt, max_new_tokens=sizes.new))
        except Exception as failure:  # torch.compile needs a compiler: the eager graph does not
            said.append(f"{name}: {type(failure).__name__}: {' '.join(str(failure).split())[:80]}")
            continue
        recorded = "" if decoder.recorded or clock.device.type != "cuda" else ", not recorded"
        said.append(f"{name} {steps / time_taken:.0f}{recorded}")
    return said


def plain_generation(model: GPT, device: torch.device, sizes: Sizes, clock: Clock) -> float | None:
    """Tokens a second of transformers on the same weights; None where it is not installed."""
    try:
        peer = as_transformers(model).to(device, torch.bfloat16)
    except ImportError:
        print("transformers is not installed here: no peer for generation", file=sys.stderr)
        return None
    prompt = random_tokens(model, 16).to(device)
    times = clock.times(
        lambda: peer.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sizes.new,
            do_sample=False,
        )
    )
    return sizes.new / statistics.median(times)


def fixed_point(model: GPT, device: torch.device, sizes: Sizes, clock: Clock) -> list[Row]:
    """T - 1 naive passes against one reading of the text by the decoder."""
    tokens = random_tokens(model, sizes.length).to(device)
    feedback = Feedback(strength=STRENGTH)
    state = torch.full(tokens.shape, -5.0, device=device)
    naive = clock.median(lambda: naive_pass(model, tokens, feedback, state))
    decoder, given = Decoder(model, feedback), tokens[0].tolist()
    times = clock.times(lambda: decoder.run(given, max_new_tokens=0))
    values = [(sizes.length - 1) * naive / t for t in times]
    note = f"T = {sizes.length}, one naive pass of {1e3 * naive:.1f} ms timed and taken T - 1 times"
    return [row("fixed_point_gpt2", values, target=">= 100 x", note=note)]


ROWS = (attention, jacobi_pass, log_prob_chunks, generation, fixed_point)


@torch.inference_mode()
def measure(model: GPT, device: torch.device, sizes: Sizes) -> tuple[list[str], list[Row]]:
    """Check, then time, a float32 model's bfloat16 copy on ``device``."""
    checks = check(model, device, min(128, sizes.length))
    for line in checks:
        print(line, flush=True)
    clock = Clock(device, sizes.repeats)
    small = copy.deepcopy(model).to(device, torch.bfloat16)
    rows = []
    for job in ROWS:
        for one in job(small, device, sizes, clock):
            rows.append(one)
            spread = f"{one.value:8.2f}  ({one.low:.2f} to {one.high:.2f})"
            met = "met" if one.met else "MISSED"
            print(f"{one.key:20} {spread:30} {one.target:10} {met:6}  {one.note}", flush=True)
    return checks, rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark.cuda", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark_cuda needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    try:
        checks, rows = measure(gpt2_shape(), device, Sizes())
    except ValueError as wrong:
        print(f"benchmark_cuda: {wrong}", file=sys.stderr)
        return 1
    if options.json:
        values = {one.key: one.value for one in rows}
        details = {"checks": checks, "rows": [asdict(one) for one in rows]}
        print(json.dumps({**values, **machine, **details}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
