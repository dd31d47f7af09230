"""A model of transformers in float64 against the same arithmetic written out here."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback
from stateful_gpt.hugging_face import HuggingFaceModel
from stateful_gpt.language_model import Cache, Modulation
from stateful_gpt.oracle import disturbed_reading, left_to_right
from tests.tiny_transformers import VOCAB, tiny


class WrittenOut:
    """A llama in plain float64 arithmetic, from its weights alone, that reads all again each time.

    Its rotary frequencies are made in float32, as every llama's are.
    """

    block_size, vocab_size, n_layer, width = 64, VOCAB, 3, 16
    device, dtype, takes_hidden_states = torch.device("cpu"), torch.float64, False

    def __init__(self, weights: dict[str, Tensor], base: float, eps: float) -> None:
        self.weights, self.eps = weights, eps
        self.frequencies = (1.0 / base ** (torch.arange(0, 4, 2).float() / 4)).double()

    def new_cache(self, *, batch: int, capacity: int) -> "ReadTokens":
        return ReadTokens(torch.zeros(batch, 0, dtype=torch.long))

    def in_float64(self) -> "WrittenOut":
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weights["lm_head.weight"].T

    def read(self, tokens: Tensor, *, modulation: Modulation, cache: Cache | None = None) -> Tensor:
        new = tokens.size(1)
        if cache is not None:
            assert isinstance(cache, ReadTokens)
            cache.tokens = tokens = torch.cat([cache.tokens, tokens], dim=1)
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.n_layer):
            x = x + self.attend(layer, self.norm(x, f"{layer}.input_layernorm"), modulation.bias)
            y = self.norm(x, f"{layer}.post_attention_layernorm")
            gate, up, down = (
                self.weights[f"model.layers.{layer}.mlp.{part}_proj.weight"].T
                for part in ("gate", "up", "down")
            )
            x = x + ((y @ gate) * (y @ gate).sigmoid() * (y @ up)) @ down
        return self.norm(x, "norm")[:, -new:]

    def norm(self, x: Tensor, name: str) -> Tensor:
        name = "model.norm" if name == "norm" else f"model.layers.{name}"
        size = (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return x / size * self.weights[f"{name}.weight"]

    def attend(self, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v, out = (
            self.weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"].T for part in "qkvo"
        )
        angles = torch.arange(length)[:, None] * self.frequencies  # (T, 2)
        turn = torch.polar(torch.ones_like(angles), angles)

        def heads(matrix: Tensor, *, turned: bool) -> Tensor:
            y = (x @ matrix).view(batch, length, -1, 4).transpose(1, 2)  # (B, H, T, 4)
            if turned:
                z = torch.complex(y[..., :2].contiguous(), y[..., 2:].contiguous()) * turn
                y = torch.cat([z.real, z.imag], dim=-1)
            return y.repeat_interleave(4 // y.size(1), dim=1)

        scores = heads(q, turned=True) @ heads(k, turned=True).transpose(2, 3) / 2.0
        if bias is not None:
            scores = scores + bias[:, None, None, :]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return (weights @ heads(v, turned=False)).transpose(1, 2).flatten(2) @ out


@dataclass
class ReadTokens:
    """The cache of a model that reads all again."""

    tokens: Tensor

    @property
    def length(self) -> int:
        return self.tokens.size(1)

    @length.setter
    def length(self, value: int) -> None:
        self.tokens = self.tokens[:, :value]

    def keep(self, rows: list[int]) -> None:
        self.tokens = self.tokens[rows]


@pytest.mark.parametrize("strength", [-1.0, 0.1])
def test_the_lyapunov_exponent_of_a_llama_is_that_of_plain_float64_arithmetic(
    strength: float,
) -> None:
    model = HuggingFaceModel(tiny("llama", dtype=torch.float32)).in_float64()
    weights = {key: value.double() for key, value in tiny("llama").state_dict().items()}
    written_out = WrittenOut(weights, base=10000.0, eps=1e-6)
    tokens, feedback = torch.arange(2, 42)[None] * 7 % VOCAB, Feedback(strength=strength)
    (ours,), (expected,) = (
        disturbed_reading(each, tokens, feedback, lengths=[40])[1] for each in (model, written_out)
    )
    assert ours is not None
    assert expected is not None
    # responses of 1e-7 nats are differences of numbers that carry rounding of 1e-15 each
    assert ours == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(
        left_to_right(model, tokens, feedback),
        left_to_right(written_out, tokens, feedback),
        rtol=0,
        atol=1e-9,  # a disturbance of one rounding grows along the text where strength is -1
    )
