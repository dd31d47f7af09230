"""What only a GPU can show: that the same promises hold of its kernels.

python -m pytest -m gpu
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Sampling, Start, generate
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import Outcome, RecomputeConfig
from stateful_gpt.scoring import Predictions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
EXACT = 1e-10  # nats, float64
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 600}
FEEDBACKS = [Feedback(strength=0.3), Feedback(FeedbackKind.LOGIT, 0.05, layers=(1,))]


@pytest.mark.parametrize("temperature", [None, 0.8])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_generation_over_cached_keys_is_that_of_full_passes(
    make_gpt: Make, make_tokens: Tokens, feedback: Feedback, temperature: float | None
) -> None:
    model, prompt = make_gpt(3, **SHAPE).cuda(), make_tokens(4, 1, 30)[0].tolist()
    made = [
        generate(
            model,
            [prompt],
            max_new_tokens=70,
            feedback=feedback,
            config=config,
            start=Start.CARRIED,
            sampling=Sampling(temperature=temperature),
            generators=torch.Generator("cuda").manual_seed(5),
        )
        for config in (RecomputeConfig(40, tolerance=0), RecomputeConfig(101))
    ]
    assert made[0].tokens == made[1].tokens
    assert (made[0].log_probs[0] - made[1].log_probs[0]).abs().max() <= EXACT


def test_a_text_that_diverges_ends_and_the_device_lives_on(
    make_gpt: Make, make_tokens: Tokens
) -> None:
    model, prompt = make_gpt(7, **SHAPE).cuda(), make_tokens(1, 1, 6)[0].tolist()
    with torch.no_grad():
        model.transformer.wpe.weight[27] = torch.nan
    result = generate(
        model,
        [prompt],
        max_new_tokens=60,
        feedback=Feedback(strength=0.3),
        config=RecomputeConfig(iterations=64),
        start=Start.CARRIED,
        sampling=Sampling(temperature=1.0),
        generators=torch.Generator("cuda").manual_seed(5),
    )
    assert result.outcomes[0][-1] is Outcome.DIVERGED
    assert torch.ones(3, device="cuda").sum().item() == 3.0


@pytest.mark.parametrize("cached", [0, 150])
def test_in_16_bits_a_bias_acts_as_in_64(make_gpt: Make, make_tokens: Tokens, cached: int) -> None:
    model, tokens = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 2, 200).cuda()
    bias = -8 * torch.rand(2, 200, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    with torch.no_grad():
        exact = model.read(tokens, modulation=Modulation(bias=bias))
        half = make_gpt(1, **SHAPE, dtype=torch.bfloat16).cuda()
        cache = half.new_cache(batch=2, capacity=200)
        pieces = [
            half.read(tokens[:, begin:end], modulation=Modulation(bias=bias[:, :end]), cache=cache)
            for begin, end in ((0, cached), (cached, 200))
            if end > begin
        ]
    ours = torch.cat(pieces, dim=1).double()
    # normed states of order 1, with 8 bits for weights, keys and sums: in the mean some per cent
    assert (ours - exact).abs().mean() <= 0.1


@torch.no_grad()
def test_predictions_follow_rows_that_leave(make_gpt: Make, make_tokens: Tokens) -> None:
    model, tokens = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 3, 90).cuda()
    chance = torch.Generator("cuda").manual_seed(3)
    first, second, third = torch.randn(
        3, 3, 90, 64, generator=chance, device="cuda", dtype=torch.float64
    )
    predictions = Predictions(model, batch=3, length=90)
    predictions.score(first, tokens, begin=0, first=True)
    predictions.keep([0, 2])
    rows = torch.tensor([0, 2], device="cuda")
    predictions.score(second[rows, 30:], tokens[rows], begin=30, first=False)
    predictions.score(third[rows, 30:], tokens[rows], begin=30, first=False)
    log_p, log_q = (model.logits(x[rows, 30:]).log_softmax(dim=2) for x in (second, third))
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=2)
    assert (predictions.kl_step[:, 30:] - expected).abs().max() <= EXACT


@pytest.mark.parametrize("window", [None, "auto", "all", 1, 16])
def test_the_fixed_point_is_the_oracles_whatever_the_window(
    make_gpt: Make, make_tokens: Tokens, window: int | str | None
) -> None:
    model, text = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 2, 90).cuda()
    feedback = Feedback(strength=0.3)
    result = generate(
        model,
        text.tolist(),
        max_new_tokens=0,
        feedback=feedback,
        config=RecomputeConfig(90, window=window),  # type: ignore[arg-type]
    )
    oracle = left_to_right(model, text, feedback).cpu()
    for row in (0, 1):
        assert (result.log_probs[row] - oracle[row]).abs().max() <= EXACT
