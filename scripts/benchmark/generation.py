"""Text at the exact fixed point of the feedback, against transformers' plain text, same weights."""

import statistics
from typing import Any

import torch

from scripts._command import Failure
from scripts.benchmark.rows import Measures, Row, in_turns, ratio
from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT, GPTConfig
from stateful_gpt.recompute import RecomputeConfig

PROMPT = 16  # tokens


def as_transformers(model: GPT) -> Any:
    """The same weights as transformers' GPT-2."""
    try:
        import transformers
    except ImportError:
        wanted = "the benchmark of generation needs transformers"
        raise Failure(f"{wanted}: pip install -e '.[hugging_face]' -c constraints.txt") from None
    config = model.config
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{key: getattr(config, key) for key in ("vocab_size", "n_embd", "n_layer", "n_head")},
            n_positions=config.block_size,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    state = {name: torch.zeros_like(value) for name, value in peer.state_dict().items()}
    for name, value in model.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = value.T if transposed else value
    peer.load_state_dict(state)
    return peer.eval()


def generation(key: str, model: GPT, *, new: int, target: str, quick: bool) -> list[Row]:
    """Tokens a second with exact feedback over transformers' without any, greedily.

    Settling the prompt is part of our time, as reading it is of theirs.
    """
    peer = as_transformers(model)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.vocab_size, (1, PROMPT), generator=generator)

    def theirs() -> list[int]:
        mask = torch.ones_like(prompt)
        ids = peer.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return list(ids[0].tolist())

    def ours(strength: float = 0.5) -> list[int]:
        return generate(
            model,
            prompt.tolist(),
            max_new_tokens=new,
            feedback=Feedback(strength=strength),
            config=RecomputeConfig(iterations=model.block_size),
            start=Start.CARRIED,
        ).tokens[0]

    same = "yes" if ours(0.0) == theirs() else "no"
    slow, fast = in_turns(theirs, ours, repeats=3 if quick else 5)
    rates = [f"{new / statistics.median(taken):.0f}" for taken in (fast, slow)]
    note = f"{' against '.join(rates)} tokens/s; at β = 0 both draw the same text: {same}"
    return [ratio(key, slow, fast, target=target, note=note)]


def generate_bundled(*, quick: bool) -> list[Row]:
    model = load_checkpoint("bundled").model
    return generation("generate_bundled", model, new=200, target=">= 1.5", quick=quick)


def generate_gpt2(*, quick: bool) -> list[Row]:
    model = GPT(GPTConfig())
    model.initialize(generator=torch.Generator().manual_seed(0))
    new = 48 if quick else 256
    return generation("generate_gpt2", model.eval(), new=new, target=">= 1.0", quick=quick)


ROWS: Measures = {("generate_bundled",): generate_bundled, ("generate_gpt2",): generate_gpt2}
