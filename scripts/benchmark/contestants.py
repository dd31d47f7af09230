"""What the benchmarks measure with: contestants, turns and ratios, and the machine's name.

Needs torch and ``stateful_gpt`` alone, and ``transformers`` only where it is asked for.
"""

import math
import os
import platform
import statistics
import subprocess
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


def as_transformers(model: GPT) -> torch.nn.Module:
    """The same weights as transformers' GPT-2."""
    import transformers

    config = model.config
    names = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function=names[config.activation],
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    state = peer.state_dict()
    for name, value in model.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = value.T if transposed else value
    for name in state:
        if name not in model.state_dict() and name.endswith("bias"):
            state[name] = torch.zeros_like(state[name])
    peer.load_state_dict(state)
    return peer.eval()


def hardware() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "commit": commit or None,
    }
