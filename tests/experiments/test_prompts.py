"""The texts that are studied: built in, or from a file."""

import json
from pathlib import Path

import pytest

from experiments.converge.prompts import Prompt, content_hash, encode_prompts, read_prompts
from experiments.converge.settings import PromptSettings
from experiments.settings import ConfigError
from stateful_gpt.tokenizer import Characters, byte_tokenizer


def from_file(path: Path, *, limit: int | None = None) -> list[Prompt]:
    return read_prompts(PromptSettings(source="file", file=str(path), limit=limit))


def test_there_are_at_least_twelve_built_in_prompts_of_different_kinds() -> None:
    prompts = read_prompts(PromptSettings())
    assert len(prompts) >= 12
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    for wanted in ("prose", "dialogue", "list", "code", "arithmetic", "verse", "repetition"):
        assert wanted in {prompt.id for prompt in prompts}
    for prompt in prompts:
        assert prompt.text is not None
        assert len(prompt.text) >= 100, "long enough to settle slowly"


def test_a_txt_file_is_one_prompt_to_its_last_byte(tmp_path: Path) -> None:
    content = '\n First line.\r\nSecond – with a dash.\n\n{"id": 1}\n'
    path = tmp_path / "my text.txt"
    path.write_bytes(content.encode())
    assert from_file(path) == [Prompt(id="my text", text=content)]


def test_a_jsonl_file_holds_texts_or_tokens_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(
        '{"id": "b", "text": "Caf\\u00e9\\n"}\n\n{"id": "a", "tokens": [104, 105], "note": "hi"}\n'
    )
    prompts = from_file(path)
    assert prompts == [Prompt("b", "Café\n"), Prompt("a", None, [104, 105])]
    encoded = encode_prompts(
        prompts, byte_tokenizer(), max_tokens=None, block_size=32, vocab_size=257
    )
    assert [prompt.tokens for prompt in encoded] == [list("Café\n".encode()), [104, 105]]
    assert [prompt.text for prompt in encoded] == ["Café\n", "hi"]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"id": "a", "text": "b"}\n', encoding="utf-8-sig")
    assert from_file(path) == [Prompt("a", "b")]


def test_a_character_that_the_tokenizer_lacks_is_named_with_its_prompt_and_position() -> None:
    said = r"prompt 'b': the character '!' at position 2 is none of the 2 characters of letters"
    with pytest.raises(ConfigError, match=said):
        encode_prompts(
            [Prompt("a", "hi"), Prompt("b", "hi!")],
            Characters("letters", ["h", "i"]),
            max_tokens=None,
            block_size=32,
            vocab_size=2,
        )


def test_entries_without_an_id_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"text": "x"}\n\n{"id": "b", "text": "y"}\n{"tokens": [104]}\n')
    assert [prompt.id for prompt in from_file(path)] == ["1", "b", "3"]
    path.write_text("".join(f'{{"id": "{name}", "text": "x"}}\n' for name in ("", 3, "", "", 1)))
    assert [prompt.id for prompt in from_file(path)] == ["2", "3", "4", "5", "1"], "none twice"


def test_a_txt_file_split_into_lines_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(b"One, two.\r\n\n \n  three\nfo\fur")
    settings = PromptSettings(file=str(path), split="lines")
    assert read_prompts(settings) == [
        *(Prompt("1", "One, two."), Prompt("2", "  three"), Prompt("3", "fo\fur")),
    ]


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "text": "x"}) + "\n" for i in range(5)))
    assert [prompt.id for prompt in from_file(path, limit=2)] == ["0", "1"]
    assert len(from_file(path, limit=9)) == 5
    assert [p.id for p in read_prompts(PromptSettings(limit=1))] == ["prose"]


@pytest.mark.parametrize("entry", [{"text": "Hello, world"}, {"tokens": list(b"Hello, world")}])
def test_max_tokens_cuts_every_prompt(tmp_path: Path, entry: dict[str, object]) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"id": "a", **entry}) + "\n")
    (cut,) = encode_prompts(
        from_file(path), byte_tokenizer(), max_tokens=5, block_size=8, vocab_size=257
    )
    assert cut.tokens == list(b"Hello")
    assert cut.text == "Hello", "the text is what is studied, not what was cut away"


def test_the_end_of_text_marker_in_a_prompt_is_text(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_text("a<|endoftext|>")
    (encoded,) = encode_prompts(
        from_file(path), byte_tokenizer(), max_tokens=None, block_size=32, vocab_size=257
    )
    assert encoded.tokens == list(b"a<|endoftext|>")


def test_the_hash_tells_apart_what_json_could_confuse() -> None:
    prompts = [
        [Prompt("a", "b"), Prompt("c", "d")],
        [Prompt("a", "b"), Prompt("d", "c")],
        [Prompt("c", "d"), Prompt("a", "b")],
        [Prompt("a", "b"), Prompt("c", None, [100])],
        [Prompt("a", "b")],
        [Prompt("a", 'b"], ["c", "d')],
    ]
    assert len({content_hash(several) for several in prompts}) == len(prompts)
    assert content_hash(prompts[0]) == content_hash(list(prompts[0]))
