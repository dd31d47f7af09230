"""One settled text continued token by token, with as little as possible around each step.

Each new token is drawn from the newest hidden state and evaluated once: behind settled estimates
that is its exact recompute. On a GPU a recorded step does it all (``decoding``); on the CPU it is
the lean step of ``stepping``. What cannot be continued here is left to the passes of ``windowed``.

Shapes: T tokens of the settled text, n drawn tokens, C n_embd.
"""

import math
from functools import partial

import torch
from torch import Tensor

from stateful_gpt.decoding import decoder_for, decodes
from stateful_gpt.feedback import Feedback, score_logits
from stateful_gpt.recompute import Said
from stateful_gpt.solving import Continuation, Drawn, draw
from stateful_gpt.stepping import Stepper

DECODES_ON = ("cuda",)  # where a step of the host costs more than one of the device


def continue_text(
    stepper: Stepper, feedback: Feedback, tokens: Tensor, said: Said, how: Continuation
) -> Drawn | None:
    """Draw tokens behind a settled text; all but the last of them are evaluated, too.

    Ends with the text, or before an estimate that is not finite. Keys and values of what has been
    evaluated are in the stepper's cache then.

    Args:
        tokens: (1, T) ids, all of them settled.
        said: of the last pass over them.

    Returns:
        None where this feedback or device is not covered, or no token could be drawn.
    """
    if feedback.of_hidden or how.most < 1:
        return None
    on_device = tokens.device.type in DECODES_ON
    if on_device and decodes(feedback):
        return _on_device(stepper, feedback, tokens, said, how)
    if stepper.one_at_a_time and not on_device:
        return _on_host(stepper, feedback, said, how, T=tokens.size(1))
    return None


def _on_device(
    stepper: Stepper, feedback: Feedback, tokens: Tensor, said: Said, how: Continuation
) -> Drawn | None:
    T, sampling, pairs = tokens.size(1), how.sampling, stepper.cache.pairs[:, :, 0]
    decoder = decoder_for(stepper.model, feedback, vocab_size=sampling.vocab_size)
    decoder.take_over(tokens[0], said.log_probs[0], said.state[0], pairs)
    samples = sampling.temperature is not None
    drawn = decoder.go_on(
        T,
        most=how.most,
        choose=partial(draw, sampling=sampling, generator=how.generator) if samples else None,
        end_token=sampling.end_token,
        tell=how.tell,
        generator=how.generator if samples else None,
    )
    if not drawn:
        return None
    end = T + len(drawn)
    decoder.give_back(pairs, T - 1, end - 1)
    stepper.cache.length = end - 1
    log_probs, estimates = decoder.log_probs[T:end], decoder.estimates[T:end]
    return Drawn(drawn, log_probs.clone(), estimates.clone())


@torch.inference_mode()
def _on_host(
    stepper: Stepper, feedback: Feedback, said: Said, how: Continuation, *, T: int
) -> Drawn | None:
    sampling, generator = how.sampling, how.generator
    samples = sampling.temperature is not None
    estimates, log_probs = (
        torch.cat([known, known.new_zeros(1, how.most)], dim=1)
        for known in (said.state, said.log_probs)
    )
    hidden = said.output[:, T - 1].clone()  # (1, C)
    drawn: list[int] = []
    for at in range(T, T + how.most):
        before = generator.get_state() if samples and generator is not None else None
        logits = stepper.logits(hidden)
        token = draw(logits, sampling, generator)  # (1,)
        scores = score_logits(logits, token)
        estimate = feedback.estimates(scores, hidden)
        if not math.isfinite(float(estimate)):
            if generator is not None and before is not None:
                generator.set_state(before)
            break
        estimates[0, at], log_probs[0, at] = estimate[0], scores.log_probs[0]
        drawn.append(int(token))
        how.tell(drawn[-1])
        if drawn[-1] == sampling.end_token or len(drawn) == how.most:
            break
        known = feedback.modulation(estimates[:, : at + 1])
        stepper.run(
            token[None],
            begin=at,
            out=hidden,
            key_bias=known.bias,
            key_factor=known.factor,
            layers=feedback.layers,
        )
    if not drawn:
        return None
    end = T + len(drawn)
    return Drawn(drawn, log_probs[0, T:end], estimates[0, T:end])
