"""Small random models, and nanoGPT written out a second time, for all tests to compare with.

Shapes: B batch, T tokens, H heads, D head size, C n_embd, V vocabulary.
"""

import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network

from experiments.tracking.tracker import stop_helper
from stateful_gpt.checkpoint import save_checkpoint
from stateful_gpt.model import GPT, GPTConfig
from tests.forked import Forker

torch.set_num_threads(1)  # the tensors are tiny: threads only cost

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

MakeGPT = Callable[..., GPT]
MakeTokens = Callable[..., Tensor]
WrittenOut = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _own_tracker() -> Iterator[None]:
    """W&B's helper ends with the test that it was started for, and with it where it could be found:
    another test has other settings, and one that a monkeypatch brings back is gone already.
    """
    yield
    if "wandb" in sys.modules:
        stop_helper()
        os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Starts commands in processes of their own, in no time."""
    with Forker() as found:
        yield found


@pytest.fixture(scope="session")
def make_gpt() -> MakeGPT:
    """Random models whose attention is far from uniform, so that modulating it matters.

    Attention scores have a standard deviation of about 2, logits of about 2, and no weight sits at
    the value it is initialised with: norms and biases are drawn too.
    """

    def make(
        seed: int,
        *,
        block_size: int = 16,
        vocab_size: int = 23,
        n_layer: int = 2,
        n_head: int = 2,
        n_embd: int = 16,
        bias: bool = True,
        activation: str = "gelu",
        tied: bool = True,
        hidden_feedback: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> GPT:
        config = GPTConfig(
            block_size=block_size,
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            bias=bias,
            activation=activation,
            hidden_feedback=hidden_feedback,
        )
        model = GPT(config, tied=tied)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if name.endswith("bias"):
                    parameter.copy_(0.1 * noise)
                elif ".ln_" in name:
                    parameter.copy_(1.0 + 0.1 * noise)
                elif name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
                    parameter.copy_(2.0 / math.sqrt(n_embd) * noise)
                else:
                    parameter.copy_(math.sqrt(2.0 / n_embd) * noise)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_tokens() -> MakeTokens:
    """Random texts, (B, T) ids."""

    def make(seed: int, batch: int, length: int, *, vocab_size: int = 23) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, (batch, length), generator=generator)

    return make


@pytest.fixture(scope="session")
def written_out(written_out_hidden: WrittenOut) -> WrittenOut:
    """The same as ``written_out_hidden``, and the head: (T,) ids in, (T, V) logits out."""

    def run(model: GPT, tokens: Tensor, **modulation: Any) -> Tensor:
        return written_out_hidden(model, tokens, **modulation) @ model.lm_head.weight.detach().T

    return run


@pytest.fixture(scope="session")
def written_out_hidden() -> WrittenOut:
    """nanoGPT's forward with modulated attention, from a state dict, one head and layer at a time.

    Written from the definition, without anything of the library's: (T,) ids in, (T, C) hidden
    states out.
    """

    def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        y = (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"]
        return y + state.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
        y = torch.einsum("ti,oi->to", x, state[f"{name}.weight"])
        return y + state.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def gelu(x: Tensor, form: str) -> Tensor:
        if form == "gelu_tanh":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def run(
        model: GPT,
        tokens: Tensor,
        *,
        key_bias: Tensor | None = None,
        key_factor: Tensor | None = None,
        power: Tensor | None = None,
        layers: Collection[int] | None = None,
        before: list[Tensor | None] | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """``power`` (T,): each softmaxed row times these, then renormalised.

        ``before``: the hidden state (C,) that enriches each token's embedding, or None.
        """
        config = model.config
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        T, H, D = len(tokens), config.n_head, config.n_embd // config.n_head
        x = state["transformer.wte.weight"][tokens]  # (T, C)
        for t, h_t in enumerate(before or []):
            if h_t is not None:
                key = state["gate.key.weight"] @ h_t + state["gate.key.bias"]
                value = state["gate.value.weight"] @ h_t + state["gate.value.bias"]
                x[t] = x[t] + strength * value / (1 + (-x[t] * key).exp())
        x = x + state["transformer.wpe.weight"][:T]
        unseen = torch.ones(T, T, dtype=torch.bool).triu(1)
        for i in range(config.n_layer):
            at = f"transformer.h.{i}"
            modulated = layers is None or i in layers
            q, k, v = linear(norm(x, state, f"{at}.ln_1"), state, f"{at}.attn.c_attn").chunk(3, -1)
            heads = []
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                scores = torch.einsum("id,jd->ij", q[:, part], k[:, part]) / math.sqrt(D)  # (T, T)
                if modulated and key_bias is not None:
                    scores = scores + key_bias
                scores = scores.masked_fill(unseen, -math.inf)
                weights = (scores - scores.amax(dim=1, keepdim=True)).exp()
                weights = weights / weights.sum(dim=1, keepdim=True)
                if modulated and power is not None:
                    weights = weights * power
                    weights = weights / weights.sum(dim=1, keepdim=True)
                if modulated and key_factor is not None:
                    weights = weights * key_factor
                heads.append(weights @ v[:, part])
            x = x + linear(torch.cat(heads, dim=-1), state, f"{at}.attn.c_proj")
            inner = gelu(
                linear(norm(x, state, f"{at}.ln_2"), state, f"{at}.mlp.c_fc"), config.activation
            )
            x = x + linear(inner, state, f"{at}.mlp.c_proj")
        return norm(x, state, "transformer.ln_f")

    return run


@pytest.fixture(scope="session")
def checkpoint_folder(make_gpt: MakeGPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes in this project's format, for the command line."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = make_gpt(
        7, block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16, dtype=torch.float32
    )
    save_checkpoint(model, folder, tokenizer="byte")
    return folder
