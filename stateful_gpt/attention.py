"""Causal attention with one number per key: a bias on its scores, or a factor on its weights.

Knows nothing of probabilities or of feedback: it is handed numbers and applies them.

Shapes: B batch, H heads, Q queries, K keys, D head size. The last query sits at the last key, so
the first query sits at key K - Q (Q < K when earlier keys come from a cache).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def score_mask(
    queries: int, keys: int, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What is added to the scores: each key's bias where causality allows it, -inf elsewhere.

    Args:
        bias: (B, K), or None for none.

    Returns:
        (B or 1, 1, Q or 1, K) in ``dtype``, or None where ``attend`` needs none: one query sees
        every key, and as many queries as keys are the fused kernel's own causal case.
    """
    if bias is None and queries in (1, keys):
        return None
    numbers = torch.zeros(1, keys, dtype=dtype, device=device) if bias is None else bias.to(dtype)
    numbers = numbers[:, None, None, :]
    if queries == 1:
        return numbers
    future = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
    return numbers.masked_fill(future, -torch.inf)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, factor: Tensor | None
) -> Tensor:
    """Attention by the fused kernel.

    Args:
        q: (B, H, Q, D); k, v: (B, H, K, D).
        mask: what :func:`score_mask` makes for these shapes.
        factor: (B, K) multiplies the softmaxed weights of each key, without renormalising.

    Returns:
        (B, H, Q, D)
    """
    if factor is not None:
        # (A * f) @ v == A @ (f * v): the weights themselves never have to exist
        v = v * factor[:, None, :, None].to(v.dtype)
    # never a mask and is_causal together: the kernel takes both without complaint
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1
    )
