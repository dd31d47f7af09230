"""A folder of transformers: its model and its tokenizer, and that they belong together."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stateful_gpt.console import cut
from stateful_gpt.hugging_face import HuggingFaceModel, one_sentence, quiet, require_float64
from stateful_gpt.tokenizer import TOKENIZER_FILES, Tokenizer, TokenizerError, load_tokenizer, shown
from stateful_gpt.untrusted import TOKENIZER_SIZE, CheckpointError, open_regular, require_memory
from stateful_gpt.weights import MASK_BUFFER, SHARDS, WEIGHTS

HISTORY = "trainer_state.json"  # of a training: no more than hashed, and may be large
FILES = ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt")  # all that is read
# without a network, and without code that lies in a folder
_SAFELY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_ATTENTION = "eager"  # a model's settings may name one that is code from the hub
_LAYERS = re.compile(r'"(?:n|num|num_hidden|\w*decoder)_layers?": (\d+)')  # how many a model states
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # as SentencePiece spells one


def read_hugging_face(
    folder: Path,
    tokenizer: str | Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[HuggingFaceModel, Tokenizer]:
    """The model of a folder, and the tokenizer that is named, or else its own."""
    for pattern in (*FILES, "*.jinja", "*/*.jinja"):  # templates of chats are read with the rest
        for file in filter(Path.exists, folder.glob(pattern)):
            # transformers would wait for a pipe, and read settings that no memory holds
            bounded = file.suffix != ".safetensors" and file.name != HISTORY
            open_regular(file, most=TOKENIZER_SIZE if bounded else sys.maxsize).close()
    model = _read_model(folder, dtype).to(device)
    adapter = HuggingFaceModel(model)
    encoding = (
        load_tokenizer(tokenizer, vocab_size=adapter.vocab_size)
        if tokenizer
        else _own_tokenizer(folder, model)
    )
    # special tokens may lie beyond the embeddings: no text has them
    largest = max(getattr(encoding, "used", (encoding.n_vocab - 1,)))
    if largest >= adapter.vocab_size:
        raise CheckpointError(
            f"the tokenizer {cut(repr(encoding.name))} uses the id {largest}, but {folder} has"
            f" only {adapter.vocab_size} embeddings"
        )
    return adapter, encoding


def _read_model(folder: Path, dtype: torch.dtype) -> Any:
    """The causal model in a folder; its weights must be those of its architecture."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no safetensors (weights in other formats, pickles above all, are not"
            " read)"
        )
    wide = dtype == torch.float64
    with _loading(folder, "causal model") as transformers:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            # without it, _attn_implementation in the file would overrule the argument below
            config=_checked_settings(transformers, folder, dtype),
            # float64 by way of float32: what is computed when a model is made is the same then
            dtype=torch.float32 if wide else dtype,
            use_safetensors=True,
            attn_implementation=_ATTENTION,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
            **_SAFELY,
        )
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    if rotary and int(transformers.__version__.split(".")[0]) < 5:
        raise CheckpointError(
            f"{folder} was written by transformers 5, whose rotary settings"
            f" {transformers.__version__} would pass over: load it with transformers 5"
        )
    if wide:
        require_float64(model)
    found["unexpected_keys"] = [k for k in found["unexpected_keys"] if not MASK_BUFFER.search(k)]
    kinds = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}
    for kind, what in kinds.items():
        for key in sorted(found[f"{kind}_keys"], key=str)[:1]:
            name = key if isinstance(key, str) else key[0]  # with both shapes
            raise CheckpointError(
                f"the weights in {folder} are not those of its architecture: {name} is {what}"
            )
    return model.double() if wide else model


def _own_tokenizer(folder: Path, model: Any) -> Tokenizer:
    """The tokenizer in a folder; GPT-2's own for a GPT-2 that comes without one."""
    holders = (model.config.get_text_config(), model.generation_config)
    stated = [getattr(holder, "eos_token_id", None) for holder in holders]
    if not any(file.is_file() for name in TOKENIZER_FILES for file in folder.glob(name)):
        if model.config.model_type == "gpt2" and all(i in (None, 50256, [50256]) for i in stated):
            return load_tokenizer("gpt2")
        raise CheckpointError(
            f"{folder} has no tokenizer: name one (gpt2, byte or a file), or copy its own there"
        )
    with _loading(folder, "tokenizer") as transformers:
        found = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, **_SAFELY)
    if not hasattr(found, "backend_tokenizer"):
        raise CheckpointError(f"the tokenizer in {folder} has no fast form (tokenizer.json)")
    ids = (i for e in (*stated, found.eos_token_id) for i in (e if isinstance(e, list) else [e]))
    ends = sorted({i for i in ids if type(i) is int and i >= 0})  # -1, or a word, ends nothing
    return HuggingFaceTokenizer(found.backend_tokenizer, name=folder.name, end_tokens=ends)


def _checked_settings(transformers: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Settings whose sizes the files bear out and memory holds, before anything is made of them."""
    files = list(folder.glob("*.safetensors"))
    # of the file for this version of transformers, if there are several
    settings, _ = transformers.PretrainedConfig.get_config_dict(folder, **_SAFELY)
    sharded = (folder / SHARDS).exists() and not (folder / WEIGHTS).exists()
    parts = {settings.get("transformers_weights") or (SHARDS if sharded else WEIGHTS)}
    for index in parts & {file.name for file in folder.glob("*.json")}:
        parts = set(json.loads((folder / index).read_bytes())["weight_map"].values())
    for name in sorted(parts - {file.name for file in files}):  # nothing else was looked at
        raise CheckpointError(f"{folder} lacks {cut(repr(name))}, a part of its weights")
    headers: list[Any] = [safe_open(file, "pt") for file in files]
    tensors = sum(len(header.keys()) for header in headers)
    # before they are read: the settings of some models list their layers
    layers = max(map(int, _LAYERS.findall(json.dumps(settings))), default=0)
    if layers > tensors:
        raise CheckpointError(
            f"{folder}: the sizes it states take {layers:,} layers; it has {tensors:,} weights"
        )
    config = transformers.AutoConfig.from_pretrained(folder, dtype=dtype, **_SAFELY)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=_ATTENTION, trust_remote_code=False
        )
    weights, stored = made.num_parameters(), sum(file.stat().st_size for file in files)
    held = [*made.parameters(), *made.buffers()]  # and tables that some models hold as neither
    held += [x for m in made.modules() for x in vars(m).values() if isinstance(x, torch.Tensor)]
    if weights > 8 * stored:  # no format has less than a bit for one
        raise CheckpointError(
            f"{folder}: the sizes it states take {weights:,} weights; it has {stored:,} bytes"
        )
    require_memory(sum(tensor.nbytes for tensor in held), f"{folder}: it needs")
    return config


@contextmanager
def _loading(folder: Path, what: str) -> Iterator[Any]:
    """Transformers, silenced; what it raises about a folder becomes one sentence."""
    try:
        import transformers
    except ImportError:
        helps = "pip install -e '.[hugging_face]' -c constraints.txt"
        raise CheckpointError(f"models of Hugging Face need transformers: {helps}") from None
    with quiet(), one_sentence(f"{folder} is not a {what} that transformers loads"):
        yield transformers


class HuggingFaceTokenizer:
    """What this project asks of a tokenizer, of a ``tokenizers.Tokenizer``, which it takes over."""

    def __init__(self, backend: Any, *, name: str, end_tokens: Sequence[int]) -> None:
        from tokenizers.models import BPE
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        backend.encode_special_tokens = True  # one that is spelled out in a text is text
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._special = {i for i, token in self._added.items() if token.special}
        self._byte_level = "ByteLevel" in str(backend.decoder)
        # without a decoder, tokenizers writes a space between any two
        self._join = " ".join if backend.decoder is None else backend.decoder.decode
        self._follower = self._join(["a", "a"])[1:]  # the second, and a space where there is one
        # of the characters of a byte-level vocabulary, as GPT-2 has them
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        vocabulary, model = backend.get_vocab(), backend.model
        # the one kind that leaves out what it has no id for, and says nothing
        self._silent = isinstance(model, BPE) and not (model.unk_token or model.byte_fallback)
        self._lacking = {self._bytes[one] for one in self._bytes.keys() - vocabulary.keys()}
        self.name = name
        self.n_vocab = max(vocabulary.values()) + 1  # there may be holes below it
        self.start_tokens = self._start()
        self.end_tokens = tuple(end_tokens)
        # that encode_ordinary can produce
        self.used = (set(vocabulary.values()) - self._special).union(self.start_tokens)

    def _start(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text."""
        words = (word for word, i in self._backend.get_vocab().items() if i not in self._special)
        for text in ("a", *words):
            with suppress(TokenizerError):  # some vocabularies have no "a"
                if self._ids(text):
                    whole = self._backend.encode(text)
                    return tuple(whole.ids[: whole.special_tokens_mask.index(0)])
        return ()

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text behind the start token, if the model was trained with one."""
        return [*self.start_tokens, *self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises no other kind
            raise TokenizerError(
                f"the tokenizer {cut(repr(self.name))} cannot encode the text: {cut(error)}"
            ) from None
        if left_out := self._left_out(text):
            raise TokenizerError(
                f"the tokenizer {cut(repr(self.name))} has no id for the character"
                f" {shown(left_out)}"
            )
        return ids

    def _left_out(self, text: str) -> str | None:
        """The first character that no id stands for; white space may have none."""
        if not self._silent or (self._byte_level and not self._lacking):
            return None
        if self._backend.normalizer is not None:  # spans are exact only of what it leaves as it is
            text = self._backend.normalizer.normalize_str(text)
        if self._byte_level:
            return next((c for c in text if not self._lacking.isdisjoint(c.encode())), None)
        reached = 0
        spans = self._backend.encode(text, add_special_tokens=False).offsets
        for begin, end in (*spans, (len(text), len(text))):
            if gap := text[reached:begin].strip():  # spans behind one are shifted: it tells no name
                words = self._backend.get_vocab()
                return str(next((c for c in text if not c.isspace() and c not in words), gap[0]))
            reached = max(reached, end)
        return None

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one id; KeyError where there is none."""
        text = self._backend.id_to_token(token) if 0 <= token < self.n_vocab else None
        if text is None:
            raise KeyError(token)
        if self._byte_level:
            if token not in self._added and self._bytes.keys() >= set(text):
                return bytes(self._bytes[character] for character in text)
            return str(text).encode()
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        between: str = self._join(["a", text, "a"])  # as decoders write it inside a text
        return between[1:].removesuffix(self._follower).encode()
