"""Fast tokenizers of Hugging Face with the face of the project's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from stateful_gpt.hugging_face_folder import HuggingFaceTokenizer
from stateful_gpt.tokenizer import TokenizerError, decode, token_text

TEXT = "Ein Bär 🐻 sagt:\n\t<end> ½"


def byte_level() -> Tokenizer:
    """Single bytes, one merge, an end token that is special and a word that is added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"in": 300}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("i", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.add_tokens(["Bär"])
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    return backend


def sentence_pieces() -> Tokenizer:
    """Pieces with spaces as ▁, single bytes for the rest, and a start token, as Llama has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "E", "i", "n", "B", "r", "▁B", "in"]
    merges = [("▁", "B"), ("i", "n")]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend


def test_the_bytes_of_byte_level_tokens_are_the_text() -> None:
    encoding = HuggingFaceTokenizer(byte_level(), name="bytes", end_tokens=[257])
    ids = encoding.encode_ordinary(TEXT)
    assert len(ids) > 6  # whole, neither cut nor padded
    assert b"".join(encoding.decode_single_token_bytes(i) for i in ids) == TEXT.encode()
    assert decode(encoding, ids) == TEXT
    assert encoding.start_tokens == ()
    assert token_text(encoding, 300) == "in"
    assert token_text(encoding, encoding.encode_ordinary("½")[0]) == r"\xc2"


def test_a_special_token_that_is_spelled_out_is_text() -> None:
    encoding = HuggingFaceTokenizer(byte_level(), name="bytes", end_tokens=[257])
    assert 257 not in encoding.encode_ordinary("<end>")
    assert encoding.decode_single_token_bytes(257) == b"<end>"
    assert encoding.end_tokens == (257,)


def test_a_hole_in_the_vocabulary_is_no_token() -> None:
    encoding = HuggingFaceTokenizer(byte_level(), name="bytes", end_tokens=[])
    assert encoding.n_vocab == 301
    for hole in (280, 301, -1, 2**40):
        with pytest.raises(KeyError):
            encoding.decode_single_token_bytes(hole)
    assert token_text(encoding, 280) == "<id 280>"


def test_sentence_pieces_begin_with_the_start_token_and_a_space() -> None:
    encoding = HuggingFaceTokenizer(sentence_pieces(), name="pieces", end_tokens=[2])
    assert encoding.start_tokens == (1,)
    ids = encoding.encode_ordinary(TEXT)
    assert ids[0] == 1
    assert ids[-1] != 2
    assert b"".join(encoding.decode_single_token_bytes(i) for i in ids[1:]) == b" " + TEXT.encode()
    assert encoding.decode_single_token_bytes(1) == b"<s>"


def bases(model: Callable[[dict[str, int]], Any]) -> Tokenizer:
    """Four letters, none of them an "a", behind a start token; nothing for what is unknown."""
    backend = Tokenizer(model({word: i for i, word in enumerate(["<s>", *"ACGT"])}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


# of an "a" the one raises, the other makes no ids
@pytest.mark.parametrize("model", [models.WordLevel, partial(models.BPE, merges=[])])
def test_the_start_token_is_found_where_there_is_no_a(
    model: Callable[[dict[str, int]], Any],
) -> None:
    encoding = HuggingFaceTokenizer(bases(model), name="bases", end_tokens=[])
    assert encoding.encode_ordinary("CAT") == [0, 2, 1, 4]


def test_a_text_that_has_no_ids_is_one_sentence() -> None:
    backend = bases(models.WordLevel)
    backend.add_tokens(["a"])  # the start token is found
    encoding = HuggingFaceTokenizer(backend, name="bases", end_tokens=[])
    with pytest.raises(TokenizerError, match=r"^the tokenizer 'bases' cannot encode the text: "):
        encoding.encode_ordinary("N")


@pytest.mark.parametrize("whole", [False, True])
def test_no_letter_is_left_out_silently(whole: bool) -> None:
    backend = bases(partial(models.BPE, merges=[]))
    if whole:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoding = HuggingFaceTokenizer(backend, name="bases", end_tokens=[])
    with pytest.raises(TokenizerError, match=r"^the tokenizer 'bases' .* 'N'$"):
        encoding.encode_ordinary("CANNAT")
    with pytest.raises(TokenizerError, match=r"character '\\x07'$"):
        encoding.encode_ordinary("CAT \a")
    assert encoding.encode_ordinary("C AT") == encoding.encode_ordinary("CAT")


def test_a_character_that_stands_for_the_unknown_is_an_id() -> None:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *"ACGT"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    encoding = HuggingFaceTokenizer(backend, name="bases", end_tokens=[])
    assert encoding.encode_ordinary("CAN") == [2, 1, 0]


def test_no_byte_is_left_out_silently() -> None:
    known = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"©"})  # of "é" the second half
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(known)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    encoding = HuggingFaceTokenizer(backend, name="half", end_tokens=[])
    assert decode(encoding, encoding.encode_ordinary(TEXT)) == TEXT
    with pytest.raises(TokenizerError, match=r"no id for the character 'é'$"):
        encoding.encode_ordinary("né")


@given(text=st.text(max_size=30))
def test_what_a_tokenizer_writes_in_another_way_is_not_left_out(text: str) -> None:
    for normalizer in (normalizers.NFKC(), normalizers.NFD(), normalizers.Lowercase()):
        backend = byte_level()
        backend.normalizer = normalizer
        encoding = HuggingFaceTokenizer(backend, name="bytes", end_tokens=[])
        written = normalizer.normalize_str(text)
        assert decode(encoding, encoding.encode_ordinary(text)) == written


def test_runs_of_spaces_that_were_added_are_spaces() -> None:
    backend = sentence_pieces()
    backend.add_tokens([AddedToken("▁▁", normalized=False)])  # as Gemma has them
    encoding = HuggingFaceTokenizer(backend, name="pieces", end_tokens=[])
    assert encoding.decode_single_token_bytes(backend.token_to_id("▁▁")) == b"  "


@pytest.mark.parametrize(
    ("model", "decoder"),
    [
        (models.WordPiece, decoders.WordPiece()),
        (models.WordLevel, None),
        (partial(models.BPE, merges=[], end_of_word_suffix="</w>"), decoders.BPEDecoder()),
    ],
)
def test_words_are_apart_as_the_decoder_has_them(model: Any, decoder: Any) -> None:
    words = ["<unk>", "the", "cat", "c", "##at", "##ty", "c</w>", "."]
    backend = Tokenizer(model({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    encoding = HuggingFaceTokenizer(backend, name="words", end_tokens=[])
    ids = [1, 2, 5, 3, 4, 6, 1, 7]
    assert decode(encoding, ids).lstrip() == backend.decode(ids)


def test_special_tokens_are_used_only_where_they_start_a_text() -> None:
    assert 257 not in HuggingFaceTokenizer(byte_level(), name="bytes", end_tokens=[]).used
    used = HuggingFaceTokenizer(sentence_pieces(), name="pieces", end_tokens=[]).used
    assert 1 in used
    assert 2 not in used
