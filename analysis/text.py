"""Text of any origin made safe and visible, for the terminal, tables, CSV and figures alike.

Knows nothing of tokenizers and fonts.
"""

import unicodedata
from collections.abc import Sequence

SHOWN_AS = {" ": "␣", "\n": "↵", "\t": "⇥", "\u00a0": "⍽"}
# control, format (bidi among them), surrogate, private, unassigned, line and paragraph separators
UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str, *, keep: str = "") -> str:
    """The text without a character that could steer a terminal or turn its reading direction.

    Such characters are spelt out, ESC as ⟨1B⟩, but for those in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(
        f"⟨{ord(one):X}⟩" if unicodedata.category(one) in UNSAFE and one not in keep else one
        for one in text
    )


def visible(text: str, *, spaces: bool = True) -> str:
    """`"\\n the"` becomes `"↵␣the"`: for a single line in which white space must be seen."""
    shown = "".join(one if one == " " and not spaces else SHOWN_AS.get(one, one) for one in text)
    return printable(shown)


def short(text: str, length: int) -> str:
    """At most `length` characters, with the middle left out."""
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def some(names: Sequence[str], most: int = 20) -> str:
    """The names, or the first of very many."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def number(value: float) -> str:
    """Shortest plain spelling, with a true minus sign; −0 is 0."""
    return f"{value + 0.0:.12g}".replace("-", "\u2212")
