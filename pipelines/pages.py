"""Pages that need no other file and no network: templates beside this module, pictures as `data:` URIs."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Mapping
from string import Template


def page(template: str, **parts: str) -> str:
    """The template's page with its parts put in; parts are HTML already."""
    folder = importlib.resources.files("pipelines") / "templates"
    styles = (folder / "page.css").read_text(encoding="utf-8")
    return Template((folder / template).read_text(encoding="utf-8")).substitute(parts, page_css=styles)


def text(value: object) -> str:
    """`value` as text in HTML or in a quoted attribute: names of files are untrusted."""
    return html.escape(str(value), quote=True)


def fact_list(facts: Mapping[str, object]) -> str:
    """The inside of a `dl.facts`."""
    return "\n".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
