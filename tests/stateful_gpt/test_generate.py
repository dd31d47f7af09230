"""The modified generate: nanoGPT's at strength 0, and the literal loop of the method at others.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import (
    Generation,
    Sampling,
    Start,
    Watcher,
    Window,
    draw,
    generate,
)
from stateful_gpt.model import GPT
from stateful_gpt.recompute import Outcome, RecomputeConfig, Span
from stateful_gpt.scoring import TokenScores, score_tokens
from tests.recording import Recording

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
WrittenOut = Callable[..., Tensor]

# Two ways to compute a recursion of up to 12 tokens in float64, each rounding differently: the
# difference grows along the text, but stays far below this at strengths of at most 1.
RECURSION = 1e-10

ONE_PASS = RecomputeConfig(iterations=1)


def passes_of(count: int, *, damping: float = 1.0) -> RecomputeConfig:
    """So many passes over everything: the definition, to the letter."""
    return RecomputeConfig(iterations=count, tolerance=0, damping=damping)


def modulated(
    written_out: WrittenOut, model: GPT, window: list[int], feedback: Feedback, fed: Tensor
) -> Tensor:
    """(T, V) logits of a window whose tokens have these estimates."""
    tokens = torch.tensor(window)
    if feedback.kind is FeedbackKind.NONE:
        return written_out(model, tokens)
    if feedback.kind is FeedbackKind.PROB:
        factor = (feedback.strength * fed).exp()
        return written_out(model, tokens, key_factor=factor, layers=feedback.layers)
    return written_out(model, tokens, key_bias=feedback.strength * fed, layers=feedback.layers)


def literal_loop(
    written_out: WrittenOut,
    model: GPT,
    prompt: list[int],
    feedback: Feedback,
    *,
    new: int,
    passes: int,
    carried: bool,
    damping: float = 1.0,
    previous: list[float] | None = None,
    slide: int = 1,
) -> tuple[list[int], list[float], list[float]]:
    """The method, greedily, for one text: tokens, log-probabilities and estimates of all of it."""
    block = model.config.block_size
    text = list(prompt)
    estimates = list(previous) if previous is not None else [0.0] * len(text)
    log_probs = [0.0] * len(text)
    for step in range(new + 1):
        begin = 0
        while len(text) - begin > block:
            begin += min(slide, block)
        window = text[begin:]
        use_old = previous is not None if step == 0 else carried
        fed = torch.zeros(len(window), dtype=torch.float64)
        if use_old:
            fed = torch.tensor(estimates[begin:], dtype=torch.float64)
            fed[0] = 0.0  # nothing predicts the first token of a window: probability 1
        for _ in range(passes):
            logits = modulated(written_out, model, window, feedback, fed)
            said, raw = torch.zeros_like(fed), torch.zeros_like(fed)
            for j in range(1, len(window)):
                raw[j] = logits[j - 1, window[j]]
                said[j] = logits[j - 1].log_softmax(dim=0)[window[j]]
            unit = raw if feedback.kind is FeedbackKind.LOGIT else said
            fed = (1 - damping) * fed + damping * unit
        first = int(begin > 0)  # which nothing predicts any more keeps what was last said of it
        estimates[begin + first :] = unit.tolist()[first:]
        log_probs[begin + first :] = said.tolist()[first:]
        if step < new:
            token = int(logits[-1].argmax())
            text.append(token)
            log_prob = logits[-1].log_softmax(dim=0)[token].item()
            raw_logit = logits[-1, token].item()
            log_probs.append(log_prob)
            estimates.append(raw_logit if feedback.kind is FeedbackKind.LOGIT else log_prob)
    return text, log_probs, estimates


def nanogpt_loop(
    written_out: WrittenOut,
    model: GPT,
    prompt: list[int],
    *,
    new: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> list[int]:
    """nanoGPT's ``generate``, statement by statement."""
    text = list(prompt)
    for _ in range(new):
        cropped = text[-model.config.block_size :]
        logits = written_out(model, torch.tensor(cropped))[-1] / temperature
        if top_k is not None:
            kth = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
            logits[logits < kth] = -math.inf
        weights = (logits - logits.max()).exp()
        text.append(int(torch.multinomial(weights / weights.sum(), 1, generator=generator)))
    return text


# --- strength 0 ---------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 12),
    temperature=st.floats(0.3, 2.0),
    top_k=st.none() | st.integers(1, 40),
    kind=st.sampled_from(list(FeedbackKind)),
    start=st.sampled_from(list(Start)),
)
def test_zero_strength_samples_nanogpts_text_past_the_block(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    temperature: float,
    top_k: int | None,
    kind: FeedbackKind,
    start: Start,
) -> None:
    model = make_gpt(seed, block_size=8)
    prompt = make_tokens(seed + 1, 1, length)[0].tolist()
    result = generate(
        model,
        [prompt],
        max_new_tokens=10,
        feedback=Feedback(kind, 0.0),
        config=passes_of(2),
        start=start,
        sampling=Sampling(temperature=temperature, top_k=top_k),
        generators=torch.Generator().manual_seed(seed),
    )
    assert result.tokens[0] == nanogpt_loop(
        written_out,
        model,
        prompt,
        new=10,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("kind", list(FeedbackKind))
@pytest.mark.parametrize("strength", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", list(Start))
def test_zero_strength_is_the_plain_model_bit_for_bit(
    make_gpt: Make,
    make_tokens: Tokens,
    kind: FeedbackKind,
    strength: float,
    dtype: torch.dtype,
    start: Start,
) -> None:
    model = make_gpt(3, block_size=8, dtype=dtype)
    prompts = make_tokens(4, 2, 5).tolist()
    plain_prompts = torch.tensor(prompts)

    for step in range(6):  # the plain model, greedily
        window = plain_prompts[:, -8:]
        with torch.no_grad():
            hidden = model(window)
        token = (hidden[:, -1] @ model.lm_head.weight.T).argmax(dim=1)
        if step < 5:
            plain_prompts = torch.cat([plain_prompts, token[:, None]], dim=1)
    with torch.no_grad():
        logits = model.lm_head(model(plain_prompts[:, -8:])[:, :-1].flatten(0, 1))
    wanted = plain_prompts[:, -7:].flatten()
    plain = logits.log_softmax(dim=1).gather(1, wanted[:, None]).squeeze(1)

    seen = Recording(model)
    result = generate(
        model,
        prompts,
        max_new_tokens=5,
        feedback=Feedback(kind, strength),
        config=passes_of(3),
        start=start,
        watch=seen,
    )
    assert result.tokens == plain_prompts.tolist()
    with torch.no_grad():
        last = model(plain_prompts[:, -8:])
    assert len(seen.passes[-1]) == 3
    assert all(torch.equal(one.hidden, last) for one in seen.passes[-1])
    log_probs = torch.stack(result.log_probs)[:, -7:]
    assert torch.equal(log_probs, plain.view(2, 7))


def test_kind_none_ignores_its_strength(make_gpt: Make, make_tokens: Tokens) -> None:
    model, prompts = make_gpt(3), make_tokens(4, 1, 5).tolist()
    results = [
        generate(
            model,
            prompts,
            max_new_tokens=4,
            feedback=Feedback(FeedbackKind.NONE, strength),
            config=passes_of(3),
        )
        for strength in (0.0, 5.0)
    ]
    assert results[0].tokens == results[1].tokens
    assert torch.equal(results[0].log_probs[0], results[1].log_probs[0])


# --- the literal loop ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    new=st.integers(0, 6),
    passes=st.integers(1, 3),
    kind=st.sampled_from(list(FeedbackKind)),
    strength=st.floats(-0.5, 0.8),
    damping=st.sampled_from([1.0, 0.5]),
    start=st.sampled_from(list(Start)),
    layers=st.none() | st.frozensets(st.integers(0, 1)),
    with_previous=st.booleans(),
    slide=st.sampled_from([1, 2, 3, 7, 50]),
)
def test_generation_is_the_literal_loop_with_cropping(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    new: int,
    passes: int,
    kind: FeedbackKind,
    strength: float,
    damping: float,
    start: Start,
    layers: frozenset[int] | None,
    with_previous: bool,
    slide: int,
) -> None:
    model = make_gpt(seed, block_size=7)
    prompt = make_tokens(seed + 1, 1, length)[0].tolist()
    generator = torch.Generator().manual_seed(seed + 2)
    previous = -6 * torch.rand(length, generator=generator, dtype=torch.float64)
    feedback = Feedback(kind, strength, layers)
    tokens, log_probs, estimates = literal_loop(
        written_out,
        model,
        prompt,
        feedback,
        new=new,
        passes=passes,
        carried=start is Start.CARRIED,
        damping=damping,
        previous=previous.tolist() if with_previous else None,
        slide=slide,
    )
    result = generate(
        model,
        [prompt],
        max_new_tokens=new,
        feedback=feedback,
        config=passes_of(passes, damping=damping),
        start=start,
        previous=[previous] if with_previous else None,
        slide=slide,
    )
    assert result.tokens == [tokens]
    assert len(result.log_probs[0]) == len(result.estimates[0]) == len(tokens)
    assert len(result.outcomes[0]) == new + 1
    for ours, theirs in ((result.log_probs, log_probs), (result.estimates, estimates)):
        # tokens left behind by a cropped window that never was recomputed are compared too
        begin = 0
        while length - begin > 7:
            begin += min(slide, 7)
        assert (ours[0] - torch.tensor(theirs, dtype=torch.float64))[
            begin:
        ].abs().max() <= RECURSION


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    slide=st.integers(1, 12),
)
def test_a_full_window_slides_by_whole_steps(
    make_gpt: Make, make_tokens: Tokens, seed: int, lengths: list[int], slide: int
) -> None:
    model = make_gpt(seed, block_size=6)
    prompts = [make_tokens(seed + i, 1, n)[0].tolist() for i, n in enumerate(lengths)]
    windows: list[Window] = []
    generate(
        model,
        prompts,
        max_new_tokens=9,
        feedback=Feedback(strength=0.3),
        config=passes_of(1),
        slide=slide,
        watch=windows.append,
    )
    step = min(slide, 6)
    for window in windows:
        for row, start, length in zip(window.rows, window.starts, window.lengths, strict=True):
            assert start % step == 0
            assert start + length == len(prompts[row]) + window.step
            assert length <= 6
            assert start == 0 or length > 6 - step, "it dropped no more than it had to"
            if slide == 1:
                assert start == max(0, start + length - 6)  # nanoGPT's cropping


# --- exactness ----------------------------------------------------------------------------------


def next_token_logits_at_the_fixed_point(
    written_out: WrittenOut, model: GPT, text: list[int], feedback: Feedback
) -> tuple[list[float], Tensor]:
    """Estimates of a text in reading order, and the (V,) logits that follow from all of them."""
    fed = torch.zeros(len(text), dtype=torch.float64)
    log_probs = [0.0]
    for j in range(1, len(text) + 1):
        logits = modulated(written_out, model, text[:j], feedback, fed[:j])[-1]
        if j == len(text):
            return log_probs, logits
        log_probs.append(logits.log_softmax(dim=0)[text[j]].item())
        fed[j] = logits[text[j]] if feedback.kind is FeedbackKind.LOGIT else log_probs[j]
    raise AssertionError


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 6),
    kind=st.sampled_from([FeedbackKind.LOG_PROB, FeedbackKind.LOGIT, FeedbackKind.PROB]),
    strength=st.floats(-0.3, 0.8),
)
def test_carried_over_a_settled_prefix_one_pass_a_token_is_exact(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    kind: FeedbackKind,
    strength: float,
) -> None:
    model = make_gpt(seed, block_size=12)
    prompt = make_tokens(seed + 1, 1, length)[0].tolist()
    feedback = Feedback(kind, strength)
    settled = generate(
        model,
        [prompt],
        max_new_tokens=0,
        feedback=feedback,
        config=passes_of(length),
    )
    result = generate(
        model,
        [prompt],
        max_new_tokens=5,
        feedback=feedback,
        config=ONE_PASS,
        start=Start.CARRIED,
        previous=settled.estimates,
    )
    text = result.tokens[0]
    expected, _ = next_token_logits_at_the_fixed_point(written_out, model, text, feedback)
    assert (
        result.log_probs[0] - torch.tensor(expected, dtype=torch.float64)
    ).abs().max() <= RECURSION
    for t in range(length, len(text)):
        _, logits = next_token_logits_at_the_fixed_point(written_out, model, text[:t], feedback)
        assert text[t] == int(logits.argmax())


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 6),
    kind=st.sampled_from([FeedbackKind.LOG_PROB, FeedbackKind.LOGIT, FeedbackKind.PROB]),
    strength=st.floats(-0.3, 0.8),
    start=st.sampled_from(list(Start)),
)
def test_a_token_is_drawn_at_the_fixed_point_once_its_prefix_has_settled(
    make_gpt: Make,
    make_tokens: Tokens,
    written_out: WrittenOut,
    seed: int,
    length: int,
    kind: FeedbackKind,
    strength: float,
    start: Start,
) -> None:
    # The last position's own estimate modulates its own query, so the distribution that a token is
    # drawn from is final one pass after the estimates that are reported are.
    model = make_gpt(seed, block_size=12)
    prompt = make_tokens(seed + 1, 1, length)[0].tolist()
    feedback = Feedback(kind, strength)
    seen = Recording(model)
    result = generate(
        model,
        [prompt],
        max_new_tokens=4,
        feedback=feedback,
        config=RecomputeConfig(iterations=64),
        start=start,
        watch=seen,
    )
    assert set(result.outcomes[0]) == {Outcome.SETTLED}
    for step, passes in enumerate(seen.passes[:-1]):  # nothing is drawn from the last
        hidden = passes[-1].hidden[0, -1]
        text = result.tokens[0][: length + step]
        _, logits = next_token_logits_at_the_fixed_point(written_out, model, text, feedback)
        with torch.no_grad():
            assert (hidden @ model.lm_head.weight.T - logits).abs().max() <= RECURSION


def test_a_fixed_text_is_a_generation_of_no_tokens(
    make_gpt: Make, make_tokens: Tokens, written_out: WrittenOut
) -> None:
    model, text = make_gpt(5), make_tokens(6, 1, 12)[0].tolist()
    feedback = Feedback(strength=0.8)
    seen = Recording(model)
    result = generate(
        model,
        [text],
        max_new_tokens=0,
        feedback=feedback,
        config=passes_of(20),
        watch=seen,
    )
    expected, _ = next_token_logits_at_the_fixed_point(written_out, model, text, feedback)
    assert result.tokens == [text]
    assert (
        result.log_probs[0] - torch.tensor(expected, dtype=torch.float64)
    ).abs().max() <= RECURSION
    assert [one.number for one in seen.passes[0]] == list(range(1, 21))
    window = seen.windows[0]
    assert (window.step, window.rows, window.starts, window.lengths) == (0, [0], [0], [12])
    assert window.tokens.tolist() == [text]


# --- batches ------------------------------------------------------------------------------------


def assert_same(together: Generation, row: int, alone: Generation) -> None:
    assert together.tokens[row] == alone.tokens[0]
    assert together.outcomes[row] == alone.outcomes[0]
    assert together.ended[row] == alone.ended[0]
    for ours, theirs in (
        (together.log_probs[row], alone.log_probs[0]),
        (together.estimates[row], alone.estimates[0]),
    ):
        assert ours.shape == theirs.shape
        # float64; matrices of another shape are summed in another order
        assert (ours - theirs).abs().max() <= RECURSION


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 11), min_size=2, max_size=4),
    start=st.sampled_from(list(Start)),
    kind=st.sampled_from([FeedbackKind.LOG_PROB, FeedbackKind.PROB]),
    tolerance=st.sampled_from([0, "auto", 1e-2]),
)
def test_prompts_of_different_lengths_give_what_each_gives_alone(
    make_gpt: Make,
    make_tokens: Tokens,
    seed: int,
    lengths: list[int],
    start: Start,
    kind: FeedbackKind,
    tolerance: float | str,
) -> None:
    model = make_gpt(seed, block_size=8)
    prompts = [make_tokens(seed + i, 1, length)[0].tolist() for i, length in enumerate(lengths)]
    # an end token that is likely to be drawn by some of the rows: what the first one draws
    first = generate(
        model,
        prompts[:1],
        max_new_tokens=2,
        feedback=Feedback(kind, 0.4),
        config=RecomputeConfig(iterations=4, tolerance=tolerance),
        start=start,
    )

    def run(some: Sequence[Sequence[int]]) -> Generation:
        return generate(
            model,
            some,
            max_new_tokens=5,
            feedback=Feedback(kind, 0.4),
            config=RecomputeConfig(iterations=4, tolerance=tolerance),
            start=start,
            sampling=Sampling(end_tokens=[first.tokens[0][-1]]),
        )

    together = run(prompts)
    assert together.ended[0]
    for row, prompt in enumerate(prompts):
        assert_same(together, row, run([prompt]))


# --- drawing ------------------------------------------------------------------------------------


def test_the_end_token_ends_its_text_alone(make_gpt: Make, make_tokens: Tokens) -> None:
    model = make_gpt(11)
    prompts = [make_tokens(12, 1, 4)[0].tolist(), make_tokens(13, 1, 6)[0].tolist()]
    drawn: list[tuple[int, int]] = []

    def run(end: int | None) -> Generation:
        drawn.clear()
        return generate(
            model,
            prompts,
            max_new_tokens=6,
            feedback=Feedback(strength=0.5),
            config=passes_of(3),
            sampling=Sampling(end_tokens=[end]),
            on_token=lambda row, token: drawn.append((row, token)),
        )

    free = run(None)
    assert free.ended == [False, False]
    end = free.tokens[0][6]  # the third token that row 0 draws
    expected = []
    for row, prompt in enumerate(prompts):
        new = free.tokens[row][len(prompt) :]
        expected.append(prompt + (new[: new.index(end) + 1] if end in new else new))
    result = run(end)
    assert result.tokens == expected
    assert result.ended == [
        end in text[len(p) :] for p, text in zip(prompts, expected, strict=True)
    ]
    for row, text in enumerate(expected):
        assert [token for r, token in drawn if r == row] == text[len(prompts[row]) :]
        assert len(result.log_probs[row]) == len(text)
        assert len(result.outcomes[row]) == len(text) - len(prompts[row]) + 1


def test_ids_of_a_padded_vocabulary_are_never_drawn(make_gpt: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(64, 23, dtype=torch.float64)
    logits[:, 20:] = 50.0  # the padding would win every draw
    for temperature in (None, 1.0):
        ids = draw(logits, Sampling(temperature=temperature, vocab_size=20), generator)
        assert int(ids.max()) < 20
    assert int(draw(logits, Sampling(vocab_size=99), None).min()) >= 20
    # in a whole generation too, where the unfiltered model would draw them
    model = make_gpt(3, tied=False)
    with torch.no_grad():
        model.lm_head.weight[:5] *= 0.01
    settings = {
        "max_new_tokens": 8,
        "feedback": Feedback(strength=0.3),
        "config": passes_of(2),
    }
    free = generate(model, [[1]], **settings)
    assert max(free.tokens[0]) >= 5
    bound = generate(model, [[1]], sampling=Sampling(vocab_size=5), **settings)
    assert max(bound.tokens[0]) < 5


@given(seed=st.integers(0, 2**31), k=st.integers(1, 30), temperature=st.floats(0.1, 3.0))
def test_top_k_draws_from_the_k_most_likely(seed: int, k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(20, generator=generator, dtype=torch.float64)
    ids = draw(row.expand(200, 20), Sampling(temperature=temperature, top_k=k), generator)
    best = row.argsort(descending=True)[: min(k, 20)].tolist()
    assert set(ids.tolist()) <= set(best)


def test_draws_follow_the_tempered_probabilities() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    n = 20_000
    ids = draw(row.expand(n, 4), Sampling(temperature=0.7), torch.Generator().manual_seed(0))
    counted = torch.bincount(ids, minlength=4) / n
    # five standard deviations of a fraction of n draws: 5 * 0.5 / sqrt(20000)
    assert (counted - (row / 0.7).softmax(dim=0)).abs().max() <= 0.018


def test_estimates_are_of_the_unfiltered_model_at_temperature_one(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, prompt = make_gpt(3), make_tokens(4, 1, 4)[0].tolist()
    result = generate(
        model,
        [prompt],
        max_new_tokens=6,
        feedback=Feedback(FeedbackKind.NONE),
        config=ONE_PASS,
        sampling=Sampling(temperature=0.2, top_k=2),
        generators=torch.Generator().manual_seed(0),
    )
    text = torch.tensor(result.tokens)
    with torch.no_grad():
        plain = model.logits(model.read(text))[0].log_softmax(dim=1)
    wanted = plain[:-1].gather(1, text[0, 1:, None]).squeeze(1)
    assert (result.log_probs[0][1:] - wanted).abs().max() <= 1e-11  # rounding in float64


def test_the_same_generator_state_draws_the_same_text(make_gpt: Make) -> None:
    model = make_gpt(3)

    def run(seed: int) -> list[list[int]]:
        return generate(
            model,
            [[1, 2, 3], [4]],
            max_new_tokens=10,
            feedback=Feedback(strength=0.5),
            config=passes_of(3),
            sampling=Sampling(temperature=1.0),
            generators=torch.Generator().manual_seed(seed),
        ).tokens

    before = torch.random.get_rng_state()
    assert run(1) == run(1)
    assert run(1) != run(2)
    assert torch.equal(torch.random.get_rng_state(), before)  # the library seeds nothing global


def test_the_given_prompts_and_estimates_are_left_alone(make_gpt: Make) -> None:
    prompts, previous = [[1, 2, 3]], [torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64)]
    result = generate(
        make_gpt(3),
        prompts,
        max_new_tokens=2,
        feedback=Feedback(),
        config=ONE_PASS,
        previous=previous,
    )
    assert prompts == [[1, 2, 3]]
    assert previous[0].tolist() == [0.0, -1.0, -2.0]
    assert result.tokens[0][:3] == [1, 2, 3]


def test_windows_slide_and_say_where_they_are(make_gpt: Make) -> None:
    windows: list[Window] = []
    result = generate(
        make_gpt(3, block_size=4),
        [[1, 2, 3], [4, 5, 6, 7, 8, 9]],
        max_new_tokens=3,
        feedback=Feedback(),
        config=ONE_PASS,
        watch=windows.append,  # returns None: nobody observes the passes
    )
    assert [w.step for w in windows] == [0, 1, 2, 3]
    assert [w.starts for w in windows] == [[0, 2], [0, 3], [1, 4], [2, 5]]
    assert [w.lengths for w in windows] == [[3, 4], [4, 4], [4, 4], [4, 4]]
    for window in windows:
        for row in (0, 1):
            begin, length = window.starts[row], window.lengths[row]
            assert (
                window.tokens[row, :length].tolist() == result.tokens[row][begin : begin + length]
            )


def test_a_watcher_may_score_tokens_in_its_own_way(make_gpt: Make, make_tokens: Tokens) -> None:
    model, text = make_gpt(3), make_tokens(4, 1, 6)
    plain = score_tokens(model, model.read(text), text).log_probs.detach()

    def certain(hidden: Tensor, tokens: Tensor, span: Span) -> TokenScores:
        ones = hidden.new_zeros(len(tokens), tokens[:, span.begin + 1 : span.end + 1].size(1))
        return TokenScores(log_probs=ones, logits=ones)

    result = generate(
        model,
        text.tolist(),
        max_new_tokens=0,
        feedback=Feedback(strength=0.5),
        config=RecomputeConfig(),
        watch=lambda _: Watcher(lambda _: None, certain),
    )
    assert bool((plain[0, 1:] < 0).all())
    assert bool((result.log_probs[0] == 0).all())


def overflowing(make_gpt: Make) -> tuple[GPT, list[int], list[int]]:
    """A float32 model, a text that it expects, and one that it finds all but impossible.

    At strength -1e37 what is added to scores of the second text overflows float32, as its tokens
    have log-probabilities around -100; the first text's stay finite.
    """
    model = make_gpt(3, tied=False, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        expected, surprising = [1], [1]
        for _ in range(5):
            expected.append(int(model.lm_head(model(torch.tensor([expected])))[0, -1].argmax()))
            surprising.append(int(model.lm_head(model(torch.tensor([surprising])))[0, -1].argmin()))
    return model, expected, surprising


DIVERGING = {
    "feedback": Feedback(FeedbackKind.LOG_PROB, -1e37),
    "config": RecomputeConfig(iterations=8, tolerance=1e-6),
}


def test_a_diverging_text_says_so_and_harms_no_other(make_gpt: Make) -> None:
    model, expected, surprising = overflowing(make_gpt)
    text = expected[:3]
    result = generate(model, [text, surprising[:3]], max_new_tokens=0, **DIVERGING)
    alone = generate(model, [text], max_new_tokens=0, **DIVERGING)
    assert result.outcomes == [[Outcome.SETTLED], [Outcome.DIVERGED]]
    assert alone.outcomes == [[Outcome.SETTLED]]
    # float32, logits of up to about 100: 2**-24 * 100 = 6e-6, a few times over
    assert (result.log_probs[0] - alone.log_probs[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("strength", [-2.0, -8.0])
def test_factors_that_would_overflow_are_bounded(make_gpt: Make, strength: float) -> None:
    model, expected, surprising = overflowing(make_gpt)
    result = generate(
        model,
        [expected[:3], surprising[:3]],
        max_new_tokens=0,
        feedback=Feedback(FeedbackKind.PROB, strength),
        config=RecomputeConfig(iterations=8),
    )
    assert result.outcomes == [[Outcome.SETTLED], [Outcome.SETTLED]]
    assert all(bool(values.isfinite().all()) for values in result.log_probs)


def test_what_padding_would_say_cannot_make_a_text_diverge(make_gpt: Make) -> None:
    model, expected, _ = overflowing(make_gpt)
    text, longer = expected[:4], expected[:6]
    alone = generate(model, [text], max_new_tokens=0, **DIVERGING)
    together = generate(model, [text, longer], max_new_tokens=0, **DIVERGING)
    assert alone.outcomes[0] == together.outcomes[0] != [Outcome.DIVERGED]
    assert (together.log_probs[0] - alone.log_probs[0]).abs().max() <= 1e-4  # float32, as above


@pytest.mark.parametrize("start", list(Start))
@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("window", [None, "auto"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4]], [[1, 2, 3]]])
def test_a_text_that_diverges_while_it_grows_ends_without_an_exception(
    make_gpt: Make,
    start: Start,
    temperature: float | None,
    window: str | None,
    prompts: list[list[int]],
) -> None:
    model = make_gpt(3)
    with torch.no_grad():
        model.transformer.wpe.weight[5] = math.nan  # any text of six tokens
    result = generate(
        model,
        prompts,
        max_new_tokens=8,
        feedback=Feedback(strength=0.5),
        config=RecomputeConfig(iterations=8, tolerance=1e-6, window=window),
        start=start,
        sampling=Sampling(temperature=temperature),
        generators=torch.Generator().manual_seed(0),
    )
    for row in range(len(prompts)):
        assert Outcome.DIVERGED in result.outcomes[row]
        assert len(result.log_probs[row]) == len(result.tokens[row])
        assert all(0 <= token < 23 for token in result.tokens[row])


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "previous", "words"),
    [
        ([[]], None, "at least one token"),
        ([[1], []], None, "at least one token"),
        ([[1, 23]], None, "from 0 to 22, got 23"),
        ([[1, -1]], None, "from 0 to 22, got -1"),
        ([[1, 2]], [torch.zeros(3)], "one estimate for every token"),
        ([[1, 2]], [], "one estimate for every token"),
        ([[1, 2]], [torch.zeros(2, 1)], "as wide as those of this feedback"),
    ],
)
def test_impossible_prompts_are_refused(
    make_gpt: Make, prompts: list[list[int]], previous: list[Tensor] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        generate(
            make_gpt(1),
            prompts,
            max_new_tokens=1,
            feedback=Feedback(),
            config=ONE_PASS,
            previous=previous,
        )


@pytest.mark.parametrize(("name", "least"), [("slide", 1), ("max_new_tokens", 0)])
def test_counts_have_a_least(make_gpt: Make, name: str, least: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 1, name: least - 1}
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        generate(make_gpt(1), [[1]], feedback=Feedback(), config=ONE_PASS, **options)


def test_a_start_may_be_named(make_gpt: Make) -> None:
    def grown(start: Any) -> Tensor:
        options: dict[str, Any] = {"feedback": Feedback(), "config": ONE_PASS, "start": start}
        return generate(make_gpt(1), [[1, 2, 3]], max_new_tokens=3, **options).log_probs[0]

    assert torch.equal(grown("carried"), grown(Start.CARRIED))
    assert not torch.equal(grown("carried"), grown("cold"))
    with pytest.raises(ValueError, match="'warm' is not a valid Start"):
        grown("warm")


def test_every_prompt_has_a_generator_where_there_are_several(make_gpt: Make) -> None:
    with pytest.raises(ValueError, match="2 prompts need as many generators, got 1"):
        generate(
            make_gpt(1),
            [[1], [2]],
            max_new_tokens=1,
            feedback=Feedback(),
            config=ONE_PASS,
            generators=[torch.Generator()],
        )


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"temperature": 0.0}, r"temperature must be above 0 \(None: greedy\)"),
        ({"temperature": -1.0}, r"got -1\.0"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": 1.0, "top_k": 0}, r"top_k must be at least 1 \(None: all\)"),
        ({"vocab_size": -1}, r"vocab_size must be at least 1 \(None: all\), got -1"),
    ],
)
def test_a_sampling_that_cannot_draw_is_refused(chosen: dict[str, Any], words: str) -> None:
    # at a temperature of 0 any token would be drawn, not the most likely one
    with pytest.raises(ValueError, match=words):
        Sampling(**chosen)
