"""Tokenizers: published ids, round trips of any text, and files that are none."""

import base64
import json
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_gpt.tokenizer import (
    SPLIT_PATTERN,
    TokenizerError,
    byte_tokenizer,
    decode,
    end_token,
    gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
    token_text,
    train_bpe,
)

SENTENCE = "the ship came in at dawn and nobody, not even Ana's mother, knew 1 2 34 — café naïve"


def corpus() -> list[str]:
    random.seed(0)
    return [" ".join(random.choices(SENTENCE.split(), k=200)) for _ in range(20)]


@pytest.fixture(scope="module")
def trained() -> object:
    return train_bpe(corpus(), vocab_size=300, name="trained")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        (" the", [262]),
        ("This is a test", [1212, 318, 257, 1332]),
    ],
)
def test_gpt2_gives_the_published_ids(text: str, ids: list[int]) -> None:
    assert gpt2_tokenizer().encode_ordinary(text) == ids
    assert decode(gpt2_tokenizer(), ids) == text


def test_gpt2_has_50257_ids_the_last_of_which_ends_a_text() -> None:
    encoding = load_tokenizer("gpt2")
    assert encoding.n_vocab == 50257
    assert end_token(encoding) == 50256
    assert token_text(encoding, 50256) == "<|endoftext|>"


def test_bytes_are_their_own_ids() -> None:
    encoding = load_tokenizer("byte")
    assert encoding.n_vocab == 257
    assert end_token(encoding) == 256
    assert encoding.encode_ordinary("aé") == [97, 0xC3, 0xA9]


@given(text=st.text(max_size=60))
def test_any_text_comes_back(trained: object, text: str) -> None:
    for encoding in (gpt2_tokenizer(), byte_tokenizer(), trained):
        ids = encoding.encode_ordinary(text)
        assert all(0 <= i < encoding.n_vocab for i in ids)
        assert decode(encoding, ids) == text
    assert byte_tokenizer().encode_ordinary(text) == list(text.encode())


@given(text=st.text(max_size=40))
def test_the_end_token_is_never_made_from_text(text: str) -> None:
    for encoding in (gpt2_tokenizer(), byte_tokenizer()):
        assert end_token(encoding) not in encoding.encode_ordinary(text + "<|endoftext|>")


def test_training_gives_the_size_asked_for_and_merges(trained: object) -> None:
    assert trained.n_vocab == 300
    assert end_token(trained) == 299
    text = corpus()[0]
    assert len(trained.encode_ordinary(text)) < 0.7 * len(text.encode())


def test_a_saved_bpe_comes_back_identical(trained: object, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    save_tokenizer(trained, path)
    loaded = load_tokenizer(path)
    assert loaded.ranks == trained.ranks
    assert loaded.end_tokens == trained.end_tokens
    assert (loaded.name, loaded.n_vocab) == (trained.name, trained.n_vocab)
    for text in (*corpus()[:3], "unseen: ☃ \n\n\t x"):
        assert loaded.encode_ordinary(text) == trained.encode_ordinary(text)
    again = tmp_path / "again.json"
    save_tokenizer(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_tiktokens_own_list_of_ranks_is_a_tokenizer_file(trained: object, tmp_path: Path) -> None:
    path = tmp_path / "ranks.tiktoken"
    lines = [
        base64.b64encode(token) + b" " + str(rank).encode() for token, rank in trained.ranks.items()
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    loaded = load_tokenizer(path)
    assert loaded.encode_ordinary(corpus()[0]) == trained.encode_ordinary(corpus()[0])
    assert loaded.n_vocab == 300


def json_file(**changes: object) -> bytes:
    content: dict[str, object] = {
        "format": "stateful_gpt.bpe/1",
        "name": "x",
        "pattern": SPLIT_PATTERN,
        "special_tokens": {"<|endoftext|>": 256},
        "ranks": [base64.b64encode(bytes([b])).decode() for b in range(256)],
    }
    content |= changes
    return json.dumps({k: v for k, v in content.items() if v is not None}).encode()


def rank_lines(*extra: bytes) -> bytes:
    lines = [base64.b64encode(bytes([b])) + b" " + str(b).encode() for b in range(256)]
    return b"\n".join([*lines, *extra])


def test_the_undamaged_files_do_load(tmp_path: Path) -> None:
    for raw in (json_file(), rank_lines()):
        path = tmp_path / "file"
        path.write_bytes(raw)
        assert load_tokenizer(path).encode_ordinary("ab") == [97, 98]


RANKS = json.loads(json_file())["ranks"]

DAMAGED = {
    "empty": b"",
    "prose": b"This is no tokenizer.\nNot at all.\n",
    "binary": bytes(range(128, 256)) * 40,
    "half of the JSON": json_file()[:1500],
    "JSON of another kind": b'{"hello": 1}',
    "another format": json_file(format="other/1"),
    "no name": json_file(name=None),
    "no pattern": json_file(pattern=None),
    "no special tokens": json_file(special_tokens=None),
    "no ranks": json_file(ranks=None),
    "ranks a number": json_file(ranks=5),
    "ranks of numbers": json_file(ranks=[1, 2, 3]),
    "ranks not base64": json_file(ranks=["%%%", *RANKS]),
    "a byte missing": json_file(ranks=RANKS[:255]),
    "a token twice": json_file(ranks=[*RANKS, RANKS[3]]),
    "special tokens a list": json_file(special_tokens=["<|endoftext|>"]),
    "special id inside the ranks": json_file(special_tokens={"<|endoftext|>": 7}),
    "special id a text": json_file(special_tokens={"<|endoftext|>": "256"}),
    "special ids shared": json_file(special_tokens={"<|endoftext|>": 256, "<|x|>": 256}),
    "special id too large": json_file(special_tokens={"<|endoftext|>": 2**70}),
    "a pattern that does not compile": json_file(pattern="(("),
    "a pattern that is a number": json_file(pattern=5),
    "a pattern that is empty": json_file(pattern=""),
    "a pattern that goes back for ever": json_file(pattern=r"(\s*)*$|(x+x+)+y"),
    "a pattern that matches nothing": json_file(pattern=r"(?!)"),
    "a pattern that leaves letters out": json_file(pattern=r"\s+"),
    "another special token": json_file(special_tokens={"<|x|>": 256}),
    "a special token without a name": json_file(special_tokens={"": 256}),
    "a special id far away": json_file(special_tokens={"<|endoftext|>": 2**31}),
    "a name that is a list": json_file(name=["x"]),
    "a name of a megabyte and no format": json_file(format="x" * 10**6),
    "a key twice": json_file().replace(b"{", b'{"name": "y", ', 1),
    "JSON nested too deeply": b'{"a":' * 100_000,
    "half of the lines": rank_lines()[:1000],
    "a line without a rank": rank_lines(b"YWI="),
    "a rank that is no number": rank_lines(b"YWI= x"),
    "a rank twice": rank_lines(b"YWI= 255"),
    "a negative rank": rank_lines(b"YWI= -1"),
    "a rank too large": rank_lines(b"YWI= 99999999999999999999"),
    "a line not base64": rank_lines(b"%%% 256"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize("name", ["no-such-file", "", "a/b", "x" * 5000])
def test_an_unknown_name_says_what_is_allowed(name: str) -> None:
    with pytest.raises(TokenizerError, match="must be gpt2, byte or a readable file") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="must be gpt2, byte or a readable file"):
        load_tokenizer(tmp_path)


def test_token_text_shows_bytes_that_are_no_whole_character() -> None:
    encoding = byte_tokenizer()
    assert token_text(encoding, ord("a")) == "a"
    assert token_text(encoding, 0xE2) == "\\xe2"
    gpt2 = gpt2_tokenizer()
    ids = gpt2.encode_ordinary("☃")  # three bytes over more than one token
    assert len(ids) > 1
    assert all("\\x" in token_text(gpt2, i) for i in ids)
    assert token_text(gpt2, 262) == " the"


@pytest.mark.parametrize("token_id", [257, 50300, 10**9])
def test_an_id_outside_the_vocabulary_shows_as_itself(token_id: int) -> None:
    assert token_text(byte_tokenizer(), token_id) == f"<id {token_id}>"
    assert decode(byte_tokenizer(), [97, token_id, 98]) == f"a<id {token_id}>b"


def test_decoding_joins_bytes_before_reading_characters() -> None:
    assert decode(byte_tokenizer(), list("é☃".encode())) == "é☃"
    assert decode(byte_tokenizer(), list("é☃".encode())[:-1]) == "é\N{REPLACEMENT CHARACTER}"


# --- long runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["a", "1", "!", "☃", "\x1c", " ", "\n", "\r", "\t", "\u3000"])
def test_a_megabyte_of_one_character_is_a_text_like_any_other(character: str) -> None:
    text = "It was" + character * 300_000 + "x"
    assert decode(gpt2_tokenizer(), gpt2_tokenizer().encode_ordinary(text)) == text


def test_a_text_that_tiktoken_has_no_stack_for_is_one_sentence() -> None:
    with pytest.raises(TokenizerError, match=r"^tiktoken cannot encode the text: .*StackOverflow"):
        gpt2_tokenizer().encode_ordinary("x" + " " * 2_000_000 + "x")


# --- nanoGPT's meta.pkl ---------------------------------------------------------------------------

ALPHABET = "\n abcé☃"


def meta(characters: str = ALPHABET, **changes: object) -> dict[str, object]:
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    } | changes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_characters_of_nanogpt_are_their_ids(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta(), protocol=protocol))
    encoding = load_tokenizer(tmp_path / "meta.pkl")
    assert encoding.n_vocab == len(ALPHABET)
    assert end_token(encoding) is None
    assert encoding.encode_ordinary("a☃\n") == [2, 6, 0]
    assert decode(encoding, [2, 6, 0, 7]) == "a☃\n<id 7>"
    assert token_text(encoding, 5) == "é"
    save_tokenizer(encoding, tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode_ordinary(ALPHABET) == list(range(len(ALPHABET)))


@pytest.mark.parametrize(("text", "named"), [("abQ", "'Q' at position 2"), ("\x1b", r"'\x1b' at")])
def test_a_character_outside_the_vocabulary_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta()))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path / "meta.pkl").encode_ordinary(text)
    assert named in str(caught.value)


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


PICKLES: dict[str, bytes] = {
    "a list": pickle.dumps([1, 2]),
    "another dict": pickle.dumps({"a": 1}),
    "stoi a list": pickle.dumps(meta(stoi=["a"])),
    "stoi empty": pickle.dumps(meta(stoi={})),
    "words": pickle.dumps(meta(stoi={"ab": 0})),
    "ids that are texts": pickle.dumps(meta(stoi={"a": "0"})),
    "ids that are truth values": pickle.dumps(meta(stoi={"a": False})),
    "ids with a gap": pickle.dumps(meta(stoi={"a": 0, "b": 2})),
    "an id twice": pickle.dumps(meta(stoi={"a": 0, "b": 0})),
    "an id of 2000 bytes": pickle.dumps(meta(stoi={"a": 2**16000})),
    "half a character": pickle.dumps(meta(stoi={"\udc80": 0})),
    "bytes": pickle.dumps(meta(stoi={b"a": 0})),
    "a class": pickle.dumps(meta(more=Path)),
    "an array": pickle.dumps(bytearray(9), protocol=5),
    "cut in the middle": pickle.dumps(meta())[:40],
    "nothing but its protocol": b"\x80\x04",
    "without an end": b"\x80\x04}",
    "an empty stack": b"\x80\x04s.",
    "a memo of 16 GB": b"\x80\x04}r\xff\xff\xff\x7f.",
    "a text longer than the file": b"\x80\x04X\xff\xff\xff\x7fa.",
    "a list as a key": b"\x80\x04}(]K\x01u.",
}


@pytest.mark.parametrize("damage", PICKLES)
def test_any_other_pickle_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(PICKLES[damage])
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300
    assert "\n" not in str(caught.value)


def test_a_meta_pkl_without_its_characters_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "b"}}))
    with pytest.raises(TokenizerError, match="it lacks 'stoi'"):
        load_tokenizer(tmp_path / "meta.pkl")


def test_code_in_a_meta_pkl_does_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "meta.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps(meta(more=RunsCode(marker))))
    with pytest.raises(TokenizerError, match="more than dicts"):
        load_tokenizer(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the same file does run its code where that is allowed
    assert marker.exists()


def test_bytes_of_a_model_of_256_ids_have_no_end() -> None:
    encoding = load_tokenizer("byte", vocab_size=256)
    assert (encoding.n_vocab, end_token(encoding)) == (256, None)
    assert load_tokenizer("byte", vocab_size=257).n_vocab == 257
