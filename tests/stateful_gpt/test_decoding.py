"""Decoding on the device, run here on the CPU: the reference's numbers in float64."""

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_gpt import decoding
from stateful_gpt.decoding import Decoder, decoder_for
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
EXACT = 1e-10  # nats, float64
FEEDBACKS = [
    Feedback(strength=0.6),
    Feedback(strength=-0.4, layers=(1,)),
    Feedback(FeedbackKind.LOGIT, 0.3),
    Feedback(FeedbackKind.NONE),
]


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_text_that_is_read_ends_at_the_oracle(
    make_gpt: Make,
    make_tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    feedback: Feedback,
    bias: bool,
) -> None:
    monkeypatch.setattr(decoding, "BUCKET", 8)  # steps of different shapes
    model, text = make_gpt(3, n_layer=3, bias=bias, block_size=20), make_tokens(4, 1, 20)
    decoder = Decoder(model, feedback)
    read = decoder.run(text[0].tolist(), max_new_tokens=0)
    assert torch.equal(read, text[0])
    assert (decoder.log_probs - left_to_right(model, text, feedback)[0]).abs().max() <= EXACT


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_what_it_draws_is_the_reference_generation(
    make_gpt: Make, make_tokens: Tokens, feedback: Feedback
) -> None:
    model = make_gpt(5, block_size=24)
    decoder = Decoder(model, feedback)
    for seed in (1, 2):  # the second text finds nothing of the first
        prompt = make_tokens(seed, 1, 5)[0].tolist()
        full = generate(
            model,
            [prompt],
            max_new_tokens=15,
            feedback=feedback,
            config=RecomputeConfig(iterations=24),
            start=Start.CARRIED,
        )
        tokens = decoder.run(prompt, max_new_tokens=15)
        assert tokens.tolist() == full.tokens[0]
        assert (decoder.log_probs[:20] - full.log_probs[0]).abs().max() <= EXACT


def test_what_it_does_not_cover_is_refused(make_gpt: Make) -> None:
    model = make_gpt(1)
    for feedback in (Feedback(FeedbackKind.PROB), Feedback(hidden_strength=1.0)):
        with pytest.raises(ValueError, match="covers the feedback of log_prob, logit and none"):
            Decoder(model, feedback)
    with pytest.raises(ValueError, match=r"must have 1 to 16 tokens, got 17"):
        Decoder(model, Feedback()).run([1], max_new_tokens=16)
    with pytest.raises(ValueError, match=r"must have 1 to 16 tokens"):
        Decoder(model, Feedback()).run([], max_new_tokens=1)


def test_one_decoder_serves_a_sweep_and_none_outlives_its_model(make_gpt: Make) -> None:
    model = make_gpt(1)
    first = decoder_for(model, Feedback(strength=0.5), vocab_size=None)
    assert decoder_for(model, Feedback(strength=-1.0), vocab_size=None) is first
    assert first.strength == -1.0
    assert decoder_for(model, Feedback(FeedbackKind.NONE, 3.0), vocab_size=None).strength == 0.0
    assert decoder_for(model, Feedback(FeedbackKind.LOGIT), vocab_size=None) is not first
    again = decoder_for(model, Feedback(), vocab_size=None)
    model.double() if model.lm_head.weight.dtype == torch.float32 else model.float()
    assert decoder_for(model, Feedback(), vocab_size=None) is not again, "other weights"
    gone, old = weakref.ref(model), weakref.ref(again)
    gc.collect()
    gc.disable()  # what memory a device has must not wait for a collection
    try:
        del first, again
        assert old() is None
    finally:
        gc.enable()
    del model
    gc.collect()  # a model itself may be cyclic
    assert gone() is None


def test_where_no_step_can_be_recorded_it_warns_once_and_goes_on(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(decoder: Decoder, part: str, keys: int) -> None:
        decoder._begin(torch.zeros(1, dtype=torch.long))  # as recording would
        decoder._run(part, keys)
        raise RuntimeError("operation not permitted\n when stream is capturing")

    monkeypatch.setattr(Decoder, "_record", fail)
    model, text = make_gpt(3, block_size=20), make_tokens(4, 1, 20)
    decoder = Decoder(model, Feedback(strength=0.5))
    decoder.recorded = True
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted when"):
        decoder.run(text[0].tolist(), max_new_tokens=0)
    oracle = left_to_right(model, text, Feedback(strength=0.5))[0]
    assert (decoder.log_probs - oracle).abs().max() <= EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.run(text[0].tolist(), max_new_tokens=0)


def test_a_text_that_was_no_number_leaves_nothing_to_the_next(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, feedback = make_gpt(2, block_size=20), Feedback(strength=0.5)
    with torch.no_grad():
        model.transformer.wpe.weight[15] = torch.nan
    decoder = Decoder(model, feedback)
    decoder.run(make_tokens(1, 1, 20)[0].tolist(), max_new_tokens=0)
    assert decoder.log_probs.isnan().any()
    text = make_tokens(2, 1, 12)
    decoder.run(text[0].tolist(), max_new_tokens=0)
    assert (decoder.log_probs[:12] - left_to_right(model, text, feedback)[0]).abs().max() <= EXACT
