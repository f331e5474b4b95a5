"""Pieces of HTML for the report: tables, folded parts, charts next to each other. All foreign text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Markup(str):
    """HTML of our own; any other text is escaped."""


def cells(values: Iterable[Any], tag: str = "td") -> str:
    """A table row; every value but Markup is escaped."""
    texts = (value if isinstance(value, Markup) else escape(str(value)) for value in values)
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def html_table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> Markup:
    body = "".join(cells(row) for row in rows)
    return Markup(f'<div class="wide"><table><thead>{cells(head, "th")}</thead><tbody>{body}</tbody></table></div>')


def folded(summary: str, content: str) -> Markup:
    return Markup(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def gallery(charts: Iterable[str]) -> Markup:
    """Charts next to each other, as many as fit."""
    return Markup('<div class="charts">' + "".join(f"<figure>{svg}</figure>" for svg in charts) + "</div>")


def share(success: int, n: int) -> Markup:
    """A cell with a share in %, its counts, and a bar behind it."""
    if not n:
        return Markup("-")
    rate = 100 * success / n
    return Markup(f'<span class="share" style="--share: {rate:.0f}%">{rate:.0f} <small>{success}/{n}</small></span>')
