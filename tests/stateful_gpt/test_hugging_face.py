"""Models of transformers behind the face: the same statements as of GPT, in float64."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stateful_gpt.checkpoint import CheckpointError
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.hugging_face import Float64, HuggingFaceModel
from stateful_gpt.language_model import LanguageModel, Modulation
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig
from tests.tiny_transformers import GROUPED, REFUSED, SMALL, VOCAB, refused, supported, tiny

EXACT = 1e-10  # float64: rounding of a few layers, far below any mistake
B, T = 2, 12
every_architecture = pytest.mark.parametrize("name", supported())


@cache
def adapter(name: str) -> HuggingFaceModel:
    return HuggingFaceModel(tiny(name))


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def some_numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def attention_of_transformers(name: str) -> str:
    """What the plain model is to be compared with: eager where the fused one knows too little."""
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"


def test_at_least_24_architectures_are_tested() -> None:
    assert len(supported()) >= 24
    assert len(refused()) >= 8


@every_architecture
@pytest.mark.parametrize(("kind", "layers"), [("bias", None), ("factor", {0, 2}), ("bias", {1})])
def test_bias_and_factor_act_as_in_a_written_out_softmax(
    name: str, kind: str, layers: set[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, numbers = some_tokens(B, T), some_numbers(B, T)
    numbers = numbers if kind == "bias" else numbers.exp()
    plain = tiny(name)
    plain.set_attn_implementation("eager")
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    calls = []

    def with_numbers(scores: Tensor, *_: Any, **__: Any) -> Tensor:
        weights = torch.softmax(scores, dim=-1)
        if scores.ndim != 4:
            return weights  # a router's
        calls.append(None)
        if layers is not None and len(calls) - 1 not in layers:
            return weights
        per_key = numbers if scores.size(3) == T else nn.functional.pad(numbers, (0, 1))  # a sink
        if kind == "bias":
            return torch.softmax(scores + per_key[:, None, None, :], dim=-1)
        return weights * per_key[:, None, None, :]

    monkeypatch.setattr(nn.functional, "softmax", with_numbers)
    with Float64():
        expected = plain(input_ids=tokens, use_cache=False).logits
    monkeypatch.undo()
    assert len(calls) == 3

    model = adapter(name)
    fed = Modulation(**{kind: numbers}, layers=layers)
    hidden = model.read(tokens, modulation=fed)
    logits = model.logits(hidden.flatten(0, 1)).view(B, T, -1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT)
    unfed = model.logits(model.read(tokens).flatten(0, 1)).view(B, T, -1)
    assert (unfed - logits).abs().max() > 1e-3


@every_architecture
def test_nothing_fed_is_the_plain_model_bit_for_bit(name: str) -> None:
    plain = tiny(name, dtype=torch.float32)
    plain.set_attn_implementation(attention_of_transformers(name))
    tokens = some_tokens(1, T)
    model = HuggingFaceModel(plain)
    assert model.dtype == torch.float32
    logits = model.logits(model.read(tokens)[0])
    assert torch.equal(logits, plain(input_ids=tokens, use_cache=False).logits[0])


@every_architecture
def test_windows_of_a_cache_and_padding_say_what_the_whole_text_says(name: str) -> None:
    model, tokens, bias = adapter(name), some_tokens(B, T), some_numbers(B, T)
    whole = model.read(tokens, modulation=Modulation(bias=bias))
    cache = model.new_cache(batch=B, capacity=T)

    def read(start: int, end: int, rows: list[int]) -> None:
        assert cache.length == start
        fed = Modulation(bias=bias[rows, :end])
        hidden = model.read(tokens[rows, start:end], modulation=fed, cache=cache)
        torch.testing.assert_close(hidden, whole[rows, start:end], rtol=0, atol=EXACT)

    read(0, 7, [0, 1])
    read(7, 8, [0, 1])
    cache.length = 6
    read(6, 9, [0, 1])
    cache.keep([1, 0, 1])
    read(9, 11, [1, 0, 1])
    cache.length = 2
    cache.keep([1])
    read(2, T, [0])
    cache.length = 0
    read(0, T, [0])

    longer = torch.cat([tokens, some_tokens(B, 3)], dim=1)
    padded = nn.functional.pad(bias, (0, 3), value=5.0)
    hidden = model.read(longer, modulation=Modulation(bias=padded))
    torch.testing.assert_close(hidden[:, :T], whole, rtol=0, atol=EXACT)


@every_architecture
def test_passes_windows_and_generation_agree_with_reading_from_left_to_right(name: str) -> None:
    model, feedback = adapter(name), Feedback(strength=-0.7)
    prompts = [some_tokens(6).tolist(), some_tokens(9)[5:].tolist()]
    to_the_letter = RecomputeConfig(iterations=7, tolerance=0.0)
    full, windowed = (
        generate(model, prompts, max_new_tokens=1, feedback=feedback, config=config)
        for config in (to_the_letter, RecomputeConfig(window="auto"))
    )
    assert full.tokens == windowed.tokens
    for text, estimates, others in zip(
        full.tokens, full.log_probs, windowed.log_probs, strict=True
    ):
        torch.testing.assert_close(estimates, others, rtol=0, atol=EXACT)
        oracle = left_to_right(model, torch.tensor([text]), feedback)[0]
        torch.testing.assert_close(estimates, oracle, rtol=0, atol=EXACT)


class Watch(TorchDispatchMode):
    """The size of the largest tensor that is computed, and the dtypes of those with fractions."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.of_fractions = 0, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.is_floating_point() and bool((tensor.frac() != 0).any()):
                    self.of_fractions.add(tensor.dtype)
        return out


@every_architecture
def test_float64_is_never_rounded_to_float32(name: str) -> None:
    model = HuggingFaceModel(tiny(name, dtype=torch.float32)).in_float64()
    assert model.dtype == torch.float64
    assert model.in_float64() is model
    with Watch() as watch:
        hidden = model.read(some_tokens(B, T), modulation=Modulation(bias=some_numbers(B, T)))
        logits = model.logits(hidden.flatten(0, 1))
    assert hidden.dtype == logits.dtype == torch.float64
    assert watch.of_fractions == {torch.float64}


@pytest.mark.parametrize("name", refused())
def test_other_architectures_are_refused_with_the_first_layer_that_is_missed(name: str) -> None:
    model = tiny(name, dtype=torch.float32)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceModel(model)
    message = str(caught.value)
    assert f"architecture {type(model).__name__} " in message
    assert f"layer {REFUSED[name][2]} " in message
    assert "\n" not in message


def test_a_model_that_says_something_else_with_a_cache_is_refused() -> None:
    model = tiny("llama")

    def count(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden += torch.arange(hidden.size(1))[None, :, None]  # from the beginning of the call
        return output

    model.model.layers[0].register_forward_hook(count)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*keys and values kept"):
        HuggingFaceModel(model)


def test_a_model_that_keeps_more_than_keys_and_values_is_refused() -> None:
    import transformers

    sizes = {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 4}
    mamba = {f"mamba_{name}": size for name, size in sizes.items()}
    config = transformers.FalconH1Config(**GROUPED, **mamba)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match="FalconH1ForCausalLM cannot be"):
        HuggingFaceModel(model)


def test_a_model_whose_head_needs_more_than_hidden_states_is_refused() -> None:
    model = tiny("llama")

    def favour(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if kwargs.get("input_ids") is not None:
            output.logits[..., 3] += 1.0
        return output

    model.register_forward_hook(favour, with_kwargs=True)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*states handed to its head"):
        HuggingFaceModel(model)


def test_settings_that_break_a_model_do_not_speak_for_its_architecture() -> None:
    model = tiny("deepseek_v3", num_key_value_heads=2)  # of 4 heads, without groups
    with pytest.raises(CheckpointError, match=r"DeepseekV3ForCausalLM cannot be read: "):
        HuggingFaceModel(model)


def test_a_model_without_a_number_of_positions_is_refused() -> None:
    model = tiny("llama")
    HuggingFaceModel(model)
    model.config.max_position_embeddings = 0
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        HuggingFaceModel(model)


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 2), (2, 1)])
def test_layers_are_those_of_the_decoder(encoder: int, decoder: int) -> None:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "max_position_embeddings": 64}
    layers = {"encoder_layers": encoder, "decoder_layers": decoder}
    heads = {"decoder_attention_heads": 4, "decoder_ffn_dim": 24}
    settings = transformers.BartConfig(**sizes, **layers, **heads)
    assert HuggingFaceModel(transformers.BartForCausalLM(settings)).n_layer == decoder


@pytest.mark.skipif(transformers.__version__ < "5", reason="RoBERTa is out of reach there")
@pytest.mark.parametrize("padding", [0, 1])  # 1 in those that are published
def test_every_position_that_is_offered_can_be_read(padding: int) -> None:
    settings = {**SMALL, "pad_token_id": padding, "is_decoder": True}
    roberta = transformers.RobertaForCausalLM(transformers.RobertaConfig(**settings))
    model = HuggingFaceModel(roberta)
    assert model.block_size == 63 - padding
    assert model.read(torch.full((1, model.block_size), 2)).size(1) == model.block_size


def test_an_id_that_the_head_does_not_know_is_none_of_the_vocabulary() -> None:
    shorter = tiny("llama")
    shorter.lm_head = nn.Linear(16, VOCAB - 1, bias=False).double()
    assert HuggingFaceModel(shorter).vocab_size == VOCAB - 1


def test_the_model_of_the_user_stays_as_it_was() -> None:
    model, tokens = tiny("gemma2", dtype=torch.float32), some_tokens(1, T)
    settings, logits = model.config.to_dict(), model(input_ids=tokens).logits
    wrapped = HuggingFaceModel(model)
    wrapped.in_float64().read(tokens, modulation=Modulation(bias=some_numbers(1, T)))
    assert model.config.to_dict() == settings
    assert model.dtype == torch.float32
    assert torch.equal(model(input_ids=tokens).logits, logits)
    before = wrapped.read(tokens)
    next(model.parameters()).mul_(2)  # the weights are the same tensors, not copies
    assert not torch.equal(wrapped.read(tokens), before)


def test_what_the_face_promises_of_a_model() -> None:
    model: LanguageModel = adapter("opt")
    assert (model.block_size, model.vocab_size, model.n_layer, model.width) == (64, VOCAB, 3, 12)
    assert model.device == torch.device("cpu")
    assert not model.takes_hidden_states
    with pytest.raises(ValueError, match="65 tokens do not fit the model's block of 64"):
        model.read(some_tokens(1, 65))
    cache = model.new_cache(batch=1, capacity=65)
    model.read(some_tokens(1, 60), cache=cache)
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        model.read(some_tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="no gate"):
        model.read(some_tokens(1, 2), modulation=Modulation(hidden=some_numbers(1, 2, 12)))
    with pytest.raises(ValueError, match="from 0 to 60"):
        cache.length = 61


def test_positions_that_would_change_with_the_length_of_the_text_are_not_offered() -> None:
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    stretched = tiny(
        "phi3",
        original_max_position_embeddings=32,
        **rope(rope_type="longrope", original_max_position_embeddings=32, **factors),
    )
    assert HuggingFaceModel(stretched).block_size == 32
    dynamic = tiny("llama", **rope(rope_type="dynamic", factor=2.0))
    assert HuggingFaceModel(dynamic).block_size == 64


def rope(**settings: Any) -> dict[str, Any]:
    """Settings of rotary positions, under the name that the installed version has for them."""
    import transformers

    if hasattr(transformers.LlamaConfig(), "rope_parameters"):
        return {"rope_parameters": {"rope_theta": 10000.0, **settings}}
    if settings["rope_type"] == "longrope":
        settings = {key: settings[key] for key in ("short_factor", "long_factor")}
        settings["type"] = "longrope"
    return {"rope_scaling": settings}


def test_nothing_is_as_large_as_the_block() -> None:
    model = HuggingFaceModel(tiny("llama", max_position_embeddings=131072))
    assert model.block_size == 131072
    tokens, bias = some_tokens(B, 64), some_numbers(B, 64)
    with Watch() as watch:
        cache = model.new_cache(batch=B, capacity=64)
        model.read(tokens[:, :40], modulation=Modulation(bias=bias[:, :40]), cache=cache)
        hidden = model.read(tokens[:, 40:], modulation=Modulation(bias=bias), cache=cache)
        model.logits(hidden.flatten(0, 1))
    assert watch.largest <= B * 4 * 64 * 64  # the scores of a layer
