"""What the benchmarks measure with: a model of GPT-2's shape, the naive pass, turns and ratios.

Needs torch and ``stateful_gpt`` alone.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stateful_gpt.attention import Attention
from stateful_gpt.feedback import Feedback
from stateful_gpt.model import GPT, GPTConfig


@dataclass(frozen=True)
class Row:
    """One measured number: ``value``, its range over the repeats, and what was asked for."""

    key: str
    value: float
    low: float
    high: float
    target: str
    met: bool
    note: str


def gpt2_shape(*, block_size: int = 1024) -> GPT:
    """GPT-2's architecture with random weights whose attention scores have a spread of about 2."""
    model = GPT(GPTConfig(block_size=block_size))
    model.initialize(generator=torch.Generator().manual_seed(0))
    C = model.config.n_embd
    with torch.no_grad():
        for block in model.transformer.blocks:
            # layer-normed inputs: entries of sqrt(2 / C) give scores a standard deviation of 2
            block.attn.c_attn.weight[: 2 * C].mul_(math.sqrt(2.0 / C) / 0.02)
    return model.eval()


def random_tokens(model: GPT, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def naive_pass(model: GPT, tokens: Tensor, feedback: Feedback, state: Tensor | None) -> Tensor:
    """(1, T) log-probabilities, the way one would write it down first."""
    modulation = feedback.modulation(state)
    model.use_attention(Attention.REFERENCE)
    hidden = model(tokens, key_bias=modulation.bias, key_factor=modulation.factor)
    model.use_attention(Attention.SDPA)
    log_probs = model.lm_head(hidden).log_softmax(dim=2)  # (1, T, V)
    said = log_probs[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    return torch.cat([said.new_zeros(1, 1), said], dim=1)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turns(*contestants: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each contestant, run one after the other ``repeats`` times after one warm-up."""
    for work in contestants:
        work()
    rounds = [[seconds(work) for work in contestants] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def ratio(key: str, above: list[float], below: list[float], *, target: str, note: str) -> Row:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return row(key, ratios, target=target, note=note)


def row(key: str, values: list[float], *, target: str, note: str) -> Row:
    value = statistics.median(values)
    limit = float(target.split()[1])
    met = value <= limit if target.startswith("<=") else value >= limit
    return Row(key, value, min(values), max(values), target, met, note)
