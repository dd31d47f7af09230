"""Products of a few rows with a model's weights, as fast as torch has them.

Small passes live on these: their time is the reading of the weights and the calls. On the CPU,
torch's BLAS takes up to twice as long for few rows as oneDNN does with weights that it has laid out
beforehand, and oneDNN computes the activation or the sum with the residual stream in the same call.

Shapes: M rows, K in, N out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_pack: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

ROWS = 32  # that packed weights are laid out for; they serve any number


class Products:
    """Products by torch's own calls: any device, any dtype."""

    def __init__(self, activation: str) -> None:
        """``activation``: the approximation of GELU, as ``torch.nn.functional.gelu`` names it."""
        self.activation = activation

    def weight(self, weight: Tensor) -> Tensor:
        """An (N, K) weight as the other methods take it."""
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(M, N) of (M, K)."""
        return F.linear(x, weight, bias)

    def gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """GELU of :meth:`linear`."""
        return F.gelu(F.linear(x, weight, bias), approximate=self.activation)

    def onto(self, x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
        """:meth:`linear` added to (M, N)."""
        return F.linear(x, weight, bias).add_(base)


class PackedProducts(Products):
    """Products by oneDNN, on the CPU in float32; packing a weight takes a copy of it."""

    def weight(self, weight: Tensor) -> Tensor:
        packed: Tensor = _pack(weight.detach(), ROWS)
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _linear(x, weight, bias, "none", [], "")
        return y

    def gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _linear(x, weight, bias, "gelu", [], self.activation)
        return y

    def onto(self, x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
        y: Tensor = _linear.binary(x, base, weight, bias, "add")
        return y


def can_pack(like: Tensor) -> bool:
    """Whether this torch has oneDNN for numbers like these."""
    return (
        _linear is not None
        and _pack is not None
        and like.device.type == "cpu"
        and like.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )
