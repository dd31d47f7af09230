"""What only a GPU can show: recorded steps, the flash kernel's bias, the windowed solver there.

python -m pytest -m gpu
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_gpt import decoding
from stateful_gpt.attention import key_columns, reference_attention, sdpa_attention
from stateful_gpt.decoding import Decoder, decoder_for
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import Start, generate
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import Outcome, RecomputeConfig
from stateful_gpt.solving import Sampling
from stateful_gpt.windowed import Windowed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]
EXACT = 1e-10  # nats, float64
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 600}
FEEDBACKS = [Feedback(strength=0.3), Feedback(FeedbackKind.LOGIT, 0.05, layers=(1,))]


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_recorded_step_reads_to_the_oracle_in_every_bucket(
    make_gpt: Make, make_tokens: Tokens, feedback: Feedback
) -> None:
    model, text = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 1, 600).cuda()
    decoder = Decoder(model, feedback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that it goes on without graphs
        decoder.run(text[0].tolist(), max_new_tokens=0)
    assert decoder.recorded
    assert (decoder.log_probs - left_to_right(model, text, feedback)[0]).abs().max() <= EXACT


@pytest.mark.parametrize(("temperature", "parts"), [(None, {"step"}), (0.8, {"evaluate", "take"})])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_generation_by_recorded_steps_is_that_of_full_passes(
    make_gpt: Make,
    make_tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    feedback: Feedback,
    temperature: float | None,
    parts: set[str],
) -> None:
    """With recordings made before and within the text."""
    monkeypatch.setattr(decoding, "BUCKET", 32)
    model, prompt = make_gpt(3, **SHAPE).cuda(), make_tokens(4, 1, 30)[0].tolist()
    warnings.simplefilter("error")  # pytest takes it back
    made = [
        generate(
            model,
            [prompt],
            max_new_tokens=70,
            feedback=feedback,
            config=RecomputeConfig(iterations=100, tolerance=1e-13),
            solver=solver,
            start=Start.CARRIED,
            sampling=Sampling(temperature=temperature),
            generator=torch.Generator("cuda").manual_seed(5),
        )
        for solver in (None, Windowed())
    ]
    assert made[0].tokens == made[1].tokens
    assert (made[0].log_probs[0] - made[1].log_probs[0]).abs().max() <= EXACT
    recorded = decoder_for(model, feedback, vocab_size=None)._graphs
    assert {part for part, _ in recorded} == parts
    assert {keys for _, keys in recorded} == {32, 64, 96, 128}


def test_a_recording_that_fails_leaves_the_device_as_it_was(
    make_gpt: Make, make_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 1, 60).cuda()
    take = Decoder._take

    def waits(decoder: Decoder, keys: int) -> None:
        take(decoder, keys)
        decoder.tokens.tolist()  # no recording can wait for the device

    monkeypatch.setattr(Decoder, "_take", waits)
    stream = torch.cuda.current_stream()
    decoder = Decoder(model, Feedback(strength=0.3))
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        decoder.run(text[0].tolist(), max_new_tokens=0)
    assert torch.cuda.current_stream() == stream
    oracle = left_to_right(model, text, Feedback(strength=0.3))[0]
    assert (decoder.log_probs[:60] - oracle).abs().max() <= EXACT


def test_one_recording_serves_every_strength(make_gpt: Make, make_tokens: Tokens) -> None:
    model, text = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 1, 60).cuda()
    for strength in (0.3, -0.2, 0.0):
        feedback = Feedback(strength=strength)
        decoder = decoder_for(model, feedback, vocab_size=None)
        decoder.run(text[0].tolist(), max_new_tokens=0)
        oracle = left_to_right(model, text, feedback)[0]
        assert (decoder.log_probs[:60] - oracle).abs().max() <= EXACT
    assert len(decoder._graphs) == 1


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
        solver=Windowed(),
        start=Start.CARRIED,
        sampling=Sampling(temperature=1.0),
        generator=torch.Generator("cuda").manual_seed(5),
    )
    assert result.outcomes[0][-1] is Outcome.DIVERGED
    assert torch.ones(3, device="cuda").sum().item() == 3.0


def test_the_flash_kernel_takes_the_bias_on_its_keys() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (
        torch.randn(2, 4, 200, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    bias = -8 * torch.rand(2, 200, generator=generator, device="cuda")
    columns = key_columns(bias, head_size=64, dtype=torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        fast = sdpa_attention(q, k, v, mask=columns, key_factor=None)
    exact = reference_attention(q.double(), k.double(), v.double(), mask=columns, key_factor=None)
    # outputs near 1 in bfloat16, whose weights are rounded, too
    assert (fast.double() - exact).abs().max() <= 0.03


@pytest.mark.parametrize("window", ["auto", "all", 1, 16])
def test_the_windowed_fixed_point_is_the_oracles(
    make_gpt: Make, make_tokens: Tokens, window: int | str
) -> None:
    model, text = make_gpt(1, **SHAPE).cuda(), make_tokens(2, 2, 90).cuda()
    feedback = Feedback(strength=0.3)
    result = generate(
        model,
        text.tolist(),
        max_new_tokens=0,
        feedback=feedback,
        config=RecomputeConfig(iterations=90),
        solver=Windowed(window),  # type: ignore[arg-type]
    )
    oracle = left_to_right(model, text, feedback).cpu()
    for row in (0, 1):
        assert (result.log_probs[row] - oracle[row]).abs().max() <= EXACT
