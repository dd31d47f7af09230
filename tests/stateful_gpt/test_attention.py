"""Attention with a number per key: the fused kernel against the definition, entry by entry."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.attention import attend, score_mask

# float64 sums of at most a few dozen terms of order 1: rounding stays far below this
ROUNDING = 1e-13


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
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


def mask_of(queries: int, keys: int, bias: Tensor | None = None) -> Tensor | None:
    return score_mask(queries, keys, bias, dtype=torch.float64, device=torch.device("cpu"))


@given(
    seed=st.integers(0, 2**31),
    keys=st.integers(1, 7),
    cached=st.integers(0, 6),
    with_bias=st.booleans(),
    with_factor=st.booleans(),
)
def test_the_fused_kernel_equals_the_definition(
    seed: int, keys: int, cached: int, with_bias: bool, with_factor: bool
) -> None:
    queries = max(1, keys - cached)
    q, k, v = random_qkv(seed, queries=queries, keys=keys)
    generator = torch.Generator().manual_seed(seed + 1)
    bias = -8 * torch.rand(2, keys, generator=generator, dtype=torch.float64) if with_bias else None
    factor = 3 * torch.rand(2, keys, generator=generator, dtype=torch.float64)
    factor = factor if with_factor else None
    expected = by_definition(q, k, v, bias=bias, factor=factor)
    ours = attend(q, k, v, mask=mask_of(queries, keys, bias), factor=factor)
    assert (ours - expected).abs().max() <= ROUNDING


def test_a_mask_is_the_bias_where_causality_allows_it() -> None:
    bias = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    mask = mask_of(2, 3, bias)
    assert mask is not None
    assert mask.tolist() == [[[[0.5, -1.0, -math.inf], [0.5, -1.0, 2.0]]]]
    # none is made where the kernel's own causal case, or none at all, is right
    assert mask_of(1, 3) is None
    assert mask_of(3, 3) is None
    assert mask_of(2, 3) is not None


def test_a_bias_too_strong_for_exp_is_still_exact() -> None:
    # e**-9000 is 0 in float64: the softmax must subtract its maximum first
    q, k, v = random_qkv(5, queries=4, keys=4)
    bias = torch.tensor([[-9000.0, -9000.0, 0.0, -9000.0]] * 2, dtype=torch.float64)
    result = attend(q, k, v, mask=mask_of(4, 4, bias), factor=None)
    assert (result[:, :, 2:] - v[:, :, 2:3]).abs().max() <= ROUNDING  # key 2 takes all
    # keys 0 and 1 are equally suppressed, so that the bias cancels; 9000 costs 4 digits
    plain = by_definition(q[:, :, :2], k[:, :, :2], v[:, :, :2])
    assert (result[:, :, :2] - plain).abs().max() <= 1e-11
