"""The lean path over cached keys and values, against the model's own forward.

In float64 both do the same sums in another order: 1e-12 of values of the order of 1, times the
growth of rounding through three layers.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stateful_gpt.stepping as stepping
from stateful_gpt.attention import Attention
from stateful_gpt.feedback import score_targets
from stateful_gpt.model import GPT, Cache, GPTConfig
from stateful_gpt.products import PackedProducts, can_pack
from stateful_gpt.stepping import Stepper, covers, row_blocks, split_rows

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
EXACT = 1e-11


def both(
    model: GPT,
    tokens: Tensor,
    begin: int,
    *,
    modulation: str = "bias",
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Cache, Cache]:
    """Hidden states from ``begin`` on by the model and by the stepper, and their caches."""
    numbers = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens.shape, generator=numbers, dtype=model.lm_head.weight.dtype)
    key_bias = values if modulation == "bias" else None
    key_factor = values.exp() if modulation == "factor" else None
    caches = [model.new_cache(batch=tokens.size(0), capacity=16) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            if begin:
                model(
                    tokens[:, :begin],
                    key_bias=None if key_bias is None else key_bias[:, :begin],
                    key_factor=None if key_factor is None else key_factor[:, :begin],
                    layers=layers,
                    cache=cache,
                )
        rest = tokens[:, begin:]
        options = {"key_bias": key_bias, "key_factor": key_factor, "layers": layers}
        theirs = model(rest, cache=caches[0], **options)
        ours = torch.empty_like(theirs)
        Stepper(model, caches[1]).run(rest, begin=begin, out=ours, **options)
    return ours, theirs, caches[1], caches[0]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    begin=st.integers(0, 10),
    width=st.integers(1, 5),
    modulation=st.sampled_from(["bias", "factor", "none"]),
    layers=st.sampled_from([None, (1,), (0, 2)]),
    bias=st.booleans(),
    tied=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_tanh"]),
)
def test_the_lean_path_is_the_forward(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    batch: int,
    begin: int,
    width: int,
    modulation: str,
    layers: tuple[int, ...] | None,
    bias: bool,
    tied: bool,
    activation: str,
) -> None:
    model = make_gpt(seed, n_layer=3, bias=bias, tied=tied, activation=activation)
    tokens = make_tokens(seed + 1, batch, begin + width)
    ours, theirs, cache, other = both(
        model, tokens, begin, modulation=modulation, layers=layers, seed=seed
    )
    assert (ours - theirs).abs().max() <= EXACT
    end = begin + width
    assert cache.length == other.length == end
    assert (cache.pairs[..., :end, :] - other.pairs[..., :end, :]).abs().max() <= EXACT


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 5))
def test_the_lean_scores_are_the_models(make_gpt: Make, seed: int, count: int) -> None:
    model = make_gpt(seed)
    numbers = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 16, generator=numbers, dtype=torch.float64)
    targets = torch.randint(23, (count,), generator=numbers)
    with torch.no_grad():
        theirs = score_targets(model, hidden, targets)
        ours = Stepper(model, model.new_cache(batch=1, capacity=4)).score(hidden, targets)
    assert (ours.log_probs - theirs.log_probs).abs().max() <= EXACT
    assert (ours.logits - theirs.logits).abs().max() <= EXACT


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_in_float32_packed_or_not_the_numbers_agree_within_rounding(
    make_gpt: Make,
    make_tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    width: int,
    packing: bool,
    activation: str,
    bias: bool,
) -> None:
    shape = {"n_embd": 64, "n_head": 4, "n_layer": 3, "activation": activation, "bias": bias}
    model = make_gpt(3, dtype=torch.float32, **shape)
    if packing and not can_pack(model.lm_head.weight):
        pytest.skip("this torch has no oneDNN")
    if not packing:
        monkeypatch.setattr(stepping, "can_pack", lambda like: False)
    ours, theirs, *_ = both(model, make_tokens(4, batch, 9 + width), 9)
    # values up to 4, 64-term sums: some hundred roundings of 1e-7
    assert (ours - theirs).abs().max() <= 5e-5


def test_weights_are_laid_out_once_for_passes_over_several_positions(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, count = make_gpt(3, dtype=torch.float32), 0
    if not can_pack(model.lm_head.weight):
        pytest.skip("this torch has no oneDNN")
    pack = PackedProducts.weight

    def counting(products: PackedProducts, weight: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return pack(products, weight)

    monkeypatch.setattr(PackedProducts, "weight", counting)
    stepper = Stepper(model, model.new_cache(batch=1, capacity=16))
    tokens, out = make_tokens(4, 1, 4), torch.empty(1, 4, 16)
    for at in range(2):
        stepper.run(tokens[:, at : at + 1], begin=at, out=out[:, at : at + 1])
        stepper.score(out[0, at : at + 1], tokens[0, at : at + 1])
    assert count == 0
    for _ in range(3):
        stepper.run(tokens, begin=0, out=out)
        stepper.score(out[0], tokens[0])
    assert count == 4 * model.config.n_layer + 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 23, 24, 50257])
def test_split_rows_are_the_rows(monkeypatch: pytest.MonkeyPatch, threads: int, rows: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = torch.randn(rows, 5, dtype=torch.float64)
    x = torch.randn(1, 5, dtype=torch.float64)
    split = split_rows(weight)
    assert split.data_ptr() == weight.data_ptr()  # a view: no second copy of the weights
    assert row_blocks(rows) == split.size(0)
    assert (
        torch.bmm(x.expand(split.size(0), 1, 5), split).view(1, -1) - x @ weight.T
    ).abs().max() < 1e-14
    if rows in (24, 50257):
        assert split.size(0) >= max(4, threads)


def test_for_single_positions_the_stepper_holds_no_copy_of_a_weight(make_gpt: Make) -> None:
    model = make_gpt(1)
    stepper = Stepper(model, model.new_cache(batch=1, capacity=4))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for layer in stepper.layers:
        for view in (*layer.weights, *layer.split):
            assert view.untyped_storage().data_ptr() in own


def test_what_the_lean_path_does_not_cover_is_left_to_the_model(make_gpt: Make) -> None:
    class Other(GPT):
        pass

    model = make_gpt(1)
    with torch.no_grad():
        assert covers(model)
        model.use_attention(Attention.REFERENCE)
        assert not covers(model)
        model.use_attention(Attention.SDPA)
        assert not covers(Other(model.config))
        dropping = GPT(
            GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4, dropout=0.1)
        )
        assert not covers(dropping.train())
        assert covers(dropping.eval())
    assert not covers(model)  # gradients are wanted
