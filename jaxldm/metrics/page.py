"""A page of figures: one HTML file with its pictures in it, no scripts and no other hosts.

`jaxldm inspect` makes one, and every training run (`jaxldm.training.report`).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

# Pictures that are in the page, and nothing from elsewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; }
body { font: 17px/1.55 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 62rem; }
h1 { line-height: 1.2; margin-bottom: 0.2rem; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid #8886; }
h3 { margin-top: 2rem; }
p, li { max-width: 44rem; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption { font-size: 0.88em; opacity: 0.8; max-width: 44rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 0.25rem 1.2rem 0.25rem 0; }
th { font-weight: 600; } tr + tr { border-top: 1px solid #8884; }
nav ul { padding-left: 1.2rem; } code { font-size: 0.92em; }
.note { border-left: 4px solid #d9a400; padding: 0.2rem 0 0.2rem 0.9rem; }
"""


class Shown(NamedTuple):
    """A figure: the content of a PNG, what it shows in one line (also for who cannot see it)."""

    png: bytes
    caption: str


class Table(NamedTuple):
    """Names and values, of plain text."""

    rows: Sequence[tuple[str, str]]


class Section(NamedTuple):
    """A part of the page: paragraphs and figures in their order.

    Attributes:
        title: its heading.
        parts: text is a paragraph, of plain text; a `Shown` is a figure, a `Table` a table.
        note: what is missing, and how to get it; "" for nothing.
    """

    title: str
    parts: Sequence[str | Shown | Table]
    note: str = ""


def page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> bytes:
    """The HTML file: a heading, a table of facts, a list of what follows, the sections."""
    places = [f"section-{number}" for number, _ in enumerate(sections)]
    links = "".join(
        f'<li><a href="#{place}">{html.escape(section.title)}</a></li>\n'
        for place, section in zip(places, sections, strict=True)
    )
    body = "".join(_section(place, section) for place, section in zip(places, sections, strict=True))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{_table(Table(facts))}<nav><ul>
{links}</ul></nav>
{body}</body>
</html>
""".encode()


def _section(place: str, section: Section) -> str:
    parts = "".join(map(_part, section.parts))
    note = f'<p class="note">{html.escape(section.note)}</p>\n' if section.note else ""
    return f'<section id="{place}">\n<h2>{html.escape(section.title)}</h2>\n{parts}{note}</section>\n'


def _part(part: str | Shown | Table) -> str:
    if isinstance(part, Shown):
        return _figure(part)
    return _table(part) if isinstance(part, Table) else _paragraph(part)


def _table(table: Table) -> str:
    rows = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>\n" for a, b in table.rows)
    return f"<table>\n{rows}</table>\n"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n"


def _figure(shown: Shown) -> str:
    caption, data = html.escape(shown.caption), base64.b64encode(shown.png).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )
