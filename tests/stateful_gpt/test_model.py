"""The model against nanoGPT's forward written out a second time, and its promises on shape."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.language_model import PLAIN, Modulation
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
) -> None:
    model = make_gpt(
        seed, n_layer=n_layer, n_head=n_head, bias=bias, activation=activation, tied=tied
    )
    tokens = make_tokens(seed + 1, 1, length)
    logits = model.logits(model.read(tokens))
    assert (logits[0] - written_out(model, tokens[0])).abs().max() <= ROUNDING


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    modulation=st.sampled_from(["bias", "factor"]),
    layers=st.sets(st.integers(0, 2)),
)
def test_a_number_per_key_acts_in_the_chosen_layers_only(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    modulation: str,
    layers: set[int],
) -> None:
    model = make_gpt(seed, n_layer=3)
    tokens = make_tokens(seed + 1, 1, length)
    generator = torch.Generator().manual_seed(seed + 2)
    values = 4 * torch.rand(1, length, generator=generator, dtype=torch.float64) - 2
    values = values.exp() if modulation == "factor" else values
    hidden = model.read(tokens, modulation=Modulation(**{modulation: values}, layers=layers))
    expected = written_out(model, tokens[0], **{f"key_{modulation}": values[0]}, layers=layers)
    assert (model.logits(hidden)[0] - expected).abs().max() <= ROUNDING


@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    modulation=st.sampled_from(["none", "bias", "factor"]),
    layers=st.none() | st.sets(st.integers(0, 1)),
)
@torch.no_grad()
def test_cached_pieces_equal_the_whole_text_at_once(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    cuts: list[int],
    modulation: str,
    layers: set[int] | None,
) -> None:
    T = sum(cuts)
    model = make_gpt(seed, block_size=20)
    tokens = make_tokens(seed + 1, 2, T)
    generator = torch.Generator().manual_seed(seed + 2)
    values = torch.rand(2, T, generator=generator, dtype=torch.float64) - 0.5

    def modulated(end: int) -> Modulation:
        if modulation == "none":
            return PLAIN
        return Modulation(**{modulation: values[:, :end]}, layers=layers)

    whole = model.read(tokens, modulation=modulated(T))
    cache = model.new_cache(batch=2, capacity=T)
    pieces, end = [], 0
    for size in cuts:
        piece = tokens[:, end : end + size]
        end += size
        pieces.append(model.read(piece, modulation=modulated(end), cache=cache))
    assert cache.length == T
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= ROUNDING


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
)
@torch.no_grad()
def test_a_cache_goes_on_with_chosen_rows_and_may_be_set_back(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    rows: list[int],
) -> None:
    first, middle, _ = lengths
    model, tokens = make_gpt(seed), make_tokens(seed + 1, 3, sum(lengths))
    other = make_tokens(seed + 2, 3, middle)  # read first, and forgotten
    cache = model.new_cache(batch=3, capacity=sum(lengths))
    model.read(tokens[:, :first], cache=cache)
    model.read(other, cache=cache)
    cache.length = first
    model.read(tokens[:, first : first + middle], cache=cache)
    cache.keep(rows)
    ours = model.read(tokens[rows, first + middle :], cache=cache)
    assert (ours - model.read(tokens[rows])[:, first + middle :]).abs().max() <= ROUNDING


def test_what_a_model_says_of_itself(make_gpt: Make) -> None:
    model = make_gpt(1, block_size=12, n_layer=3, hidden_feedback=True, dtype=torch.float32)
    assert (model.block_size, model.vocab_size, model.n_layer, model.width) == (12, 23, 3, 16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.takes_hidden_states
    assert not make_gpt(1).takes_hidden_states
    double = model.in_float64()
    assert (double.dtype, model.dtype) == (torch.float64, torch.float32)
    assert double.in_float64() is double
    for ours, theirs in zip(double.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.double())


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
    together = model.read(tokens, modulation=Modulation(bias=bias))
    for row, length in enumerate(lengths):
        own = Modulation(bias=bias[row : row + 1, :length])
        alone = model.read(tokens[row : row + 1, :length], modulation=own)
        assert (together[row, :length] - alone[0]).abs().max() <= ROUNDING


@torch.no_grad()
def test_more_tokens_than_the_block_are_refused(make_gpt: Make, make_tokens: Tokens) -> None:
    model = make_gpt(1, block_size=6)
    with pytest.raises(ValueError, match=r"7 tokens .* block of 6"):
        model.read(make_tokens(1, 1, 7))
    cache = model.new_cache(batch=1, capacity=8)
    model.read(make_tokens(1, 1, 5), cache=cache)
    with pytest.raises(ValueError, match=r"7 tokens .* block of 6"):
        model.read(make_tokens(1, 1, 2), cache=cache)


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
