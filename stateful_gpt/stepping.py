"""A GPT's forward over cached keys and values, for the few positions of a small pass.

The same numbers as ``GPT.forward`` up to rounding, on the model's own weights and cache, in as few
calls of torch as there can be: at these sizes a call costs as much as its arithmetic. Two things
differ from the reference, neither of them in what is computed:

- one position in float32 or float64 on the CPU: products of a matrix and a vector are split into
  blocks of rows, because torch hands a batch of products to all threads, but a single one to one;
- several positions in float32 on the CPU: products go through oneDNN, with a copy of the weights
  that is laid out for it (see ``products``).

Shapes: B batch, W positions of this pass, S tokens cached with them, C n_embd, H n_head,
D head size, L layers, V vocabulary, G blocks of rows.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.attention import (
    Attention,
    KeyColumns,
    causal_mask,
    flash_runs,
    key_columns,
    sdpa_attention,
)
from stateful_gpt.feedback import CHUNK, TokenScores, logit_chunks, score_logits, wide
from stateful_gpt.model import ACTIVATIONS, GPT, Block, Cache
from stateful_gpt.products import PackedProducts, Products, can_pack

EPSILON = 1e-5  # of the layer norms


def covers(model: GPT) -> bool:
    """Whether ``Stepper`` computes what this model's forward does; if not, call the model."""
    return (
        type(model) is GPT
        and not (model.training and model.config.dropout > 0)
        and not (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))
        and all(b.attn.implementation is Attention.SDPA for b in model.transformer.blocks)
        and not torch.is_autocast_enabled(model.lm_head.weight.device.type)
    )


def _one_at_a_time(like: Tensor) -> bool:
    """Whether a single position has a path of its own."""
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)


def row_blocks(rows: int) -> int:
    """Into how many blocks of equal size a matrix's rows are split: enough for all threads."""
    least = max(4, torch.get_num_threads())
    return next((g for g in range(least, 16 * least) if rows % g == 0), 1)


def split_rows(weight: Tensor) -> Tensor:
    """A view (G, K, N / G) of an (N, K) weight, for products of one vector with all its blocks."""
    blocks = row_blocks(weight.size(0))
    return weight.view(blocks, -1, weight.size(1)).transpose(1, 2)


def next_logits(model: GPT, hidden: Tensor) -> Tensor:
    """The (B, V) logits of (B, C) hidden states, at least in float32, by all threads."""
    weight = model.lm_head.weight
    if hidden.size(0) == 1 and _one_at_a_time(weight):
        split = split_rows(weight)
        return torch.bmm(hidden[None].expand(split.size(0), 1, -1), split).view(1, -1)
    return torch.cat(list(logit_chunks(model, hidden)))


class _Layer:
    """Views of one block's weights."""

    def __init__(self, block: Block) -> None:
        attention, mlp = block.attn, block.mlp
        self.norms = (block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias)
        linears = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
        self.weights = tuple(linear.weight for linear in linears)
        self.biases = tuple(linear.bias for linear in linears)
        self.split = tuple(split_rows(weight) for weight in self.weights)


class Stepper:
    """Runs a model over positions from ``begin`` on; those before are read from the cache.

    Attributes:
        cache: keys and values; positions before ``begin`` must be there, later ones are written.
    """

    def __init__(self, model: GPT, cache: Cache) -> None:
        config = model.config
        self.model, self.cache = model, cache
        self.layers = [_Layer(block) for block in model.transformer.blocks]
        self.form = ACTIVATIONS[config.activation]
        weight = model.lm_head.weight
        self.one_at_a_time = _one_at_a_time(weight)
        self.products: Products | None = None  # until the first pass over several positions
        self._weights: list[tuple[Tensor, ...]] = []
        self._head = weight
        self._future = torch.empty(0, 0, dtype=torch.bool)
        self.head = split_rows(weight)
        self._one: _One | None = None

    @torch.inference_mode()
    def run(
        self,
        tokens: Tensor,
        *,
        begin: int,
        out: Tensor,
        key_bias: Tensor | None = None,
        key_factor: Tensor | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        """Write the hidden states of (B, W) tokens at ``begin`` ... to ``out`` (B, W, C).

        Args:
            key_bias, key_factor, layers: as of ``GPT.forward``; the first two (B, begin + W).
        """
        if tokens.numel() == 1 and self.one_at_a_time:
            if self._one is None:
                self._one = _One(self)
            self._one.run(int(tokens), begin, key_bias, key_factor, layers, out.view(1, -1))
        else:
            self._run(tokens, begin, key_bias, key_factor, layers, out)
        self.cache.length = begin + tokens.size(1)

    def _run(
        self,
        tokens: Tensor,
        begin: int,
        key_bias: Tensor | None,
        key_factor: Tensor | None,
        layers: Collection[int] | None,
        out: Tensor,
    ) -> None:
        transformer, cache = self.model.transformer, self.cache
        (B, W), C = tokens.shape, self.model.config.n_embd
        H, end = self.model.config.n_head, begin + W
        x = F.embedding(tokens, transformer.wte.weight) + transformer.wpe.weight[begin:end]
        x = x.view(B * W, C)
        mask, plain = self._masks(W, end, key_bias, C // H, x, modulated=layers)
        cached = cache.pairs[:, :, :, :, :end].unbind(0)  # (2, B, H, S, D) each
        written = cache.pairs[:, :, :, :, begin:end].unbind(0)  # (2, B, H, W, D) each
        if self.products is None:
            self.products = self._lay_out()
        products = self.products
        for i, (layer, weights) in enumerate(zip(self.layers, self._weights, strict=True)):
            modulated = layers is None or i in layers
            n1, b1, n2, b2 = layer.norms
            w_qkv, w_out, w_in, w_back = weights
            b_qkv, b_out, b_in, b_back = layer.biases
            h = torch.layer_norm(x, (C,), n1, b1, EPSILON)
            qkv = products.linear(h, w_qkv, b_qkv).view(B, W, 3, H, C // H)
            qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, W, D)
            written[i].copy_(qkv[1:])
            k, v = cached[i].unbind(0)
            y = sdpa_attention(
                qkv[0],
                k,
                v,
                mask=mask if modulated else plain,
                key_factor=key_factor if modulated else None,
            )
            x = products.onto(y.transpose(1, 2).reshape(B * W, C), w_out, b_out, x)
            h = torch.layer_norm(x, (C,), n2, b2, EPSILON)
            x = products.onto(products.gelu(h, w_in, b_in), w_back, b_back, x)
        norm = transformer.ln_f
        out.copy_(torch.layer_norm(x, (C,), norm.weight, norm.bias, EPSILON).view(B, W, C))

    def _masks(
        self,
        W: int,
        end: int,
        key_bias: Tensor | None,
        head_size: int,
        x: Tensor,
        *,
        modulated: Collection[int] | None,
    ) -> tuple[Tensor | KeyColumns | None, Tensor | None]:
        """What is added to the scores of modulated and of other layers; see ``GPT.forward``.

        ``modulated``: None if all are, and what is added to those of others is never used.
        """
        if W == 1:
            return None if key_bias is None else key_bias[:, None, None, :].to(x.dtype), None
        if end == W and key_bias is None:
            return None, None
        if end == W and key_bias is not None and flash_runs(x):
            return key_columns(key_bias, head_size=head_size, dtype=x.dtype), None
        if self._future.size(0) != W:
            self._future = ~causal_mask(W, W, device=x.device)
        plain = None
        if end > W and (modulated is not None or key_bias is None):
            plain = x.new_zeros(1, 1, W, end)
            plain[..., end - W :].masked_fill_(self._future, -torch.inf)
        if key_bias is None:
            return plain, plain
        mask = key_bias[:, None, None, :].to(x.dtype).repeat(1, 1, W, 1)
        mask[..., end - W :].masked_fill_(self._future, -torch.inf)
        return mask, plain

    def _lay_out(self) -> Products:
        """Get the weights ready for passes over several positions; few texts need just one."""
        packs = can_pack(self.model.lm_head.weight)
        products = PackedProducts(self.form) if packs else Products(self.form)
        self._weights = [
            tuple(products.weight(weight) for weight in layer.weights) for layer in self.layers
        ]
        self._head = products.weight(self.model.lm_head.weight)
        return products

    @torch.inference_mode()
    def score(self, hidden: Tensor, targets: Tensor) -> TokenScores:
        """What :func:`feedback.score_targets` returns, of (M, C) and (M,); inference tensors."""
        pieces = [
            score_logits(self.logits(some), wanted)
            for some, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return TokenScores(
            log_probs=torch.cat([piece.log_probs for piece in pieces]),
            logits=torch.cat([piece.logits for piece in pieces]),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, V) of (M, C), at least in float32."""
        if hidden.size(0) == 1 and self.one_at_a_time:
            blocks = self.head.size(0)
            return torch.bmm(hidden.view(1, 1, -1).expand(blocks, 1, -1), self.head).view(1, -1)
        if self.products is None:
            self.products = self._lay_out()
        logits = self.products.linear(hidden, self._head, None)
        return logits.to(wide(logits.dtype))


class _One:
    """One position of one text on the CPU: every intermediate has its place, every view exists."""

    def __init__(self, stepper: Stepper) -> None:
        model, cache = stepper.model, stepper.cache
        config, weight = model.config, model.lm_head.weight
        L, C, H = config.n_layer, config.n_embd, config.n_head
        D = C // H
        self.C, self.scale = C, D**-0.5
        self.stepper, self.transformer, self.form = stepper, model.transformer, stepper.form
        self.x = weight.new_empty(1, C)
        qkv, y, inner = (weight.new_empty(1, n * C) for n in (3, 1, 4))
        self.q, self.kv = qkv.view(3, H, 1, D)[0], qkv.view(3, 1, H, D)[1:]
        self.y, self.inner = y.view(H, 1, D), inner
        self.keys = cache.keys.view(L, H, cache.capacity, D).transpose(2, 3)  # (L, H, D, capacity)
        self.values = cache.values.view(L, H, cache.capacity, D)
        self.pairs = cache.pairs
        self.products = []
        for layer in stepper.layers:
            a, o, f, p = layer.split
            self.products.append(
                (
                    (qkv.view(a.size(0), 1, -1), a),
                    (self.x.view(o.size(0), 1, -1), y.view(1, 1, C).expand(o.size(0), 1, C), o),
                    (inner.view(f.size(0), 1, -1), f),
                    (
                        self.x.view(p.size(0), 1, -1),
                        inner.view(1, 1, 4 * C).expand(p.size(0), 1, 4 * C),
                        p,
                    ),
                )
            )
        self.qkv = qkv

    def run(
        self,
        token: int,
        at: int,
        key_bias: Tensor | None,
        key_factor: Tensor | None,
        layers: Collection[int] | None,
        out: Tensor,
    ) -> None:
        bmm, layer_norm, softmax = torch.bmm, torch.layer_norm, torch.softmax
        baddbmm, inner = torch.baddbmm, self.inner
        C, shape, end = self.C, (self.C,), at + 1
        x, q, kv, y, scale = self.x, self.q, self.kv, self.y, self.scale
        transformer = self.transformer
        torch.add(transformer.wte.weight[token], transformer.wpe.weight[at], out=x[0])
        bias = None if key_bias is None else key_bias.view(1, 1, end).to(x.dtype)
        factor = None if key_factor is None else key_factor.view(1, end, 1).to(x.dtype)
        keys = self.keys[..., :end].unbind(0)  # (H, D, S) each
        values = self.values[:, :, :end].unbind(0)
        places = self.pairs[:, :, :, :, at].unbind(0)  # (2, 1, H, D) each
        for i, layer in enumerate(self.stepper.layers):
            modulated = layers is None or i in layers
            n1, b1, n2, b2 = layer.norms
            b_qkv, b_out, b_in, b_back = layer.biases
            (qkv_o, qkv_w), (out_o, out_x, out_w), (in_o, in_w), (back_o, back_x, back_w) = (
                self.products[i]
            )
            h = layer_norm(x, shape, n1, b1, EPSILON)
            bmm(h.view(1, 1, C).expand(qkv_w.size(0), 1, C), qkv_w, out=qkv_o)
            if b_qkv is not None:
                self.qkv += b_qkv
            places[i].copy_(kv)
            if modulated and bias is not None:
                scores = baddbmm(bias, q, keys[i], alpha=scale)
            else:
                scores = bmm(q, keys[i]).mul_(scale)
            weights = softmax(scores, 2)
            v = values[i] * factor if modulated and factor is not None else values[i]
            bmm(weights, v, out=y)
            out_o.baddbmm_(out_x, out_w)
            if b_out is not None:
                x += b_out
            h = layer_norm(x, shape, n2, b2, EPSILON)
            bmm(h.view(1, 1, C).expand(in_w.size(0), 1, C), in_w, out=in_o)
            if b_in is not None:
                inner += b_in
            inner.copy_(F.gelu(inner, approximate=self.form))
            back_o.baddbmm_(back_x, back_w)
            if b_back is not None:
                x += b_back
        norm = transformer.ln_f
        out.copy_(layer_norm(x, shape, norm.weight, norm.bias, EPSILON))
