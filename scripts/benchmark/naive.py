"""The loop that a researcher writes on a Sunday: the peer of the sweep's benchmark.

nanoGPT's attention written out with the bias, one text after the other, T - 1 passes over every
token, the full log-softmax, and two KL divergences a pass. No oracle, no exponent, no files.

    python -m scripts.benchmark.naive -1,0,1 4 96       # strengths, texts, tokens
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.model import GPT
from stateful_gpt.tokenizer import Tokenizer

TEXTS = Path(__file__).parents[2] / "experiments" / "converge" / "prompts.jsonl"


def read_texts(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """The first ``length`` ids of each of the first ``count`` texts of the study."""
    lines = TEXTS.read_text(encoding="utf-8").splitlines()[:count]
    return [tokenizer.encode_ordinary(json.loads(line)["text"])[:length] for line in lines]


def log_softmax_of_pass(model: GPT, tokens: Tensor, bias: Tensor) -> Tensor:
    """(T, V) log-probabilities of the next token, with (T,) added to the scores of each key."""
    parts, T = model.transformer, len(tokens)
    x = parts.wte(tokens) + parts.wpe.weight[:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for block in parts.h:
        q, k, v = (
            part.view(T, block.attn.n_head, -1).transpose(0, 1)
            for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=1)
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(q.size(2)) + bias  # (H, T, T)
        y = scores.masked_fill(future, -math.inf).softmax(dim=2) @ v
        x = x + block.attn.c_proj(y.transpose(0, 1).reshape(T, -1))
        x = x + block.mlp(block.ln_2(x))
    logits: Tensor = model.lm_head(parts.ln_f(x))
    return logits.log_softmax(dim=1)


def study(model: GPT, texts: list[list[int]], strength: float) -> list[float]:
    """The mean log-probability of each text's tokens after its last pass (nats)."""
    ends = []
    for text in texts:
        tokens = torch.tensor(text)
        estimates = torch.zeros(len(text))
        plain = before = None
        for _ in range(len(text) - 1):
            log_probs = log_softmax_of_pass(model, tokens, strength * estimates)
            if plain is None:
                plain = before = log_probs
            for other in (plain, before):
                (other.exp() * (other - log_probs)).sum(dim=1).mean().item()
            estimates[1:] = log_probs[:-1].gather(1, tokens[1:, None]).squeeze(1)
            before = log_probs
        ends.append(estimates[1:].mean().item())
    return ends


@torch.no_grad()
def main() -> None:
    strengths, count, length = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    checkpoint = load_checkpoint("bundled")
    texts = read_texts(checkpoint.tokenizer, count, length)
    for strength in map(float, strengths):
        ends = study(checkpoint.model, texts, strength)
        print(json.dumps({"strength": strength, "nll": -sum(ends) / len(ends)}), flush=True)


if __name__ == "__main__":
    main()
