"""A sweep's passes on a GPU in one call: 9 strengths of 32 texts of 512 tokens at GPT-2's shape.

Rows: ``sweep_rows_per_second`` (a batch of texts against one text after the other), and
``outside_kernels``, the part of a pass in which the GPU waits for the host. Numbers are checked
against a reading in float64 first. Needs torch alone.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from scripts.benchmark.rows import Row, arguments, ratio, report, row, seconds
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.language_model import LanguageModel
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig

STRENGTHS = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0)
ALLOWED = 1e-2  # nats in float32: rounding of 1e-6, carried along 512 tokens of random weights


@dataclass(frozen=True)
class Size:
    """What is computed."""

    texts: int = 32
    tokens: int = 512
    alone: int = 2  # texts that are timed one after the other, too
    repeats: int = 3


def sweep(model: LanguageModel, texts: list[list[int]], strengths: tuple[float, ...]) -> None:
    for strength in strengths:
        generate(
            model,
            texts,
            max_new_tokens=0,
            feedback=Feedback(strength=strength),
            config=RecomputeConfig(iterations=len(texts[0]) - 1),
        )
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def check(model: LanguageModel, tokens: Tensor) -> float:
    """The largest distance in nats of the passes' end from a reading in float64.

    Raises:
        ValueError: it is too large.
    """
    feedback = Feedback(strength=0.1)
    exact = left_to_right(model.in_float64(), tokens, feedback)
    found = generate(
        model,
        tokens.tolist(),
        max_new_tokens=0,
        feedback=feedback,
        config=RecomputeConfig(iterations=tokens.size(1)),
    ).log_probs
    distance = (torch.stack(found).double() - exact.cpu()).abs().max().item()
    if not distance <= ALLOWED:
        raise ValueError(f"{distance:.2g} nats from the reference, allowed are {ALLOWED}")
    return distance


def rows(model: LanguageModel, size: Size, *, only: list[str]) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(1)
    shape = (size.texts, size.tokens)
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(model.device)
    distance = check(model, tokens[:2, : min(64, size.tokens)])
    texts = tokens.tolist()
    sweep(model, texts, STRENGTHS[:1])  # warm
    if not only or "batch_vs_alone" in only:
        whole = [seconds(lambda: sweep(model, texts, STRENGTHS)) for _ in range(size.repeats)]

        def one_by_one() -> None:
            for text in texts[: size.alone]:
                sweep(model, [text], STRENGTHS)

        scale = size.texts / size.alone
        alone = [seconds(one_by_one) * scale for _ in range(size.repeats)]
        note = f"{statistics.median(whole):.2f} s; {distance:.1g} nats from float64"
        yield ratio("batch_vs_alone", alone, whole, target=">= 1", note=note)
    if not only or "outside_kernels" in only:
        parts = [outside_kernels(model, texts) for _ in range(size.repeats)]
        yield row("outside_kernels", parts, target="<= 0.5", note="of a pass over all texts")


def outside_kernels(model: LanguageModel, texts: list[list[int]]) -> float:
    """The part of a run's time in which no kernel is running."""
    device = model.device.type
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiled:
        taken = seconds(lambda: sweep(model, texts, (0.5,)))
    events = profiled.key_averages()
    busy = sum(e.self_device_time_total if cuda else e.self_cpu_time_total for e in events)
    return max(0.0, 1.0 - busy / 1e6 / taken)


def main() -> int:
    options = arguments("cuda", __doc__)
    if not torch.cuda.is_available():
        print("benchmark cuda needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 1
    model = GPT(GPTConfig())
    model.initialize(generator=torch.Generator().manual_seed(0))
    size = Size(texts=8, tokens=256, repeats=2) if options.quick else Size()
    found = rows(model.eval().cuda(), size, only=options.only)
    return report(found, as_json=options.json, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
