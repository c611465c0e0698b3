"""A tree of facts as lines of text.

nst 3
│  digest  5f1c
├─ training run
│     status  finished
└─ evaluation
      none yet
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import click

from infra.printable import printable

MIN_WIDTH = 40  # of a value, however deep it stands


@dataclass(frozen=True, kw_only=True)
class Node:
    """`facts` are (label, value), a value without a label standing by itself; empty values are left out."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)


def draw(root: Node, *, width: int = 100, is_styled: bool = False) -> list[str]:
    """One string a line, at most `width` wide but for words that are longer (a URI is never broken).
    `is_styled` sets titles in bold and the branches dim, by terminal codes."""
    return _drawn(root, "", "", width, is_styled)


def _drawn(node: Node, first: str, rest: str, width: int, is_styled: bool) -> list[str]:
    def line(branches: str, text: str, *, is_title: bool = False) -> str:
        if not is_styled:
            return f"{branches}{text}".rstrip()
        return click.style(branches, dim=True) + (click.style(text, bold=True) if is_title else text)

    title = _wrapped(node.title, width - len(first))
    branch = rest + ("│  " if node.children else "   ")
    lines = [line(first if number == 0 else rest, text, is_title=True) for number, text in enumerate(title)]
    facts = [(label, value) for label, value in node.facts if value]
    label_width = max((len(label) + 2 for label, _ in facts if label), default=0)
    for label, value in facts:
        indent = label_width if label else 0
        for number, text in enumerate(_wrapped(value, width - len(branch) - indent)):
            lines.append(line(branch, f"{label if number == 0 else '':{indent}}{text}"))
    for child in node.children:
        is_last = child is node.children[-1]
        below = rest + ("   " if is_last else "│  ")
        lines += _drawn(child, rest + ("└─ " if is_last else "├─ "), below, width, is_styled)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of `text`, made printable. A no-break space keeps two words together and is shown as a space."""
    lines = textwrap.wrap(
        printable(text),
        max(MIN_WIDTH, width),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return [line.replace("\u00a0", " ") for line in lines] or [""]
