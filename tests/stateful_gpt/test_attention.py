"""Attention with a number per key: the fused kernel against the definition, entry by entry."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stateful_gpt.model
import stateful_gpt.stepping
from stateful_gpt.attention import (
    causal_mask,
    key_columns,
    reference_attention,
    score_mask,
    sdpa_attention,
)
from stateful_gpt.model import GPT

# float64 sums of at most a few dozen terms of order 1: rounding stays far below this
ROUNDING = 1e-13


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    attend: Tensor | None = None,
) -> Tensor:
    """One query at a time, one key at a time."""
    B, H, Q, D = q.shape
    K = k.size(2)
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(Q):
                at = i + K - Q  # the key at which this query sits
                weights = {}
                for j in range(at + 1):
                    if attend is not None and j != at and not attend[b, j]:
                        continue
                    score = (q[b, h, i] * k[b, h, j]).sum().item() / math.sqrt(D)
                    weights[j] = math.exp(score + (0.0 if bias is None else bias[b, j].item()))
                total = sum(weights.values())
                for j, weight in weights.items():
                    scale = 1.0 if factor is None else factor[b, j].item()
                    out[b, h, i] += weight / total * scale * v[b, h, j]
    return out


def random_qkv(seed: int, *, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return 1.5 * torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64)

    return draw(queries), draw(keys), draw(keys)


@given(
    seed=st.integers(0, 2**31),
    keys=st.integers(1, 7),
    cached=st.integers(0, 6),
    with_bias=st.booleans(),
    with_factor=st.booleans(),
    with_attend=st.booleans(),
)
def test_both_implementations_equal_the_definition(
    seed: int, keys: int, cached: int, with_bias: bool, with_factor: bool, with_attend: bool
) -> None:
    queries = max(1, keys - cached)
    q, k, v = random_qkv(seed, queries=queries, keys=keys)
    generator = torch.Generator().manual_seed(seed + 1)
    bias = -8 * torch.rand(2, keys, generator=generator, dtype=torch.float64) if with_bias else None
    factor = 3 * torch.rand(2, keys, generator=generator, dtype=torch.float64)
    factor = factor if with_factor else None
    hidden = torch.rand(2, keys, generator=generator) < 0.4
    attend = ~hidden if with_attend else None

    visible = causal_mask(queries, keys)
    if attend is not None:
        own = torch.eye(keys, dtype=torch.bool)[keys - queries :]
        visible = visible & (attend[:, None, None, :] | own)
    mask = score_mask(visible, bias, dtype=torch.float64)

    expected = by_definition(q, k, v, bias=bias, factor=factor, attend=attend)
    for attention in (reference_attention, sdpa_attention):
        result = attention(q, k, v, mask=mask, key_factor=factor)
        assert (result - expected).abs().max() <= ROUNDING


@pytest.mark.parametrize("queries", [1, 5])
def test_without_a_mask_attention_is_plainly_causal(queries: int) -> None:
    q, k, v = random_qkv(3, queries=queries, keys=5 if queries == 5 else 7)
    expected = by_definition(q, k, v)
    for attention in (reference_attention, sdpa_attention):
        result = attention(q, k, v, mask=None, key_factor=None)
        assert (result - expected).abs().max() <= ROUNDING


def test_the_fused_kernel_refuses_several_cached_queries_without_a_mask() -> None:
    # its own is_causal would line the first query up with the first key
    q, k, v = random_qkv(4, queries=2, keys=5)
    with pytest.raises(ValueError, match="needs a mask"):
        sdpa_attention(q, k, v, mask=None, key_factor=None)


def test_true_in_a_mask_means_attend() -> None:
    assert causal_mask(2, 3).tolist() == [[True, True, False], [True, True, True]]
    bias = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    mask = score_mask(causal_mask(2, 3), bias, dtype=torch.float64)
    assert mask.tolist() == [[[[0.5, -1.0, -math.inf], [0.5, -1.0, 2.0]]]]


def test_a_bias_too_strong_for_exp_is_still_exact() -> None:
    # e**-9000 is 0 in float64: the softmax must subtract its maximum first
    q, k, v = random_qkv(5, queries=4, keys=4)
    bias = torch.tensor([[-9000.0, -9000.0, 0.0, -9000.0]] * 2, dtype=torch.float64)
    mask = score_mask(causal_mask(4, 4), bias, dtype=torch.float64)
    for attention in (reference_attention, sdpa_attention):
        result = attention(q, k, v, mask=mask, key_factor=None)
        assert (result[:, :, 2:] - v[:, :, 2:3]).abs().max() <= ROUNDING  # key 2 takes all
        # keys 0 and 1 are equally suppressed, so that the bias cancels; 9000 costs 4 digits
        plain = by_definition(q[:, :, :2], k[:, :, :2], v[:, :, :2])
        assert (result[:, :, :2] - plain).abs().max() <= 1e-11


@given(seed=st.integers(0, 2**31), length=st.integers(1, 7))
def test_a_bias_that_rides_on_the_keys_is_the_bias(seed: int, length: int) -> None:
    q, k, v = random_qkv(seed, queries=length, keys=length)
    bias = 3 * torch.randn(2, length, generator=torch.Generator().manual_seed(seed)).double()
    expected = by_definition(q, k, v, bias=bias)
    columns = key_columns(bias, head_size=4, dtype=torch.float64)
    assert columns.values.shape == (2, 1, length, 4)  # 4 components and 4 more: a multiple of 8
    for attention in (sdpa_attention, reference_attention):
        ours = attention(q, k, v, mask=columns, key_factor=None)
        assert (ours - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_bias_keeps_the_precision_of_a_score(dtype: torch.dtype) -> None:
    bias = -torch.linspace(0.0, 40.0, 500)[None]
    pieces = key_columns(bias, head_size=64, dtype=dtype).values[0, 0]
    assert pieces.dtype == dtype
    # three pieces of at least 8 bits: 24 bits of the largest, halved by rounding
    assert (pieces.double().sum(1) / 8 - bias[0].double()).abs().max() <= 40 * 2**-23


def test_a_model_whose_bias_rides_on_the_keys_is_the_reference(
    make_gpt: Callable[..., GPT],
    make_tokens: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = make_gpt(3, n_layer=3), make_tokens(4, 2, 9)
    bias = torch.randn(2, 9, dtype=torch.float64)
    expected = model(tokens, key_bias=bias, layers=(0, 2))
    for module in (stateful_gpt.model, stateful_gpt.stepping):
        monkeypatch.setattr(module, "flash_runs", lambda _: True)  # as on CUDA in 16 bits
    riding = model(tokens, key_bias=bias, layers=(0, 2))
    assert (riding - expected).abs().max() <= 1e-12
    lean = torch.empty_like(riding)
    stepper = stateful_gpt.stepping.Stepper(model, model.new_cache(batch=2, capacity=9))
    with torch.no_grad():
        stepper.run(tokens, begin=0, out=lean, key_bias=bias, layers=(0, 2))
    assert (lean - expected).abs().max() <= 1e-12
