"""Several texts drawn side by side: each ends where the model says so, none sees another."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import Sampling, Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig

Make = Callable[..., GPT]

END = 3
# float64 through two layers of width 16, logits of order 10, a recurrence of a dozen tokens
EXACT = 1e-9
FEEDBACKS = {
    "plain": Feedback(strength=0.0),
    "log_prob": Feedback(strength=0.5),
    "hidden": Feedback.of_kind("hidden_state", 0.5),
    "both": Feedback(strength=0.3, hidden_strength=0.5),
}


@pytest.mark.parametrize("name", FEEDBACKS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.2, 3.0))
def test_every_sample_has_a_fresh_state_and_ends_at_the_stop_token(
    make_gpt: Make, name: str, seed: int, temperature: float
) -> None:
    model, feedback = make_gpt(seed, vocab_size=7, hidden_feedback=True), FEEDBACKS[name]
    result = generate(
        model,
        [[END]] * 5,
        max_new_tokens=12,
        feedback=feedback,
        config=RecomputeConfig(iterations=16),
        start=Start.CARRIED,
        sampling=Sampling(temperature=temperature, end_tokens=[END]),
        generators=torch.Generator().manual_seed(seed),
    )
    for text, log_probs, ended in zip(result.tokens, result.log_probs, result.ended, strict=True):
        assert text[0] == END
        assert END not in text[1:-1], "nothing follows the stop token"
        assert ended == (len(text) > 1 and text[-1] == END)
        assert ended or len(text) == 13
        # what the model says of it is what it says of the same text alone, with nothing before
        alone = left_to_right(model, torch.tensor([text]), feedback)[0]
        assert (log_probs - alone).abs().max() <= EXACT
