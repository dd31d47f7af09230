"""A sweep's passes on a GPU in one call: 9 strengths of 32 texts of 512 tokens at GPT-2's shape.

Rows: ``batch_vs_alone`` (a batch of texts against one text after the other), and
``outside_kernels``, the part of a pass in which the GPU waits for the host. Numbers are checked
against a reading in float64 first. Needs torch alone.
"""

from functools import cache

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from scripts.benchmark.rows import Measures, Row, ratio, row, seconds
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig

STRENGTHS = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0)
ALONE = 2  # texts that are timed one after the other, too
ALLOWED = 1e-2  # nats in float32: rounding of 1e-6, carried along 512 tokens of random weights


def sweep(model: LanguageModel, texts: list[list[int]], *strengths: float) -> list[Tensor]:
    """The log-probabilities of each text, (T,) nats, where the passes of the last strength end."""
    for strength in strengths:
        found = generate(
            model,
            texts,
            max_new_tokens=0,
            feedback=Feedback(strength=strength),
            config=RecomputeConfig(iterations=len(texts[0]) - 1),
        ).log_probs
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return found


def check(model: LanguageModel, tokens: Tensor) -> float:
    """The largest distance in nats of the passes' end from float64; ValueError if too large."""
    exact = left_to_right(model.in_float64(), tokens, Feedback(strength=0.1))
    found = torch.stack(sweep(model, tokens.tolist(), 0.1)).double()
    distance = (found - exact.cpu()).abs().max().item()
    if not distance <= ALLOWED:
        raise ValueError(f"{distance:.2g} nats from the reference, allowed are {ALLOWED}")
    return distance


@cache
def checked(*, quick: bool) -> tuple[LanguageModel, list[list[int]], float]:
    """A model on the GPU, warm, its texts, and its distance from float64 in nats."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmark cuda needs a CUDA device, and PyTorch finds none here")
    model = GPT(GPTConfig())
    model.initialize(generator=torch.Generator().manual_seed(0))
    model.eval().cuda()
    shape = (8, 256) if quick else (32, 512)
    tokens = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    distance = check(model, tokens[:2, :64].cuda())
    texts = tokens.tolist()
    sweep(model, texts, STRENGTHS[0])
    return model, texts, distance


def batch_vs_alone(*, quick: bool) -> list[Row]:
    model, texts, distance = checked(quick=quick)
    repeats = range(2 if quick else 3)
    whole = [seconds(lambda: sweep(model, texts, *STRENGTHS)) for _ in repeats]
    by_text = [lambda text=text: sweep(model, [text], *STRENGTHS) for text in texts[:ALONE]]
    alone = [sum(map(seconds, by_text)) * len(texts) / ALONE for _ in repeats]
    note = f"{min(whole):.2f} s at best; {distance:.1g} nats from float64"
    return [ratio("batch_vs_alone", alone, whole, target=">= 1", note=note)]


def outside_kernels(*, quick: bool) -> list[Row]:
    model, texts, _ = checked(quick=quick)
    parts = [idle_part(model, texts) for _ in range(2 if quick else 3)]
    return [row("outside_kernels", parts, target="<= 0.5", note="of a pass over all texts")]


def idle_part(model: LanguageModel, texts: list[list[int]]) -> float:
    """The part of a run's time in which no kernel is running."""
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiled:
        taken = seconds(lambda: sweep(model, texts, 0.5))
    events = profiled.key_averages()
    busy = sum(e.self_device_time_total if cuda else e.self_cpu_time_total for e in events)
    return max(0.0, 1.0 - busy / 1e6 / taken)


ROWS: Measures = {("batch_vs_alone",): batch_vs_alone, ("outside_kernels",): outside_kernels}
