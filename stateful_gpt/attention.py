"""Causal attention with one number per key: a bias on its scores, or a factor on its weights.

Knows nothing of probabilities or of feedback: it is handed numbers and applies them.

The one mask convention of the project, stated here: masks are boolean and True means *attend*.

Shapes: B batch, H heads, Q queries, K keys, D head size. The last query sits at the last key, so
the first query sits at key K - Q (Q < K when earlier keys come from a cache).
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F


class Attention(Enum):
    """How attention is computed; both give the same numbers up to rounding."""

    SDPA = "sdpa"
    REFERENCE = "reference"


def causal_mask(queries: int, keys: int, *, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see: (Q, K) boolean, True = attend."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def score_mask(attend: Tensor, key_bias: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: the key's bias where attention is allowed, -inf elsewhere.

    Args:
        attend: boolean (Q, K) or (B, 1, Q, K), True = attend.
        key_bias: (B, K), or None for no bias.

    Returns:
        (1 or B, 1, Q, K) in ``dtype``.
    """
    if key_bias is None:
        bias = torch.zeros((), dtype=dtype, device=attend.device)
    else:
        bias = key_bias[:, None, None, :].to(dtype)
    return torch.where(attend, bias, -torch.inf)


@dataclass(frozen=True)
class KeyColumns:
    """A bias per key as further components of the keys, for kernels that know no mask.

    A query with ones there scores ``q . k / sqrt(D) + bias``.

    Attributes:
        values: (B, 1, K, E): their sum over E is ``bias * sqrt(D)``.
    """

    values: Tensor


# Components that a bias is split into: bfloat16 keeps 8 bits of a number, a score 24.
PIECES = {torch.float64: 1, torch.float32: 1, torch.float16: 3, torch.bfloat16: 3}
PADDED = 8  # flash kernels take heads of a multiple of this


def key_columns(key_bias: Tensor, *, head_size: int, dtype: torch.dtype) -> KeyColumns:
    """The (B, K) bias as columns in ``dtype``, with zeros up to the next multiple of 8."""
    rest = key_bias * head_size**0.5
    if dtype == torch.float16:
        # its largest number is 65504; a key as unlikely as this has no weight anyway
        rest = rest.clamp(-6e4, 6e4)
    pieces = []
    for _ in range(PIECES[dtype]):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].to(rest.dtype)
    spare = -(head_size + len(pieces)) % PADDED
    columns = torch.stack(pieces + [torch.zeros_like(pieces[0])] * spare, dim=-1)
    return KeyColumns(columns[:, None])


def flash_runs(x: Tensor) -> bool:
    """Whether the flash kernel, which takes no mask, computes causal attention of such numbers."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def column_attention(q: Tensor, k: Tensor, v: Tensor, columns: KeyColumns) -> Tensor:
    """Causal attention (B, H, T, D) whose bias per key rides on the keys."""
    B, H, T, D = q.shape
    extra = columns.values.size(-1)
    k = torch.cat([k, columns.values.expand(B, H, T, extra)], dim=-1)
    q = torch.cat([q, q.new_ones(1, 1, 1, 1).expand(B, H, T, extra)], dim=-1)
    v = F.pad(v, (0, extra))  # the kernel wants one size of head
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=D**-0.5)
    return out[..., :D]


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | KeyColumns | None, key_factor: Tensor | None
) -> Tensor:
    """Attention by the fused kernel.

    Args:
        q: (B, H, Q, D); k, v: (B, H, K, D).
        mask: what :func:`score_mask` or :func:`key_columns` returns, or None for plain causal
            attention.
        key_factor: (B, K) multiplies the softmaxed weights of each key, without renormalising.

    Returns:
        (B, H, Q, D)
    """
    if key_factor is not None:
        # (A * f) @ v == A @ (f * v): the weights themselves never have to exist
        v = v * key_factor[:, None, :, None].to(v.dtype)
    if isinstance(mask, KeyColumns):
        return column_attention(q, k, v, mask)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if q.size(2) == 1:
        return F.scaled_dot_product_attention(q, k, v)
    if q.size(2) != k.size(2):
        raise ValueError("plain causal attention over cached keys needs a mask, see score_mask")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | KeyColumns | None, key_factor: Tensor | None
) -> Tensor:
    """The same as :func:`sdpa_attention`, written out; the yardstick for every faster path."""
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, Q, K)
    if isinstance(mask, KeyColumns):
        pieces = mask.values.to(torch.float64)  # (B, 1, K, E)
        bias = pieces.sum(dim=-1) / q.size(-1) ** 0.5
        scores = scores + bias[:, :, None].to(scores.dtype)
    if mask is None or isinstance(mask, KeyColumns):
        attend = causal_mask(q.size(2), k.size(2), device=q.device)
        scores = scores.masked_fill(~attend, -torch.inf)
    else:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1)
    if key_factor is not None:
        weights = weights * key_factor[:, None, None, :].to(weights.dtype)
    return weights @ v
