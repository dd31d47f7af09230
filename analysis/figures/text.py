"""Text of any token made visible: spaces and newlines shown, unprintable characters spelt out.

Every character that comes back is in DejaVu Sans, the font that ships with matplotlib, so that no
figure warns or shows an empty box. Knows nothing of tokenizers.
"""

from __future__ import annotations

import unicodedata
from functools import cache

from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

SHOWN_AS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
# control, format, surrogate, private, unassigned; marks; separators: nothing to see on their own
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Mn", "Me", "Mc", "Zl", "Zp", "Zs"})


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())


def visible(text: str, *, spaces: bool = True) -> str:
    """`"\\n the"` becomes `"↵␣the"`; what the font lacks becomes its code point."""
    return "".join(_shown(character, spaces=spaces) for character in text)


def _shown(character: str, *, spaces: bool) -> str:
    if character == " " and not spaces:
        return " "
    shown = SHOWN_AS.get(character, character)
    if ord(shown) not in _glyphs() or unicodedata.category(shown) in UNSEEN:
        return f"⟨{ord(character):X}⟩"
    return shown


def short(text: str, length: int) -> str:
    """At most `length` characters, with the middle left out."""
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def token_label(token: str, position: int, *, length: int = 16) -> str:
    """Token, then position: `␣the  12`."""
    return f"{short(visible(token), length)}  {position}"


def prompt_name(prompt_id: str, length: int = 40) -> str:
    """A prompt's id, fit for a title."""
    return short(visible(prompt_id, spaces=False), length)


def opening(text: str, length: int) -> str:
    """The beginning of a prompt, on one line, in quotation marks."""
    shown = visible(text, spaces=False)
    return f"“{shown}”" if len(shown) <= length else f"“{shown[: length - 1].rstrip()}…”"
