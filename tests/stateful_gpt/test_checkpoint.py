"""Models from files: equal to an independent implementation, and one sentence for a bad file."""

import json
import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stateful_gpt import untrusted
from stateful_gpt.checkpoint import (
    CheckpointError,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from stateful_gpt.feedback import Feedback, FeedbackKind
from stateful_gpt.generate import generate
from stateful_gpt.language_model import Modulation
from stateful_gpt.model import GPT
from stateful_gpt.recompute import RecomputeConfig
from stateful_gpt.tokenizer import load_tokenizer, train_bpe
from tests.forked import Forker

Make = Callable[..., GPT]
Tokens = Callable[..., Tensor]

BYTES = 257  # ids of the byte tokenizer


def same_weights(one: GPT, other: GPT) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """A small random GPT-2 of transformers', with weights far from their initial ones, on disk."""
    import transformers  # takes seconds: only where it is the peer

    config = transformers.GPT2Config(
        vocab_size=BYTES, n_positions=32, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "ln_" not in name else 0.1))
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


@pytest.mark.parametrize(
    # float64: rounding only. float32: 24 bits, logits of order 10, sums over 24 to 96 terms
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5)],
)
def test_logits_equal_those_of_transformers(
    published: tuple[object, Path], make_tokens: Tokens, dtype: torch.dtype, tolerance: float
) -> None:
    theirs, folder = published
    ours = load_checkpoint(folder, tokenizer="byte", dtype=dtype).model
    tokens = make_tokens(1, 3, 32, vocab_size=BYTES)
    with torch.no_grad():
        expected = theirs.to(dtype)(tokens).logits
        logits = ours.lm_head(ours(tokens))
    theirs.float()
    assert expected.abs().max() > 1  # not a comparison of zeros
    assert (logits - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_greedy_text_equals_that_of_transformers_with_its_cache(
    published: tuple[object, Path], make_tokens: Tokens
) -> None:
    theirs, folder = published
    ours = load_checkpoint(folder, tokenizer="byte", dtype=torch.float64).model
    prompts = make_tokens(2, 3, 5, vocab_size=BYTES)
    expected = theirs.double().generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=25,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs.float()
    result = generate(
        ours,
        prompts.tolist(),
        max_new_tokens=25,
        feedback=Feedback(FeedbackKind.LOG_PROB, 0.0),
        config=RecomputeConfig(iterations=1),
    )
    assert result.tokens == expected.tolist()
    assert len({tuple(text[5:]) for text in result.tokens}) == 3  # texts of their own


def test_names_without_the_prefix_and_with_buffers_are_gpt2_too(
    published: tuple[object, Path], tmp_path: Path
) -> None:
    # the files on the hub are older than today's names
    _, folder = published
    state = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    shutil.copy(folder / "config.json", tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    one = load_checkpoint(folder, tokenizer="byte").model
    assert same_weights(one, load_checkpoint(tmp_path, tokenizer="byte").model)


# --- this project's folders ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_own_format_comes_back_exactly(
    make_gpt: Make, tmp_path: Path, tied: bool, bias: bool, activation: str
) -> None:
    model = make_gpt(1, vocab_size=BYTES, tied=tied, bias=bias, activation=activation)
    save_checkpoint(model, tmp_path / "m", tokenizer="byte", dtype=torch.float64)
    loaded = load_checkpoint(tmp_path / "m", dtype=torch.float64)
    assert same_weights(loaded.model, model)
    assert loaded.model.config == model.config
    assert loaded.model.tied == tied
    assert not loaded.model.training
    assert loaded.tokenizer.name == "byte"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_half_precision_storage_is_within_its_rounding(make_gpt: Make, tmp_path: Path) -> None:
    model = make_gpt(1, vocab_size=BYTES)
    save_checkpoint(model, tmp_path / "m", tokenizer="byte", dtype=torch.float16)
    loaded = load_checkpoint(tmp_path / "m", dtype=torch.float64).model.state_dict()
    for name, weight in model.state_dict().items():
        # half a unit in the last of 11 bits; below 2**-14, half of the smallest number, 2**-24
        bound = (weight.abs() * 2.0**-11).clamp_min(2.0**-25)
        assert bool(((loaded[name] - weight).abs() <= bound).all()), name
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size < 2 * model.count_parameters() + 10_000


def test_a_trained_tokenizer_travels_with_its_model(make_gpt: Make, tmp_path: Path) -> None:
    for name in ("sea", "byte"):  # which one of this project's is called, too
        encoding = train_bpe(["the ship and the sea and so on " * 20], vocab_size=270, name=name)
        save_checkpoint(make_gpt(1, vocab_size=270), tmp_path / name, tokenizer=encoding)
        loaded = load_checkpoint(tmp_path / name).tokenizer
        assert loaded.ranks == encoding.ranks
        assert loaded.n_vocab == encoding.n_vocab


@pytest.mark.parametrize("ids", [256, 257])
def test_the_tokenizer_of_bytes_is_saved_by_its_name(
    make_gpt: Make, tmp_path: Path, ids: int
) -> None:
    encoding = load_tokenizer("byte", vocab_size=ids)
    save_checkpoint(make_gpt(1, vocab_size=ids), tmp_path / "m", tokenizer=encoding)
    assert not (tmp_path / "m" / "tokenizer.json").exists()
    assert load_checkpoint(tmp_path / "m").tokenizer is encoding


def test_a_fingerprint_is_of_the_content(make_gpt: Make, tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_checkpoint(make_gpt(seed, vocab_size=BYTES), tmp_path / folder, tokenizer="byte")
    a, b, c = (fingerprint(tmp_path / folder) for folder in "abc")
    assert a == b != c


# --- nanoGPT's ckpt.pt --------------------------------------------------------------------------


def nanogpt_content(model: GPT, *, prefix: str = "", **arguments: object) -> dict[str, object]:
    config = model.config
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "model_args": {
            "block_size": config.block_size,
            "vocab_size": config.vocab_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "bias": config.bias,
            "dropout": 0.2,
        }
        | arguments,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3}]},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "compile": True},
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoints_load(make_gpt: Make, tmp_path: Path, prefix: str, bias: bool) -> None:
    model = make_gpt(2, vocab_size=BYTES, bias=bias)
    torch.save(nanogpt_content(model, prefix=prefix), tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt", tokenizer="byte", dtype=torch.float64).model
    assert same_weights(loaded, model)
    assert loaded.tied
    assert loaded.config.bias == bias
    assert loaded.config.activation == "gelu"


def test_a_vocabulary_padded_beyond_the_tokenizer_loads(make_gpt: Make, tmp_path: Path) -> None:
    model = make_gpt(2, vocab_size=320)  # as 50304 is to 50257
    torch.save(nanogpt_content(model), tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt", tokenizer="byte", dtype=torch.float64)
    assert loaded.model.config.vocab_size == 320
    assert loaded.tokenizer.n_vocab == BYTES
    assert same_weights(loaded.model, model)


def test_mask_buffers_and_an_untied_head_load(make_gpt: Make, tmp_path: Path) -> None:
    model = make_gpt(2, vocab_size=BYTES, tied=False)
    content = nanogpt_content(model)
    for layer in range(2):
        content["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        content["model"][f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(content, tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt", tokenizer="byte", dtype=torch.float64).model
    assert same_weights(loaded, model)
    assert not loaded.tied


# --- files that are not models ------------------------------------------------------------------


def refusal(source: str | Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source, **options)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


class RunsCode:
    """What a malicious pickle does: names a function to be called while it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_checkpoint_does_not_run(make_gpt: Make, tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "ran"
    content = nanogpt_content(make_gpt(1, vocab_size=BYTES)) | {"config": RunsCode(marker)}
    path = tmp_path / "ckpt.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(path, tokenizer="byte")
    assert ("not a zip file" if legacy else "was not opened further") in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the same file does run its code where that is allowed
    assert marker.exists()


def test_a_bare_pickle_does_not_run_either(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(RunsCode(marker)))
    refusal(tmp_path / "ckpt.pt")
    assert not marker.exists()
    assert not recwarn.list  # a warning would be printed beside the one sentence


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_pt_is_one_sentence(make_gpt: Make, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt_content(make_gpt(1, vocab_size=BYTES)), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    assert str(path) in refusal(path, tokenizer="byte")


PT_DAMAGES: dict[str, Callable[[dict], object]] = {
    "a list": lambda c: [1, 2],
    "a tensor": lambda c: torch.zeros(3),
    "bare weights": lambda c: c["model"],
    "no arguments": lambda c: {"model": c["model"]},
    "arguments a list": lambda c: c | {"model_args": [1]},
    "weights a list": lambda c: c | {"model": [1]},
    "no n_layer": lambda c: c | {"model_args": {**c["model_args"], "n_layer": None}},
    "n_layer a text": lambda c: c | {"model_args": {**c["model_args"], "n_layer": "2"}},
    "negative block": lambda c: c | {"model_args": {**c["model_args"], "block_size": -1}},
    "another n_layer": lambda c: c | {"model_args": {**c["model_args"], "n_layer": 3}},
    "fewer layers": lambda c: c | {"model_args": {**c["model_args"], "n_layer": 1}},
    "another width": lambda c: c | {"model_args": {**c["model_args"], "n_embd": 32}},
    "another vocabulary": lambda c: c | {"model_args": {**c["model_args"], "vocab_size": 300}},
    "a vocabulary beyond all memory": lambda c: (
        c | {"model_args": {**c["model_args"], "vocab_size": 2**62}}
    ),
    "a number of 70 bits": lambda c: c | {"model_args": {**c["model_args"], "block_size": 2**70}},
    "heads that do not divide": lambda c: c | {"model_args": {**c["model_args"], "n_head": 3}},
    "a weight missing": lambda c: (
        c | {"model": {k: v for k, v in c["model"].items() if "ln_f.weight" not in k}}
    ),
    "no embedding": lambda c: (
        c | {"model": {k: v for k, v in c["model"].items() if "wte" not in k}}
    ),
    "a weight too many": lambda c: c | {"model": {**c["model"], "extra.weight": torch.zeros(2)}},
    "integers": lambda c: c | {"model": {k: v.int() for k, v in c["model"].items()}},
    "a weight that is a number": lambda c: (
        c | {"model": {**c["model"], "transformer.wte.weight": 1.0}}
    ),
    "a head of another dtype": lambda c: (
        c | {"model": {**c["model"], "lm_head.weight": c["model"]["lm_head.weight"].half()[:9]}}
    ),
    "10**9 layers": lambda c: c | {"model_args": {**c["model_args"], "n_layer": 10**9}},
    "10**9 layers, the last of them there": lambda c: (
        c
        | {
            "model_args": {**c["model_args"], "n_layer": 10**9},
            "model": {**c["model"], f"transformer.h.{10**9 - 1}.ln_1.weight": torch.ones(16)},
        }
    ),
    "a vocabulary of stride 0": lambda c: (
        c
        | {
            "model_args": {**c["model_args"], "vocab_size": 10**9},
            "model": {**c["model"], "transformer.wte.weight": torch.ones(1, 16).expand(10**9, 16)},
        }
    ),
    "a width of 10**4000": lambda c: c | {"model_args": {**c["model_args"], "n_embd": 10**600}},
    "bias a tensor": lambda c: c | {"model_args": {**c["model_args"], "bias": torch.ones(3)}},
    "n_layer a tensor": lambda c: c | {"model_args": {**c["model_args"], "n_layer": torch.ones(2)}},
    "n_head a megabyte": lambda c: c | {"model_args": {**c["model_args"], "n_head": "x" * 10**6}},
    "meta tensors": lambda c: c | {"model": {k: v.to("meta") for k, v in c["model"].items()}},
    "sparse tensors": lambda c: (
        c | {"model": {k: v.detach().to_sparse() for k, v in c["model"].items()}}
    ),
    "complex tensors": lambda c: c | {"model": {k: v + 0j for k, v in c["model"].items()}},
    "a nested tensor": lambda c: (
        c
        | {
            "model": {
                **c["model"],
                "lm_head.weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            }
        }
    ),
    "a quantised tensor": lambda c: (
        c
        | {
            "model": {
                **c["model"],
                "lm_head.weight": torch.quantize_per_tensor(torch.ones(9), 0.1, 0, torch.qint8),
            }
        }
    ),
    "numbers of 8 bits": lambda c: (
        c | {"model": {k: v.detach().to(torch.float8_e4m3fn) for k, v in c["model"].items()}}
    ),
    "keys that are numbers": lambda c: c | {"model": dict(enumerate(c["model"].values()))},
}


@pytest.mark.parametrize("damage", PT_DAMAGES)
def test_a_foreign_pt_is_one_sentence(make_gpt: Make, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(PT_DAMAGES[damage](nanogpt_content(make_gpt(1, vocab_size=BYTES))), path)
    assert str(path) in refusal(path, tokenizer="byte")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(
    make_gpt: Make, tmp_path: Path
) -> None:
    whole, packed = tmp_path / "whole.pt", tmp_path / "ckpt.pt"
    model = make_gpt(1, vocab_size=BYTES)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    torch.save(nanogpt_content(model), whole)
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "it unpacks to" in refusal(packed, tokenizer="byte")


def test_weights_that_share_their_memory_are_no_more_than_the_file(
    make_gpt: Make, tmp_path: Path
) -> None:
    content = nanogpt_content(make_gpt(1, vocab_size=BYTES))
    shared = torch.zeros(10**4)
    content["model"] |= {f"transformer.h.{i}.ln_1.weight": shared for i in range(100)}
    torch.save(content, tmp_path / "ckpt.pt")
    assert "its weights would take" in refusal(tmp_path / "ckpt.pt", tokenizer="byte")


def test_a_model_larger_than_the_machine_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stateful_gpt.untrusted.machine_memory", lambda: 60_000)
    assert "and the machine has 60,000" in refusal(folder, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 8), (torch.bfloat16, 10)])
def test_a_copy_in_float64_is_made_where_memory_holds_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, each: int
) -> None:
    model = load_checkpoint(folder, dtype=dtype).model  # in float32 mapped from its file
    needed = each * model.count_parameters()
    monkeypatch.setattr("stateful_gpt.untrusted.machine_memory", lambda: needed)
    assert model.in_float64().dtype == torch.float64
    monkeypatch.setattr("stateful_gpt.untrusted.machine_memory", lambda: needed - 1)
    with pytest.raises(MemoryError):
        model.in_float64()


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [({"job/step": "5000", "job": "max"}, 5000), ({"job": "4000", "job/step": "max"}, 4000)],
)
def test_memory_is_what_the_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], allowed: int
) -> None:
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(untrusted, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(untrusted, "CONTROL_GROUPS", tmp_path)
    assert untrusted.machine_memory.__wrapped__() == allowed


@pytest.mark.parametrize("line", ["4:memory:/job/step", "7:cpu,memory:/job/step", "4:memory:/"])
def test_memory_is_what_control_groups_of_version_1_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    for group, limit in {"job/step": "5000", "job": "9223372036854771712", ".": "6000"}.items():
        (tmp_path / "memory" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "memory" / group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/memory\n{line}\n1:cpu:/job\n0::/\n")
    monkeypatch.setattr(untrusted, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(untrusted, "CONTROL_GROUPS", tmp_path)
    assert untrusted.machine_memory.__wrapped__() == (5000 if "job" in line else 6000)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    handle = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name has at most 107 characters
    handle.bind(path.name)
    os.chdir(here)
    handle.close()


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a named pipe": make_fifo,
    "a socket": make_socket,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a named pipe": lambda path: (
        os.mkfifo(path.with_name("pipe")),
        path.symlink_to(path.with_name("pipe")),
    ),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "ckpt.pt", "meta.pkl"]
)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    make_gpt: Make, folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    if name in ("ckpt.pt", "meta.pkl"):
        folder = tmp_path / "out"
        folder.mkdir()
        torch.save(nanogpt_content(make_gpt(1, vocab_size=BYTES)), folder / "ckpt.pt")
    change_settings(folder, tokenizer="tokenizer.json") if name == "tokenizer.json" else None
    (folder / name).unlink(missing_ok=True)
    NO_FILES[kind](folder / name)
    refusal(folder)


@pytest.mark.parametrize("key", ["format", "n_layer"])
def test_a_setting_named_twice_is_one_sentence(folder: Path, key: str) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace(f'"{key}"', f'"{key}": 1, "{key}"'))
    assert f"names '{key}' twice" in refusal(folder)


def test_a_folder_of_nanogpt_is_found_with_its_characters(make_gpt: Make, tmp_path: Path) -> None:
    model = make_gpt(2, vocab_size=4)
    torch.save(nanogpt_content(model), tmp_path / "ckpt.pt")
    before = fingerprint(tmp_path)
    assert "meta.pkl" in refusal(tmp_path)  # GPT-2's 50,257 ids do not fit
    characters = {"stoi": {"a": 0, "b": 1, " ": 2, "\n": 3}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(characters))
    loaded = load_checkpoint(tmp_path, dtype=torch.float64)
    assert same_weights(loaded.model, model)
    assert loaded.tokenizer.encode_ordinary("ab\n") == [0, 1, 3]
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "ckpt.pt") != before
    again = load_checkpoint(tmp_path / "ckpt.pt", tokenizer=tmp_path / "meta.pkl")
    assert again.tokenizer.encode_ordinary("ab\n") == [0, 1, 3]
    save_checkpoint(model, tmp_path / "m", tokenizer=loaded.tokenizer)
    assert load_checkpoint(tmp_path / "m").tokenizer.encode_ordinary("ab\n") == [0, 1, 3]


def test_a_model_of_256_bytes_needs_no_end_token(make_gpt: Make, tmp_path: Path) -> None:
    torch.save(nanogpt_content(make_gpt(2, vocab_size=256)), tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt", tokenizer="byte")
    assert loaded.tokenizer.n_vocab == 256
    assert loaded.tokenizer.end_tokens == ()


def test_loading_a_model_imports_no_compiler(forker: Forker) -> None:
    # torch's compiler takes longer to import than all the rest
    program = (
        "import sys; from stateful_gpt.checkpoint import load_checkpoint\n"
        "load_checkpoint('bundled')\n"
        "print('torch._inductor' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    done = forker.run(["-c", program])
    assert done.stdout == "False\n", done.stderr


def test_a_head_stored_in_another_precision_loads(make_gpt: Make, tmp_path: Path) -> None:
    model = make_gpt(1, vocab_size=BYTES, tied=False, dtype=torch.float32)
    content = nanogpt_content(model)
    content["model"]["lm_head.weight"] = model.lm_head.weight.detach().half()
    torch.save(content, tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt", tokenizer="byte").model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half().float())


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint_folder, tmp_path / "model")


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


def change_architecture(folder: Path, **changes: object) -> None:
    architecture = json.loads((folder / "config.json").read_text())["architecture"]
    change_settings(folder, architecture=architecture | changes)


def change_weights(folder: Path, function: Callable[[dict[str, Tensor]], dict]) -> None:
    weights = folder / "model.safetensors"
    save_file(function(load_file(weights)), weights)


def truncate(path: Path, keep: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])


FOLDER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights empty": lambda f: truncate(f / "model.safetensors", 0.0),
    "weights cut in the header": lambda f: truncate(f / "model.safetensors", 0.001),
    "weights cut in half": lambda f: truncate(f / "model.safetensors", 0.5),
    "weights cut at the end": lambda f: truncate(f / "model.safetensors", 0.999),
    "weights of noise": lambda f: (f / "model.safetensors").write_bytes(b"\x93" * 5000),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "weights a pickle": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "no settings": lambda f: (f / "config.json").unlink(),
    "settings empty": lambda f: truncate(f / "config.json", 0.0),
    "settings cut": lambda f: truncate(f / "config.json", 0.5),
    "settings binary": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00\x80" * 9),
    "settings a list": lambda f: (f / "config.json").write_text("[1, 2]"),
    "settings a number": lambda f: (f / "config.json").write_text("7"),
    "settings nested too deeply": lambda f: (f / "config.json").write_text('{"a":' * 100_000),
    "settings foreign": lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
    "settings of nothing": lambda f: (f / "config.json").write_text("{}"),
    "another format": lambda f: change_settings(f, format="stateful_gpt.model/99"),
    "no architecture": lambda f: change_settings(f, architecture=None),
    "architecture a list": lambda f: change_settings(f, architecture=[1]),
    "an unknown setting": lambda f: change_architecture(f, n_experts=4),
    "a setting called file": lambda f: change_architecture(f, file="x"),
    "layers a text": lambda f: change_architecture(f, n_layer="2"),
    "no layers": lambda f: change_architecture(f, n_layer=0),
    "one layer more": lambda f: change_architecture(f, n_layer=3),
    "one layer less": lambda f: change_architecture(f, n_layer=1),
    "heads that do not divide": lambda f: change_architecture(f, n_head=5),
    "another block": lambda f: change_architecture(f, block_size=33),
    "a vocabulary beyond all memory": lambda f: change_architecture(f, vocab_size=2**62),
    "a number of 70 bits": lambda f: change_architecture(f, block_size=2**70),
    "unknown activation": lambda f: change_architecture(f, activation="relu"),
    "activation a list": lambda f: change_architecture(f, activation=["gelu"]),
    "bias a text": lambda f: change_architecture(f, bias="no"),
    "dropout a text": lambda f: change_architecture(f, dropout="0.0"),
    "an unknown tokenizer": lambda f: change_settings(f, tokenizer="llama"),
    "a tokenizer elsewhere": lambda f: change_settings(f, tokenizer="/etc/passwd"),
    "tokenizer a list": lambda f: change_settings(f, tokenizer=["gpt2"]),
    "tokenizer file missing": lambda f: change_settings(f, tokenizer="tokenizer.json"),
    "tokenizer too large": lambda f: change_settings(f, tokenizer="gpt2"),
    "a weight missing": lambda f: change_weights(
        f, lambda s: {k: v for k, v in s.items() if k != "transformer.ln_f.weight"}
    ),
    "a weight too many": lambda f: change_weights(f, lambda s: s | {"extra": torch.zeros(1)}),
    "a transposed weight": lambda f: change_weights(
        f,
        lambda s: {k: v.T.contiguous() if "attn.c_attn.w" in k else v for k, v in s.items()},
    ),
    "integers": lambda f: change_weights(f, lambda s: {k: v.int() for k, v in s.items()}),
    "no weights at all": lambda f: change_weights(f, lambda s: {}),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_a_damaged_folder_is_one_sentence(folder: Path, damage: str) -> None:
    load_checkpoint(folder)  # undamaged it does load
    FOLDER_DAMAGES[damage](folder)
    refusal(folder)


GPT2_DAMAGES: dict[str, tuple[dict[str, object], str]] = {
    "n_head wrong": ({"n_head": 5}, "multiple of n_head"),
    "n_layer wrong": ({"n_layer": 4}, "Missing key"),
    "n_embd wrong": ({"n_embd": 28}, "size mismatch"),
    "n_positions missing": ({"n_positions": None}, "block_size"),
    "another activation": ({"activation_function": "relu"}, "activation_function"),
    "activation a list": ({"activation_function": ["gelu_new"]}, "activation_function"),
    "another inner width": ({"n_inner": 50}, "n_inner"),
    "unscaled attention": ({"scale_attn_weights": False}, "scale_attn_weights"),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention"),
    "no head of its own": ({"tie_word_embeddings": False}, "where lm_head.weight is missing"),
    "another family": ({"model_type": "llama"}, "model=hugging_face reads 'llama'"),
}


@pytest.mark.parametrize("damage", GPT2_DAMAGES)
def test_a_published_folder_that_is_another_model_is_refused(
    published: tuple[object, Path], tmp_path: Path, damage: str
) -> None:
    changes, words = GPT2_DAMAGES[damage]
    folder = shutil.copytree(published[1], tmp_path / "model")
    change_settings(folder, **changes)
    said = refusal(folder, tokenizer="byte")
    assert words in said
    assert "state_dict for" not in said
    assert str(folder) in said


def test_another_number_of_heads_that_divides_cannot_be_seen_in_shapes(
    published: tuple[object, Path], tmp_path: Path
) -> None:
    # no shape depends on it: the file's own word is all there is, so it must not be defaulted
    folder = shutil.copytree(published[1], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    del settings["n_head"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert "n_head" in refusal(folder, tokenizer="byte")


@pytest.mark.parametrize("kind", ["text", "image", "safetensors"])
def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / {"text": "a.txt", "image": "a.png", "safetensors": "a.safetensors"}[kind]
    if kind == "safetensors":
        save_file({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(b"hello\nworld\n" if kind == "text" else b"\x89PNG\r\n\x1a\n" + bytes(99))
    assert path.name in refusal(path)


def test_an_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "source", ["no/such/folder/at/all", "missing.pt", "/missing", "has space", "x" * 5000, "a\0b"]
)
def test_a_missing_file_is_one_sentence(source: str) -> None:
    assert "there is no model" in refusal(source)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-that-is-nowhere"])
def test_a_hub_name_without_a_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refusal(name)
    assert "could not be downloaded" in message
    assert "your login, or give a local folder" in message


def test_a_tokenizer_that_does_not_fit_or_exist_is_one_sentence(checkpoint_folder: Path) -> None:
    assert "has 50257 ids" in refusal(checkpoint_folder, tokenizer="gpt2")
    assert "must be gpt2, byte" in refusal(checkpoint_folder, tokenizer="nowhere")


def test_what_is_saved_next_to_it_is_the_tokenizer_it_names(folder: Path) -> None:
    assert load_checkpoint(folder).tokenizer.n_vocab == load_tokenizer("byte").n_vocab


def test_the_bundled_stateful_model_has_a_gate_that_does_something() -> None:
    checkpoint = load_checkpoint("bundled_stateful")
    model = checkpoint.model
    assert checkpoint.trained_passes == 3
    assert model.gate is not None
    tokens = torch.tensor([checkpoint.tokenizer.encode_ordinary("It was a truth")])
    plain = model(tokens)
    shifted = torch.cat([torch.zeros_like(plain[:, :1]), plain[:, :-1]], dim=1)
    fed = model.read(tokens, modulation=Modulation(hidden=shifted))
    assert torch.equal(fed[:, 0], plain[:, 0]), "nothing came before the first token"
    assert (fed[:, 1:] - plain[:, 1:]).abs().max() > 0.01


@pytest.mark.parametrize("passes", [0, "three", True])
def test_an_impossible_number_of_trained_passes_is_refused(
    make_gpt: Make, tmp_path: Path, passes: object
) -> None:
    save_checkpoint(make_gpt(1, vocab_size=257), tmp_path / "m", tokenizer="byte", trained_passes=2)
    assert load_checkpoint(tmp_path / "m").trained_passes == 2
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "trained_passes": passes}))
    with pytest.raises(CheckpointError, match="trained_passes must be a whole number"):
        load_checkpoint(tmp_path / "m")
