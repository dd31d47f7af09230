"""The model against nanoGPT's forward written out a second time, and its promises on shape."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.attention import Attention
from stateful_gpt.model import GPT, GPTConfig

# float64 through a few layers of width 16, with logits of order 10
ROUNDING = 1e-11

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
WrittenOut = Callable[..., Tensor]


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_tanh"]),
    tied=st.booleans(),
    implementation=st.sampled_from(list(Attention)),
)
def test_forward_equals_nanogpt_written_out(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    n_layer: int,
    n_head: int,
    bias: bool,
    activation: str,
    tied: bool,
    implementation: Attention,
) -> None:
    model = make_gpt(
        seed, n_layer=n_layer, n_head=n_head, bias=bias, activation=activation, tied=tied
    )
    model.use_attention(implementation)
    tokens = make_tokens(seed + 1, 1, length)
    logits = model.lm_head(model(tokens))
    assert (logits[0] - written_out(model, tokens[0])).abs().max() <= ROUNDING


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    modulation=st.sampled_from(["bias", "factor"]),
    layers=st.sets(st.integers(0, 2)),
    hidden_keys=st.sets(st.integers(0, 8)),
    implementation=st.sampled_from(list(Attention)),
)
def test_a_number_per_key_acts_in_the_chosen_layers_only(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    modulation: str,
    layers: set[int],
    hidden_keys: set[int],
    implementation: Attention,
) -> None:
    model = make_gpt(seed, n_layer=3)
    model.use_attention(implementation)
    tokens = make_tokens(seed + 1, 1, length)
    generator = torch.Generator().manual_seed(seed + 2)
    values = 4 * torch.rand(1, length, generator=generator, dtype=torch.float64) - 2
    values = values.exp() if modulation == "factor" else values
    attend = torch.tensor([[j not in hidden_keys for j in range(length)]])
    hidden = model(tokens, **{f"key_{modulation}": values}, layers=layers, attend=attend)
    expected = written_out(
        model,
        tokens[0],
        **{f"key_{modulation}": values[0]},
        layers=layers,
        hidden_keys=hidden_keys,
    )
    assert (model.lm_head(hidden)[0] - expected).abs().max() <= ROUNDING


@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    modulation=st.sampled_from(["none", "bias", "factor"]),
    layers=st.none() | st.sets(st.integers(0, 1)),
    with_attend=st.booleans(),
    implementation=st.sampled_from(list(Attention)),
)
def test_cached_pieces_equal_the_whole_text_at_once(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    cuts: list[int],
    modulation: str,
    layers: set[int] | None,
    with_attend: bool,
    implementation: Attention,
) -> None:
    T = sum(cuts)
    model = make_gpt(seed, block_size=20)
    model.use_attention(implementation)
    tokens = make_tokens(seed + 1, 2, T)
    generator = torch.Generator().manual_seed(seed + 2)
    values = torch.rand(2, T, generator=generator, dtype=torch.float64) - 0.5
    attend = torch.rand(2, T, generator=generator) < 0.7

    def settings(end: int) -> dict[str, Tensor]:
        chosen = {} if modulation == "none" else {f"key_{modulation}": values[:, :end]}
        return chosen | ({"attend": attend[:, :end]} if with_attend else {})

    whole = model(tokens, **settings(T), layers=layers)
    cache = model.new_cache(batch=2, capacity=T)
    pieces, end = [], 0
    for size in cuts:
        piece = tokens[:, end : end + size]
        end += size
        pieces.append(model(piece, **settings(end), layers=layers, cache=cache))
    assert cache.length == T
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= ROUNDING


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_has_exactly_nanogpts_names_and_shapes(tied: bool, bias: bool) -> None:
    V, T, C, L = 11, 7, 8, 2
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=C, bias=bias)
    expected = {
        "transformer.wte.weight": (V, C),
        "transformer.wpe.weight": (T, C),
        "transformer.ln_f.weight": (C,),
        "lm_head.weight": (V, C),
    }
    for i in range(L):
        block = f"transformer.h.{i}"
        expected |= {
            f"{block}.ln_1.weight": (C,),
            f"{block}.attn.c_attn.weight": (3 * C, C),
            f"{block}.attn.c_proj.weight": (C, C),
            f"{block}.ln_2.weight": (C,),
            f"{block}.mlp.c_fc.weight": (4 * C, C),
            f"{block}.mlp.c_proj.weight": (C, 4 * C),
        }
    if bias:
        expected |= {"transformer.ln_f.bias": (C,)}
        for i in range(L):
            block = f"transformer.h.{i}"
            expected |= {
                f"{block}.ln_1.bias": (C,),
                f"{block}.attn.c_attn.bias": (3 * C,),
                f"{block}.attn.c_proj.bias": (C,),
                f"{block}.ln_2.bias": (C,),
                f"{block}.mlp.c_fc.bias": (4 * C,),
                f"{block}.mlp.c_proj.bias": (C,),
            }
    model = GPT(config, tied=tied)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == expected
    assert model.tied == tied
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert model.count_parameters() == sum(sizes.values()) - (V * C if tied else 0)


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_padding_and_batch_mates_change_nothing(
    make_gpt: Make, make_tokens: Tokens, seed: int, lengths: list[int]
) -> None:
    model = make_gpt(seed)
    tokens = make_tokens(seed + 1, len(lengths), max(lengths))  # behind each length: any ids
    generator = torch.Generator().manual_seed(seed + 2)
    bias = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    together = model(tokens, key_bias=bias)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length], key_bias=bias[row : row + 1, :length])
        assert (together[row, :length] - alone[0]).abs().max() <= ROUNDING


def test_more_tokens_than_the_block_are_refused(make_gpt: Make, make_tokens: Tokens) -> None:
    model = make_gpt(1, block_size=6)
    with pytest.raises(ValueError, match=r"7 tokens .* block of 6"):
        model(make_tokens(1, 1, 7))
    cache = model.new_cache(batch=1, capacity=8)
    model(make_tokens(1, 1, 5), cache=cache)
    with pytest.raises(ValueError, match=r"7 tokens .* block of 6"):
        model(make_tokens(1, 1, 2), cache=cache)


def test_initial_weights_are_nanogpts() -> None:
    config = GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=64)
    model = GPT(config)
    model.initialize(generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        elif ".ln_" in name:
            assert bool((parameter == 1).all()), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            # the spread of an estimated deviation over n >= 4096 draws is 1 / sqrt(2 n) <= 1.1 %
            assert parameter.std().item() == pytest.approx(expected, rel=0.06), name
    again = GPT(config)
    again.initialize(generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [
        ("n_layer", 0, "n_layer"),
        ("vocab_size", -3, "vocab_size"),
        ("block_size", 2.5, "block_size"),
        ("n_head", True, "n_head"),
        ("n_embd", 33, "multiple of n_head"),
        ("dropout", 1.0, "dropout"),
        ("dropout", float("nan"), "dropout"),
        ("activation", "relu", "gelu_tanh"),
    ],
)
def test_an_impossible_architecture_is_refused(setting: str, value: object, word: str) -> None:
    settings = {"block_size": 8, "vocab_size": 9, "n_layer": 1, "n_head": 2, "n_embd": 32}
    with pytest.raises(ValueError, match=word):
        GPTConfig(**(settings | {setting: value}))
