"""Decoding on the device, run here on the CPU: the reference's numbers in float64."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt import decoding, windowed
from stateful_gpt.decoding import Decoder, decoder_for
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Generation, Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import Outcome, RecomputeConfig
from stateful_gpt.solving import Sampling
from stateful_gpt.windowed import Windowed

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


# --- handed over by generate --------------------------------------------------------------------


def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let generation go on by decoder on this device too; the tokens that each hand-over drew."""
    counts: list[int] = []
    go_on = Decoder.go_on

    def counted(decoder: Decoder, begin: int, **options: Any) -> list[int]:
        tokens = go_on(decoder, begin, **options)
        counts.append(len(tokens))
        return tokens

    monkeypatch.setattr(Decoder, "go_on", counted)
    monkeypatch.setattr(windowed, "DECODES_ON", ("cpu",))
    return counts


def both_ways(
    monkeypatch: pytest.MonkeyPatch, model: GPT, prompt: list[int], **options: Any
) -> tuple[Generation, Generation, list[int], list[list[int]]]:
    """The same generation token by token and by hand-over; what was drawn over, what was told."""
    told: list[list[int]] = []
    made = []
    options = {"feedback": Feedback(strength=0.5), "start": Start.CARRIED} | options
    options = {"config": RecomputeConfig(iterations=64), "solver": Windowed()} | options
    seed = options.pop("seed", None)
    counts: list[int] = []
    for over in (False, True):
        if over:
            counts = handed_over(monkeypatch)
        told.append([])
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        heard = told[-1]
        made.append(
            generate(
                model,
                [prompt],
                generator=generator,
                on_token=lambda row, token, heard=heard: heard.append(token),
                **options,
            )
        )
    return made[0], made[1], counts, told


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 10),
    new=st.integers(0, 50),
    feedback=st.sampled_from(FEEDBACKS),
    temperature=st.sampled_from([None, 0.9]),
    iterations=st.integers(1, 12),
    end=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_that_is_handed_over_goes_on_as_it_would_token_by_token(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    length: int,
    new: int,
    feedback: Feedback,
    temperature: float | None,
    iterations: int,
    end: bool,
) -> None:
    """Also past the block, up to an end token, and where the prompt settles late or never."""
    model, prompt = make_gpt(seed, n_layer=3, block_size=40), make_tokens(seed, 1, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "BUCKET", 16)
        plain, ours, counts, told = both_ways(
            patch,
            model,
            prompt[0].tolist(),
            max_new_tokens=new,
            feedback=feedback,
            config=RecomputeConfig(iterations=iterations),
            sampling=Sampling(
                temperature=temperature, top_k=5, vocab_size=11, end_token=3 if end else None
            ),
            seed=seed if temperature is not None else None,
        )
    assert ours.tokens == plain.tokens
    assert told[0] == told[1] == ours.tokens[0][length:]
    assert ours.outcomes == plain.outcomes
    assert ours.ended == plain.ended
    for a, b in ((ours.log_probs, plain.log_probs), (ours.estimates, plain.estimates)):
        assert (a[0] - b[0]).abs().max() <= EXACT
    if plain.outcomes[0][0] is Outcome.SETTLED and new and iterations > 2:
        assert counts, "it was handed over"


@pytest.mark.parametrize("temperature", [None, 0.9])
def test_a_text_that_diverges_is_left_to_the_passes(
    make_gpt: Make,
    make_tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float | None,
) -> None:
    model = make_gpt(7, block_size=60)
    with torch.no_grad():
        model.transformer.wpe.weight[27] = torch.nan  # reached in the second stride
    plain, ours, counts, told = both_ways(
        monkeypatch,
        model,
        make_tokens(1, 1, 6)[0].tolist(),
        max_new_tokens=40,
        sampling=Sampling(temperature=temperature),
        seed=1,
    )
    assert plain.outcomes[0][-1] is Outcome.DIVERGED
    assert counts[0] == decoding.STRIDE
    assert ours.outcomes == plain.outcomes
    assert ours.tokens == plain.tokens
    assert told[0] == told[1]


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
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_where_no_step_can_be_recorded_it_warns_once_and_goes_on(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(decoder: Decoder, part: str, keys: int) -> None:
        decoder._begin(torch.zeros(1, dtype=torch.long))  # as recording would
        decoder._parts[part](keys)
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
