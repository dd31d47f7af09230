"""Folders of Hugging Face models: what is loaded, what is refused, and what identifies them."""

import json
import os
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from stateful_gpt.checkpoint import (
    CheckpointError,
    Library,
    fingerprint,
    library_of,
    load_checkpoint,
    load_model,
)
from stateful_gpt.feedback import Feedback
from stateful_gpt.generate import generate
from stateful_gpt.hugging_face import HuggingFaceModel
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT
from stateful_gpt.oracle import left_to_right
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.trajectory import trajectory
from tests.tiny_transformers import tiny

load_hugging_face = partial(load_model, library="transformers")

BYTES = 257  # ids of the project's byte tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama in several files, without a tokenizer."""
    model = tiny("llama", dtype=torch.float32, vocab_size=BYTES)
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


def refusal(folder: Path, tokenizer: str | None = "byte") -> str:
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(folder, tokenizer=tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = load_hugging_face(folder, tokenizer="byte", dtype=dtype).model
    with torch.no_grad():
        return model.logits(model.read(tokens)[0])


def test_a_folder_of_several_files_is_loaded_in_each_precision(folder: Path) -> None:
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    tokens = torch.tensor([[3, 5, 8, 13, 21]])
    expected = tiny("llama", dtype=torch.float32, vocab_size=BYTES)(input_ids=tokens).logits[0]
    assert torch.equal(logits(folder, tokens), expected)
    in_float64 = logits(folder, tokens, torch.float64)
    assert in_float64.dtype == torch.float64
    torch.testing.assert_close(in_float64.float(), expected, rtol=1e-4, atol=1e-4)  # float32 ends
    by_copy = load_hugging_face(folder, tokenizer="byte").model.in_float64()
    with torch.no_grad():
        assert torch.equal(by_copy.logits(by_copy.read(tokens)[0]), in_float64)
    assert logits(folder, tokens, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "wrong_in", "refused"),
    [
        (torch.bfloat16, {torch.bfloat16}, False),
        (torch.bfloat16, {torch.bfloat16, torch.float32}, True),
        (torch.float32, {torch.float32}, True),
    ],
)
def test_what_rounding_to_16_bits_may_do_is_decided_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wrong_in: set[torch.dtype], refused: bool
) -> None:
    exact = HuggingFaceModel.logits

    def carried_away(model: HuggingFaceModel, hidden: Tensor) -> Tensor:
        logits = exact(model, hidden)
        return logits + 100 * (model.dtype in wrong_in)

    monkeypatch.setattr(HuggingFaceModel, "logits", carried_away)
    if refused:
        with pytest.raises(CheckpointError, match="says something else"):
            HuggingFaceModel(tiny("llama", dtype=dtype))
    else:
        HuggingFaceModel(tiny("llama", dtype=dtype))


def test_gpt2_says_the_same_by_either_door(tmp_path: Path) -> None:
    settings = {"bos_token_id": 256, "eos_token_id": 256}
    tiny("gpt2", dtype=torch.float32, vocab_size=BYTES, **settings).save_pretrained(tmp_path)
    tokens = torch.randint(0, BYTES, (2, 20), generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-3, 3, 40, dtype=torch.float64).view(2, 20)
    doors = (
        load_checkpoint(tmp_path, tokenizer="byte", dtype=torch.float64),
        load_hugging_face(tmp_path, tokenizer="byte", dtype=torch.float64),
    )
    for fed in (Modulation(), Modulation(bias=bias), Modulation(factor=bias.exp(), layers={1})):
        with torch.no_grad():
            ours, theirs = (
                door.model.logits(door.model.read(tokens, modulation=fed).flatten(0, 1))
                for door in doors
            )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    feedback, prompts = Feedback(strength=-0.7), [tokens[0, :9].tolist(), tokens[1, :5].tolist()]
    passes = [trajectory(door.model, tokens, feedback, iterations=6).log_probs for door in doors]
    torch.testing.assert_close(*passes, rtol=0, atol=1e-10)
    exact = [left_to_right(door.model, tokens, feedback) for door in doors]
    torch.testing.assert_close(*exact, rtol=0, atol=1e-10)
    config = RecomputeConfig(iterations=12, tolerance=0.0)
    texts = [
        generate(door.model, prompts, max_new_tokens=3, feedback=feedback, config=config)
        for door in doors
    ]
    assert texts[0].tokens == texts[1].tokens
    for ours, theirs in zip(texts[0].log_probs, texts[1].log_probs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_pickles_are_not_read(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(tiny("llama", vocab_size=BYTES).state_dict(), folder / "pytorch_model.bin")
    assert "has no safetensors" in refusal(folder)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    edit(folder / "config.json", model_type="unheard", auto_map={"AutoConfig": "code.Config"})
    assert "is not a causal model that transformers loads" in refusal(folder)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("code", ["somebody/kernels", "flash_attention_2"])
def test_settings_do_not_choose_the_code_of_attention(folder: Path, key: str, code: str) -> None:
    tokens = torch.tensor([[3, 5, 8]])
    expected = logits(folder, tokens)
    edit(folder / "config.json", **{key: code})
    assert torch.equal(logits(folder, tokens), expected)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=32)
    assert "layers.0.mlp.down_proj.weight is of another shape" in refusal(folder)


@pytest.mark.skipif(transformers.__version__ >= "5", reason="it reads its own rotary settings")
def test_rotary_settings_that_an_old_transformers_would_pass_over_are_refused(folder: Path) -> None:
    edit(folder / "config.json", rope_parameters={"rope_theta": 1e5, "rope_type": "default"})
    assert "load it with transformers 5" in refusal(folder)


@pytest.mark.parametrize(("layers", "kind"), [(4, "missing"), (2, "unexpected")])
def test_weights_that_are_missing_or_too_many_are_refused(
    folder: Path, layers: int, kind: str
) -> None:
    edit(folder / "config.json", num_hidden_layers=layers)
    message = refusal(folder)
    assert f"model.layers.{min(layers, 3)}." in message
    assert message.endswith(f"is {kind}")


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode"])
def test_masks_that_old_versions_saved_are_no_weights(tmp_path: Path, name: str) -> None:
    tiny(name, dtype=torch.float32, vocab_size=BYTES).save_pretrained(tmp_path)
    tokens, file = torch.tensor([[3, 5, 8]]), tmp_path / "model.safetensors"
    expected = logits(tmp_path, tokens)
    masks = {"bias": torch.ones(1, 1, 64, 64).tril(), "masked_bias": torch.tensor(-1e4)}
    masks = {f"transformer.h.0.attn.{key}": mask for key, mask in masks.items()}
    save_file(load_file(file) | masks, file, metadata={"format": "pt"})
    assert torch.equal(logits(tmp_path, tokens), expected)


@pytest.mark.parametrize("library", ["transformers", "stateful_gpt"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_not_passed_over(tmp_path: Path, library: Library, alone: bool) -> None:
    if not alone:
        tiny("gpt2", dtype=torch.float32, vocab_size=BYTES).save_pretrained(tmp_path)
        load_model(tmp_path, library=library, tokenizer="byte")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (fingerprint, load_model):
        with pytest.raises(CheckpointError, match="merge it into its model with peft"):
            read(tmp_path, library=library)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_sizes_that_the_files_belie_are_refused_before_they_are_made(
    folder: Path, key: str
) -> None:
    edit(folder / "config.json", **{key: 10**10})
    assert "the sizes it states take" in refusal(folder)


@pytest.mark.parametrize("dtype", ["auto", "int8", "float8_e4m3fn"])
def test_the_precision_that_settings_state_does_not_matter(folder: Path, dtype: str) -> None:
    tokens = torch.tensor([[3, 5, 8]])
    expected = logits(folder, tokens)
    edit(folder / "config.json", dtype=dtype)
    if dtype == "auto" and transformers.__version__ < "5":  # such settings it cannot read itself
        assert "is not a causal model that transformers loads: AttributeError" in refusal(folder)
    else:
        assert torch.equal(logits(folder, tokens), expected)


def test_weights_of_two_bits_are_not_too_few(tmp_path: Path) -> None:
    tiny("llama", vocab_size=2048).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    packed = {
        name: weight[: len(weight) // 4].byte() if weight.ndim == 2 else weight
        for name, weight in load_file(file).items()
    }
    save_file(packed, file, metadata={"format": "pt"})
    assert "is of another shape" in refusal(tmp_path)  # to transformers, which was not told of it


def test_quantized_weights_are_read_but_not_in_float64(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "is_quantized", True, raising=False)
    said = "quantized weights have no float64"
    with pytest.raises(CheckpointError, match=said):
        load_hugging_face(folder, tokenizer="byte").model.in_float64()
    with pytest.raises(CheckpointError, match=said):
        load_hugging_face(folder, tokenizer="byte", dtype=torch.float64)


def test_a_part_of_the_weights_that_is_not_there_is_named(folder: Path) -> None:
    for part in sorted(folder.glob("model-*.safetensors"))[1:]:
        part.unlink()
    assert "lacks 'model-00002-of-" in refusal(folder)


@pytest.mark.parametrize("name", ["/dev/zero", "../pipe", "further/pipe"])
def test_weights_are_read_from_the_folder_alone(folder: Path, name: str) -> None:
    (folder / "further").mkdir()
    os.mkfifo(folder / "further" / "pipe")
    os.mkfifo(folder.parent / "pipe")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=names | {min(names): name})
    assert f"lacks {name!r}" in refusal(folder)


def test_settings_do_not_choose_weights_that_were_not_looked_at(folder: Path) -> None:
    (folder / "further").mkdir()
    name = "further/model.safetensors"
    save_file(tiny("llama", vocab_size=BYTES).state_dict(), folder / name)
    edit(folder / "config.json", transformers_weights=name)
    assert f"lacks {name!r}" in refusal(folder)


def test_settings_may_name_an_index_whose_parts_are_in_the_folder(folder: Path) -> None:
    tokens, index = torch.tensor([[3, 5, 8]]), folder / "mine.safetensors.index.json"
    expected = logits(folder, tokens)
    (folder / "model.safetensors.index.json").rename(index)
    edit(folder / "config.json", transformers_weights=index.name)
    assert torch.equal(logits(folder, tokens), expected)
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=names | {min(names): "further/part.safetensors"})
    assert "lacks 'further/part.safetensors'" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**4}, "take 10,000 layers"),
        ({"transformers_weights": "further/w.safetensors"}, "lacks 'further/w.safetensors'"),
    ],
)
def test_settings_for_a_version_are_those_that_count(
    folder: Path, changes: dict[str, object], words: str
) -> None:
    (folder / "config.4.0.0.json").write_text((folder / "config.json").read_text())
    edit(folder / "config.json", configuration_files=["config.4.0.0.json"])
    load_hugging_face(folder, tokenizer="byte")
    edit(folder / "config.4.0.0.json", **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "more.json", "chat_template.jinja"]
)
def test_settings_that_no_memory_holds_are_refused(folder: Path, name: str) -> None:
    for file in (folder / "trainer_state.json", folder / name):
        file.touch()
    os.truncate(folder / "trainer_state.json", 2**27)  # takes no space; is not read
    load_hugging_face(folder, tokenizer="byte")
    os.truncate(folder / name, 2**27)
    assert f"{name} cannot be read: it has 134,217,728 bytes" in refusal(folder)


def test_layers_are_counted_before_they_are_listed(tmp_path: Path) -> None:
    tiny("qwen2", dtype=torch.float32, vocab_size=BYTES).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["layer_types"]  # it lists one for each
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**7}))
    tracemalloc.start()
    try:
        assert "take 10,000,000 layers" in refusal(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_layers_of_a_decoder_are_counted(folder: Path) -> None:
    edit(folder / "config.json", model_type="trocr", decoder_layers=10**4)
    assert "take 10,000 layers" in refusal(folder)


def test_tables_of_positions_that_no_memory_holds_are_not_made(tmp_path: Path) -> None:
    tiny("gptj", dtype=torch.float32, vocab_size=BYTES).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", n_positions=10**13)  # they are no weights
    assert "bytes of memory, and the machine has" in refusal(tmp_path)


def test_a_mask_takes_a_byte_for_each_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_bigcode", dtype=torch.float32, vocab_size=BYTES, n_positions=2048)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("stateful_gpt.untrusted.machine_memory", lambda: 2 * 2048**2)
    assert load_hugging_face(tmp_path, tokenizer="byte").model.block_size == 2048


def test_a_model_larger_than_the_machine_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stateful_gpt.untrusted.machine_memory", lambda: 50_000)
    assert "bytes of memory, and the machine has 50,000" in refusal(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    shard = next(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert "is not a causal model that transformers loads" in refusal(folder)


def test_an_architecture_out_of_reach_is_refused(tmp_path: Path) -> None:
    tiny("bloom", dtype=torch.float32).save_pretrained(tmp_path)
    assert "BloomForCausalLM cannot be studied: layer 0" in refusal(tmp_path)


def test_a_missing_extra_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -e '.[hugging_face]' -c constraints.txt" in refusal(folder)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert "python -m scripts.prepare_smollm2" in refusal(tmp_path / "smollm2")
    assert "there is no model file or folder" in refusal(tmp_path / "elsewhere")
    assert "there is no model file or folder" in refusal(Path("x" * 5000))
    assert "has no config.json" in refusal(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "must be a folder" in refusal(file)


def test_a_model_without_a_tokenizer_asks_for_one(folder: Path) -> None:
    assert "has no tokenizer" in refusal(folder, tokenizer=None)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    assert "uses the id 50256" in refusal(folder, tokenizer="gpt2")


def with_tokenizer(folder: Path, *, special: list[str]) -> None:
    """A byte-level tokenizer of 256 ids, and special tokens behind them."""
    vocabulary = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])
    fast.save_pretrained(folder)


def test_ends_are_those_of_tokenizer_and_model(folder: Path) -> None:
    with_tokenizer(folder, special=["<end>"])
    edit(folder / "generation_config.json", eos_token_id=[7, 9])
    checkpoint = load_hugging_face(folder)
    assert isinstance(checkpoint.model, HuggingFaceModel)
    assert checkpoint.tokenizer.end_tokens == (7, 9, 256)
    for none in ("<end>", -1, [["<end>"], None], 7.5):
        edit(folder / "generation_config.json", eos_token_id=none)
        assert load_hugging_face(folder).tokenizer.end_tokens == (256,)
    assert checkpoint.tokenizer.n_vocab == 257
    assert bytes(checkpoint.tokenizer.encode_ordinary("a")) != b""
    assert load_hugging_face(folder, tokenizer="byte").tokenizer.name == "byte"


def test_special_tokens_may_lie_beyond_the_embeddings_but_no_others(folder: Path) -> None:
    with_tokenizer(folder, special=["<end>", "<image>", "<sound>"])
    assert load_hugging_face(folder).tokenizer.n_vocab == 259
    smaller = tiny("llama", dtype=torch.float32, vocab_size=200)
    for file in folder.glob("model*"):
        file.unlink()
    smaller.save_pretrained(folder)
    assert "uses the id 255, but" in refusal(folder, tokenizer=None)


def gpt2_of_old_files(folder: Path) -> None:
    """With a vocabulary in each of the places where one may be."""
    words = {"Ġthe": 262, "Ġgazed": 50255}
    end = {"content": "<|endoftext|>", "special": True}
    contents: dict[str, object] = {
        "config.json": {"model_type": "gpt2", "eos_token_id": 50256},
        "generation_config.json": {"eos_token_id": 50256},
        "vocab.json": words,
        "tokenizer.json": {
            "model": {"vocab": words},
            "added_tokens": [end],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "post_processor": {"type": "ByteLevel", "add_prefix_space": True},  # of offsets alone
        },
        "tokenizer_config.json": {
            "eos_token": end["content"],
            "added_tokens_decoder": {"50256": end},
        },
        "added_tokens.json": {end["content"]: 50256},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))


def test_a_gpt2_is_never_read_with_words_that_are_not_its_own(tmp_path: Path) -> None:
    tiny("gpt2", dtype=torch.float32, vocab_size=50257).save_pretrained(tmp_path)
    with_tokenizer(tmp_path, special=["<end>"])
    for damaged in (False, True):
        with pytest.raises(CheckpointError, match=r"model=hugging_face reads it.*tokenizer=gpt2"):
            load_checkpoint(tmp_path)
        assert load_checkpoint(tmp_path, tokenizer="gpt2").tokenizer.name == "gpt2"
        if not damaged:
            assert load_model(tmp_path).tokenizer.n_vocab == 257
            (tmp_path / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(CheckpointError, match="is not a tokenizer that transformers loads"):
        load_model(tmp_path)
    words = {"model": {"vocab": {"Ġthe": 262, "Ġgazed": 50255}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    (tmp_path / "tokenizer_config.json").unlink()  # it names another end
    assert isinstance(load_model(tmp_path).model, GPT)
    edit(tmp_path / "tokenizer.json", added_tokens=[{"content": "<sep>", "special": True}])
    assert library_of(tmp_path) == "transformers"  # as it may be drawn
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text('{"pad_token": "<sep>"}')
        assert library_of(tmp_path) == "stateful_gpt"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"villager": 50257}),
        ("config.json", {"eos_token_id": 50257}),
        ("generation_config.json", {"eos_token_id": [50256, 198]}),
        ("tokenizer.json", {"pre_tokenizer": {"add_prefix_space": True}}),
        ("tokenizer.json", {"post_processor": {"special_tokens": {"<|endoftext|>": {}}}}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"50257": {"content": "villager", "special": False}}},
        ),
    ],
)
def test_a_gpt2_that_states_another_word_start_or_end_is_read_with_it(
    tmp_path: Path, name: str, content: dict[str, object]
) -> None:
    gpt2_of_old_files(tmp_path)
    assert library_of(tmp_path) == "stateful_gpt"
    file = tmp_path / name
    if not file.exists():
        file.write_text("{}")
    edit(file, **content)
    assert library_of(tmp_path) == "transformers"


@pytest.mark.parametrize("end", [50257, [50256, 198]])
def test_a_gpt2_without_a_tokenizer_and_another_end_asks_for_one(
    tmp_path: Path, end: int | list[int]
) -> None:
    model = tiny("gpt2", dtype=torch.float32, vocab_size=50258)
    model.config.eos_token_id = model.generation_config.eos_token_id = [50256]
    model.save_pretrained(tmp_path)
    assert load_hugging_face(tmp_path).tokenizer.name == "gpt2"
    edit(tmp_path / "generation_config.json", eos_token_id=end)
    assert "has no tokenizer: name one" in refusal(tmp_path, tokenizer=None)


def test_words_that_were_downloaded_to_look_at_change_no_id(tmp_path: Path) -> None:
    cached, local = tmp_path / "snapshots" / "abc", tmp_path / "local"
    for folder in (cached, local):
        tiny("gpt2", dtype=torch.float32, vocab_size=50257).save_pretrained(folder)
        before = fingerprint(folder)
        words = {"model": {"vocab": {"Ġthe": 262, "Ġgazed": 50255}}}
        (folder / "tokenizer.json").write_text(json.dumps(words))
        assert (fingerprint(folder) == before) == (folder == cached)
        with_tokenizer(folder, special=["<end>"])
        assert fingerprint(folder) != before


def test_a_gpt2_in_several_files_is_read_by_transformers(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=torch.float32, vocab_size=BYTES)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert isinstance(load_model(tmp_path, tokenizer="byte").model, HuggingFaceModel)
    with pytest.raises(CheckpointError, match="in several files: model=hugging_face reads them"):
        load_checkpoint(tmp_path, tokenizer="byte")


@pytest.mark.parametrize(
    ("key", "value"), [("scale_attn_by_inverse_layer_idx", True), ("layer_norm_epsilon", 1e-6)]
)
def test_a_gpt2_of_another_kind_is_read_by_transformers(
    tmp_path: Path, key: str, value: object
) -> None:
    model = tiny("gpt2", dtype=torch.float32, vocab_size=BYTES, **{key: value})
    model.save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path, tokenizer="byte").model, HuggingFaceModel)
    with pytest.raises(CheckpointError, match=rf"{key} must be .*model=hugging_face reads others"):
        load_checkpoint(tmp_path, tokenizer="byte")


def test_a_model_of_256_bytes_needs_no_end_token(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32, vocab_size=256).save_pretrained(tmp_path)
    assert load_hugging_face(tmp_path, tokenizer="byte").tokenizer.end_tokens == ()


def test_weights_that_are_no_numbers_are_said_to_be_so(folder: Path) -> None:
    for shard in folder.glob("model-*.safetensors"):
        broken = {name: torch.full_like(one, torch.nan) for name, one in load_file(shard).items()}
        save_file(broken, shard, metadata={"format": "pt"})
    assert "the outputs of this LlamaForCausalLM are not finite" in refusal(folder)


def test_a_broken_tokenizer_is_one_sentence(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(folder, tokenizer=None)


def test_the_fingerprint_is_that_of_what_is_loaded(folder: Path) -> None:
    first = fingerprint(folder)
    (folder / "README.md").write_text("nothing that is loaded")
    assert fingerprint(folder) == first
    shard = max(folder.glob("model-*.safetensors"))
    weights, before = load_file(shard), shard.stat()
    name = min(weights)
    save_file(weights | {name: weights[name] + 1}, shard, metadata={"format": "pt"})
    assert shard.stat().st_size == before.st_size
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = fingerprint(folder)
    assert changed != first
    edit(folder / "config.json", rms_norm_eps=1e-3)
    assert fingerprint(folder) != changed


def test_a_fingerprint_takes_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fingerprint(folder)
    for file in folder.iterdir():
        os.utime(file, (0, 0))  # or it would be remembered
    monkeypatch.setattr("stateful_gpt.untrusted.machine_memory", lambda: 5_000)
    assert fingerprint(folder, library="transformers") == found


@pytest.mark.parametrize("name", ["more.json", "more.safetensors"])
def test_neither_a_fingerprint_nor_a_model_waits_for_a_pipe(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    for read in (fingerprint, load_hugging_face):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is not a regular"):
            read(folder)


def test_a_hub_name_carries_its_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0a1b2c"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = load_hugging_face("somebody/llama", tokenizer="byte")
    assert asked == ["somebody/llama"]
    assert checkpoint.source == "somebody/llama@0a1b2c"
    assert load_hugging_face(snapshot, tokenizer="byte").source == str(snapshot)
    # its config.json says which library reads it
    assert isinstance(load_model("somebody/llama", tokenizer="byte").model, HuggingFaceModel)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert "could not be downloaded from the hub (ConnectionError)" in refusal(Path("a/llama"))
