"""One text read and continued token by token at the exact fixed point, without leaving the device.

Every step is the same few kernels over tensors of fixed shapes: where the next token is, what it
was given as or drawn to, and its estimate are all numbers on the device. On CUDA the step is
recorded once as a graph and replayed; the host only counts. Elsewhere the same code runs eagerly.

For a single text with the feedback of log-probabilities or logits; all else is for ``generate``.

Shapes: L layers, H heads, D head size, C n_embd, V vocabulary, S keys that a step looks at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.feedback import LOG_PROB_FLOOR, Feedback, FeedbackKind, wide
from stateful_gpt.model import ACTIVATIONS, GPT
from stateful_gpt.stepping import EPSILON, covers

BUCKET = 256  # keys: steps look at no more of the cache than the next multiple of it


class Decoder:
    """Reads given tokens, then draws the most likely one at each step, each with exact feedback.

    Attributes:
        tokens: (block_size,) ids; -1 where not read yet.
        log_probs: (block_size,) nats, float32 or, of a float64 model, float64; 0 at position 0.
    """

    def __init__(self, model: GPT, feedback: Feedback, *, compiled: bool = False) -> None:
        """``compiled`` fuses the step by ``torch.compile``, which needs a compiler on the machine.

        Raises:
            ValueError: feedback or a model that this decoder does not cover.
        """
        if feedback.of_hidden or feedback.kind is FeedbackKind.PROB:
            raise ValueError(
                "decoding on the device covers the feedback of log_prob, logit and none only"
            )
        with torch.no_grad():
            if not covers(model):
                raise ValueError("decoding on the device covers a plain GPT in eval mode only")
        config, weight = model.config, model.lm_head.weight
        self.model, self.feedback = model, feedback
        self.device, self.block = weight.device, config.block_size
        head = config.n_embd // config.n_head
        self._pairs = weight.new_zeros(config.n_layer, 2, config.n_head, self.block, head)
        self.log_probs = torch.zeros(self.block, dtype=wide(weight.dtype), device=self.device)
        # what is added to scores: -inf ahead of the text, so that one shape serves all positions
        self._ahead = torch.full_like(self.log_probs, -torch.inf)
        self._bias = torch.full_like(self.log_probs, -torch.inf)
        self.tokens = torch.full((self.block + 1,), -1, dtype=torch.long, device=self.device)
        self._at = torch.zeros(1, dtype=torch.long, device=self.device)
        self._step = torch.compile(self._eager, dynamic=False) if compiled else self._eager
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._strength = feedback.strength if feedback.of_tokens else 0.0
        self._of_logits = feedback.kind is FeedbackKind.LOGIT
        self._modulated = [
            feedback.layers is None or i in feedback.layers for i in range(config.n_layer)
        ]

    @torch.no_grad()
    def run(self, prompt: Sequence[int], *, max_new_tokens: int) -> Tensor:
        """Read ``prompt`` and draw more: (T,) ids; ``log_probs[:T]`` are their estimates.

        The estimates of a given text alone (``max_new_tokens`` 0) are its fixed point.

        Raises:
            ValueError: an empty prompt, or more tokens than the model's block.
        """
        length = len(prompt) + max_new_tokens
        if not prompt or length > self.block:
            raise ValueError(
                f"a prompt and its continuation must have 1 to {self.block} tokens, got {length}"
            )
        for begin in range(BUCKET, length + BUCKET - 1, BUCKET):
            self._prepare(min(begin, self.block))
        self._reset(prompt)
        for at in range(length - 1):
            self._advance(min(self.block, (at // BUCKET + 1) * BUCKET))
        return self.tokens[:length]

    def _reset(self, prompt: Sequence[int]) -> None:
        self.tokens.fill_(-1)
        self.tokens[: len(prompt)] = torch.tensor(list(prompt), device=self.device)
        self._ahead.fill_(-torch.inf)
        self._bias.fill_(-torch.inf)
        self._ahead[0] = self._bias[0] = 0.0  # nothing predicts position 0: probability 1
        self.log_probs.zero_()
        self._at.zero_()

    def _prepare(self, keys: int) -> None:
        """Record the step over ``keys`` keys, once."""
        if self.device.type != "cuda" or keys in self._graphs:
            return
        self._reset([0])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(keys)
        torch.cuda.current_stream().wait_stream(side)
        self._reset([0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(keys)
        self._graphs[keys] = graph

    def _advance(self, keys: int) -> None:
        graph = self._graphs.get(keys)
        if graph is None:
            self._step(keys)
        else:
            graph.replay()

    def _eager(self, keys: int) -> None:
        """Evaluate the token at ``_at``, then write the next one, its estimate and its bias."""
        model, at = self.model, self._at
        transformer, config = model.transformer, model.config
        H, C = config.n_head, config.n_embd
        D, form = C // H, ACTIVATIONS[config.activation]
        x = transformer.wte.weight[self.tokens[at]] + transformer.wpe.weight[at]  # (1, C)
        bias, ahead = self._bias[:keys], self._ahead[:keys]
        for i, block in enumerate(transformer.blocks):
            norm, attention, mlp = block.ln_1, block.attn, block.mlp
            h = F.layer_norm(x, (C,), norm.weight, norm.bias, EPSILON)
            qkv = F.linear(h, attention.c_attn.weight, attention.c_attn.bias).view(3, H, 1, D)
            self._pairs[i].index_copy_(2, at, qkv[1:])
            k, v = self._pairs[i, :, :, :keys]  # (H, S, D)
            scores = (qkv[0] @ k.transpose(1, 2)).to(bias.dtype) * D**-0.5  # (H, 1, S)
            weights = F.softmax(scores + (bias if self._modulated[i] else ahead), dim=2)
            y = (weights.to(v.dtype) @ v).view(1, C)
            x = x + F.linear(y, attention.c_proj.weight, attention.c_proj.bias)
            norm = block.ln_2
            h = F.layer_norm(x, (C,), norm.weight, norm.bias, EPSILON)
            inner = F.gelu(F.linear(h, mlp.c_fc.weight, mlp.c_fc.bias), approximate=form)
            x = x + F.linear(inner, mlp.c_proj.weight, mlp.c_proj.bias)
        norm = transformer.ln_f
        h = F.layer_norm(x, (C,), norm.weight, norm.bias, EPSILON)
        logits = F.linear(h, model.lm_head.weight).to(bias.dtype)[0]  # (V,)
        after = at + 1
        given = self.tokens[after]
        token = torch.where(given < 0, logits.argmax(dim=0, keepdim=True), given)  # (1,)
        score = logits[token]
        log_prob = logits.log_softmax(dim=0)[token].clamp_min(LOG_PROB_FLOOR)
        self.tokens.index_copy_(0, after, token)
        self.log_probs.index_copy_(0, after, log_prob)
        self._ahead.index_fill_(0, after, 0.0)
        estimate = score if self._of_logits else log_prob
        self._bias.index_copy_(0, after, self._strength * estimate)
        at.add_(1)
