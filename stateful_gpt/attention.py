"""Causal attention with one number per key: a bias on its scores, or a factor on its weights.

Knows nothing of probabilities or of feedback: it is handed numbers and applies them.

Shapes: B batch, H heads, Q queries, K keys, D head size. The last query sits at the last key, so
the first query sits at key K - Q (Q < K when earlier keys come from a cache).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


class KeyValueCache:
    """Keys and values of tokens already read (see ``language_model.Cache``).

    ``shape`` is (B, H, capacity, D) of each layer's keys, and of its values; ``like`` gives device
    and dtype.
    """

    def __init__(self, n_layer: int, shape: tuple[int, ...], *, like: Tensor) -> None:
        self._layers = [like.new_empty(2, *shape) for _ in range(n_layer)]
        self._batch = shape[0]
        self.length = 0

    def keep(self, rows: list[int]) -> None:
        """Only rows that change their place are copied, while there is room for them."""
        self._batch = len(rows)
        if self._batch > self._layers[0].size(1):
            self._layers = [pairs[:, rows] for pairs in self._layers]
            return
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            to, source = map(list, zip(*moved, strict=True))
            for pairs in self._layers:
                written = pairs.narrow(3, 0, self.length)
                written[:, to] = written[:, source]

    def extend(self, layer: int, pairs: Tensor) -> Tensor:
        """Write (2, B, H, T, D) behind the cached tokens; all of them, (2, B, H, S + T, D)."""
        kept = self._layers[layer].narrow(1, 0, self._batch)
        kept.narrow(3, self.length, pairs.size(3)).copy_(pairs)
        return kept.narrow(3, 0, self.length + pairs.size(3))


def score_mask(
    queries: int, keys: int, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What is added to the scores: each key's bias, (B, K), where causality allows it, else -inf.

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
    """(B, H, Q, D) of the fused kernel, of (B, H, Q, D) queries and (B, H, K, D) keys and values.

    Args:
        mask: what :func:`score_mask` makes for these shapes.
        factor: (B, K) multiplies the softmaxed weights of each key, without renormalising.
    """
    if factor is not None:
        # (A * f) @ v == A @ (f * v): the weights themselves never have to exist
        v = v * factor[:, None, :, None].to(v.dtype)
    # never a mask and is_causal together: the kernel takes both without complaint
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1
    )
