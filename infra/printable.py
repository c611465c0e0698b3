"""Text of others, made fit for a terminal."""

from __future__ import annotations

import unicodedata

# Control and format characters, line and paragraph separators, halves of surrogate pairs.
ACTING = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def printable(text: str) -> str:
    """`text` with every character that acts on a terminal instead of standing in a line (line breaks, escape
    sequences, marks that turn the direction of writing) as its escape: `\\n`, `\\x1b`, `\\u202e`."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ACTING
        else character
        for character in text
    )
