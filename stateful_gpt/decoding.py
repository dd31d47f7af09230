"""One text read and continued token by token at the exact fixed point, without leaving the device.

Every step is the same few kernels over tensors of fixed shapes: where the next token is, what it
was given as or drawn to, and its estimate are all numbers on the device. On CUDA the step is
recorded once as a graph and replayed; the host only counts. Elsewhere the same code runs eagerly.

For a single text with the feedback of log-probabilities or logits; all else is for ``generate``,
which hands a text over to a decoder once it is settled (``windowed``).

Shapes: L layers, H heads, D head size, C n_embd, V vocabulary, S keys that a step looks at.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stateful_gpt.feedback import LOG_PROB_FLOOR, Feedback, FeedbackKind, wide
from stateful_gpt.model import ACTIVATIONS, GPT
from stateful_gpt.stepping import EPSILON, covers

BUCKET = 256  # keys: steps look at no more of the cache than the next multiple of it
# Roundings, of the largest logit, between a step and its recording: the same numbers go through the
# same kernels, unless a library chooses another one while it records.
AGREEMENT = 8
WARM_UPS = 3
STRIDE = 16  # tokens that are drawn before the host looks at them


def decodes(feedback: Feedback) -> bool:
    """Whether a decoder covers this feedback."""
    return not feedback.of_hidden and feedback.kind is not FeedbackKind.PROB


class Decoder:
    """Reads given tokens, then draws more, each with exact feedback.

    Attributes:
        tokens: (block_size,) ids; -1 where not read yet.
        log_probs: (block_size,) nats, float32 or, of a float64 model, float64; 0 at position 0.
        estimates: (block_size,) what is fed back of each token, in the same precision.
        logits: (V,) that the newest evaluated token predicts.
        recorded: whether steps are replayed as CUDA graphs.
    """

    def __init__(
        self,
        model: GPT,
        feedback: Feedback,
        *,
        vocab_size: int | None = None,
        compiled: bool = False,
    ) -> None:
        """Make room for one text; the model must outlive its decoder.

        Args:
            vocab_size: ids from here on cannot be drawn.
            compiled: fuse the step by ``torch.compile``, which needs a compiler on the machine.

        Raises:
            ValueError: feedback or a model that this decoder does not cover.
        """
        if not decodes(feedback):
            raise ValueError(
                "decoding on the device covers the feedback of log_prob, logit and none only"
            )
        with torch.no_grad():
            if not covers(model):
                raise ValueError("decoding on the device covers a plain GPT in eval mode only")
        config, weight = model.config, model.lm_head.weight
        self._model = weakref.ref(model)  # who keeps decoders by model must not keep the model
        self.device, self.block = weight.device, config.block_size
        self.recorded = self.device.type == "cuda"
        head, numbers = config.n_embd // config.n_head, wide(weight.dtype)
        with torch.inference_mode(mode=False):  # tensors that can be written to in any mode
            new = partial(torch.zeros, device=self.device)
            self._pairs = new(
                config.n_layer, 2, config.n_head, self.block, head, dtype=weight.dtype
            )
            self.tokens = new(self.block, dtype=torch.long)
            self.log_probs, self.estimates = new(2, self.block, dtype=numbers)
            self.logits = new(config.vocab_size, dtype=numbers)
            # added to scores: -inf ahead of the text, so that one shape serves all positions
            self._ahead, self._bias = new(2, self.block, dtype=numbers)
            self._at = new(1, dtype=torch.long)
            self._strength = new((), dtype=numbers)
        self._of_logits = feedback.kind is FeedbackKind.LOGIT
        self._modulated = [
            feedback.layers is None or i in feedback.layers for i in range(config.n_layer)
        ]
        self._drawable = vocab_size
        # by name: bound methods would keep a decoder that nobody uses until the next collection
        self._compiled: dict[str, Callable[[int], None]] = {}
        if compiled:
            parts = {"step": self._step, "evaluate": self._evaluate}
            self._compiled = {
                name: torch.compile(part, dynamic=False) for name, part in parts.items()
            }
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self.strength = feedback.strength if feedback.of_tokens else 0.0

    @property
    def strength(self) -> float:
        """Multiplies what is fed back; the same recorded steps serve any."""
        return self._value

    @strength.setter
    def strength(self, value: float) -> None:
        self._value = value
        self._strength.fill_(value)

    @torch.no_grad()
    def run(self, prompt: Sequence[int], *, max_new_tokens: int) -> Tensor:
        """Read ``prompt`` and draw the likeliest tokens: (T,) ids, of ``log_probs[:T]``.

        The estimates of a given text alone (``max_new_tokens`` 0) are its fixed point.

        Raises:
            ValueError: an empty prompt, or more tokens than the model's block.
        """
        length = len(prompt) + max_new_tokens
        if not prompt or length > self.block:
            raise ValueError(
                f"a prompt and its continuation must have 1 to {self.block} tokens, got {length}"
            )
        self._pairs.zero_()  # what weighs nothing must be a number all the same
        self._begin(torch.tensor(list(prompt), device=self.device))
        self._prepare("step", 0, length - 1)
        for at in range(length - 1):
            self._do("step", at)
        return self.tokens[:length]

    @torch.no_grad()
    def take_over(
        self, tokens: Tensor, log_probs: Tensor, estimates: Tensor, pairs: Tensor
    ) -> None:
        """Go on from a settled text of T tokens.

        Args:
            tokens, log_probs, estimates: (T,), final.
            pairs: (L, 2, H, at least T - 1, D) its keys and values.
        """
        T = tokens.numel()
        self._pairs.zero_()
        self._begin(tokens)
        self._pairs[:, :, :, : T - 1] = pairs[:, :, :, : T - 1]
        self.log_probs[:T], self.estimates[:T] = log_probs, estimates
        self._ahead[:T] = 0.0
        self._bias[:T] = self._strength * estimates
        self._at.fill_(T - 1)

    @torch.no_grad()
    def go_on(
        self,
        begin: int,
        *,
        most: int,
        choose: Callable[[Tensor], Tensor] | None,
        end_token: int | None,
        tell: Callable[[int], None],
        generator: torch.Generator | None,
    ) -> list[int]:
        """Draw the tokens from ``begin`` on, ``STRIDE`` of them before the host looks at any.

        Ends behind ``end_token``, and before the stride in which an estimate is not finite.

        Args:
            choose: the (1,) id to draw from (1, V) logits; None draws the likeliest.
            tell: called with each token, once the host has looked at its stride.
            generator: what ``choose`` draws with; ends as far on as the tokens returned take it.
        """
        tokens: list[int] = []
        while len(tokens) < most and (not tokens or tokens[-1] != end_token):
            first = begin + len(tokens)
            last = min(first + STRIDE, begin + most)
            states = self._draw(first, last, choose, generator)
            numbers = torch.stack([self.log_probs[first:last], self.estimates[first:last]])
            kept: list[int] = []
            if bool(numbers.isfinite().all()):
                kept = self.tokens[first:last].tolist()
                if end_token in kept:
                    kept = kept[: kept.index(end_token) + 1]
            if generator is not None and len(kept) < last - first:
                generator.set_state(states[len(kept)])
            for token in kept:
                tell(token)
            tokens += kept
            if not kept:
                break
        return tokens

    def _draw(
        self,
        first: int,
        last: int,
        choose: Callable[[Tensor], Tensor] | None,
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        """Draw the tokens ``first`` to ``last - 1``, evaluating the one before each.

        Returns:
            The generator's state before each of them.
        """
        states = []
        for part in ("step",) if choose is None else ("evaluate", "take"):
            self._prepare(part, first - 1, last - 1)
        for at in range(first - 1, last - 1):
            if generator is not None:
                states.append(generator.get_state())
            if choose is None:
                self._do("step", at)
            else:
                self._do("evaluate", at)
                self.tokens[at + 1 : at + 2] = choose(self.logits[None])
                self._do("take", at)
        return states

    def give_back(self, pairs: Tensor, begin: int, end: int) -> None:
        """Copy the keys and values of ``begin`` to ``end - 1`` to where the first came from."""
        pairs[:, :, :, begin:end] = self._pairs[:, :, :, begin:end]

    def _begin(self, tokens: Tensor) -> None:
        self.tokens.fill_(-1)
        self.tokens[: tokens.numel()] = tokens
        self._ahead.fill_(-torch.inf)
        self._bias.fill_(-torch.inf)
        self._ahead[0] = self._bias[0] = 0.0  # nothing predicts position 0: probability 1
        self.log_probs.zero_()
        self.estimates.zero_()
        self._at.zero_()

    # --- recording ------------------------------------------------------------------------------

    def _prepare(self, part: str, first: int, last: int) -> None:
        """Record a part for the positions from ``first`` to before ``last``; the text stays."""
        for keys in dict.fromkeys(self._keys(at) for at in range(first, last)):
            if not self.recorded or (part, keys) in self._graphs:
                continue
            held = [(tensor, tensor.clone()) for tensor in self._text()]
            try:
                self._graphs[part, keys] = self._record(part, keys)
            except RuntimeError as error:
                self.recorded = False
                reason = " ".join(str(error.__context__ or error).split())[:160]
                warnings.warn(f"generation goes on without CUDA graphs: {reason}", stacklevel=3)
            for tensor, content in held:
                tensor.copy_(content)

    def _record(self, part: str, keys: int) -> torch.cuda.CUDAGraph:
        """Raises RuntimeError if it cannot be recorded, or if the recording says other things."""
        with torch.cuda.device(self.device):
            self._begin(torch.zeros(1, dtype=torch.long, device=self.device))
            side, stream = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                for _ in range(min(WARM_UPS, self.block - 1)):  # chooses kernels, reserves memory
                    self._run(part, keys)
            stream.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._run(part, keys)
            finally:
                torch.cuda.set_stream(stream)  # which a recording that fails does not give back
            self._check(part, keys, graph)
        return graph

    def _check(self, part: str, keys: int, graph: torch.cuda.CUDAGraph) -> None:
        said = []
        for once in (partial(self._run, part, keys), graph.replay):
            self._begin(torch.zeros(1, dtype=torch.long, device=self.device))
            if part != "take":
                self.logits.fill_(torch.nan)
            once()
            said.append((self.logits.clone(), self.log_probs.clone()))
        largest = float(said[0][0].nan_to_num().abs().max())
        within = AGREEMENT * torch.finfo(self._pairs.dtype).eps * largest
        for eager, replayed in zip(*said, strict=True):
            if not torch.allclose(eager, replayed, rtol=0.0, atol=within, equal_nan=True):
                raise RuntimeError("a recorded step says something else than the step itself")

    def _text(self) -> tuple[Tensor, ...]:
        """All that steps write to, of the first few positions as far as those alone are at risk."""
        return (
            *(self.tokens, self.log_probs, self.estimates, self.logits),
            *(self._ahead, self._bias, self._at, self._pairs[:, :, :, : WARM_UPS + 1]),
        )

    def _keys(self, at: int) -> int:
        return min(self.block, (at // BUCKET + 1) * BUCKET)

    def _do(self, part: str, at: int) -> None:
        keys = self._keys(at)
        graph = self._graphs.get((part, keys)) if self.recorded else None
        if graph is None:
            self._run(part, keys)
        else:
            graph.replay()

    def _run(self, part: str, keys: int) -> None:
        run = self._compiled.get(part) or getattr(self, f"_{part}")
        run(keys)

    # --- the step -------------------------------------------------------------------------------

    def _step(self, keys: int) -> None:
        self._evaluate(keys)
        self._take(keys)

    def _evaluate(self, keys: int) -> None:
        """Evaluate the token at ``_at``: what it predicts goes to ``logits``."""
        model, at = self._model(), self._at
        assert model is not None
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
        self.logits.copy_(F.linear(h, model.lm_head.weight)[0])

    def _take(self, keys: int) -> None:
        """Write the next token, unless it is given, its estimate and its bias; go on to it."""
        logits, after = self.logits, self._at + 1
        given = self.tokens[after]
        likeliest = logits[: self._drawable].argmax(dim=0, keepdim=True)
        token = torch.where(given < 0, likeliest, given)  # (1,)
        log_prob = logits.log_softmax(dim=0)[token].clamp_min(LOG_PROB_FLOOR)
        estimate = logits[token] if self._of_logits else log_prob
        self.tokens.index_copy_(0, after, token)
        self.log_probs.index_copy_(0, after, log_prob)
        self.estimates.index_copy_(0, after, estimate)
        self._ahead.index_fill_(0, after, 0.0)
        self._bias.index_copy_(0, after, self._strength * estimate)
        self._at.add_(1)


_kept: "weakref.WeakKeyDictionary[GPT, dict[Hashable, Decoder]]" = weakref.WeakKeyDictionary()


def decoder_for(model: GPT, feedback: Feedback, *, vocab_size: int | None) -> Decoder:
    """The decoder of a model, made once: what it has recorded serves a whole sweep of strengths."""
    weight = model.lm_head.weight
    places = (weight.dtype, weight.device, *(p.data_ptr() for p in model.parameters()))
    layers = None if feedback.layers is None else frozenset(feedback.layers)
    key = (places, feedback.kind is FeedbackKind.LOGIT, layers, vocab_size)
    kept = _kept.get(model, {})
    if key not in kept:
        kept = {key: Decoder(model, feedback, vocab_size=vocab_size)}  # one: each has a cache
        _kept[model] = kept
    decoder = kept[key]
    decoder.strength = feedback.strength if feedback.of_tokens else 0.0
    return decoder
