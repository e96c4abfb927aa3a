"""HTML as text, escaped where text enters. Knows no report, style or layout."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias, Union

VOID = {"br", "link", "meta"}
# Characters that HTML forbids or that nobody sees become visible ones: control characters their
# pictures, halves of a surrogate pair and C1 controls the replacement character.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD),
}


class Markup(str):
    """Text that is HTML already; all other text is escaped where it becomes a child."""


Child: TypeAlias = Union[str, Iterable["Child"], None]  # noqa: UP007, the union names itself


def escaped(text: str) -> Markup:
    """`text` for content and attributes, every character of it visible or white space."""
    return Markup(html.escape(text.translate(_VISIBLE)))


def joined(*children: Child) -> Markup:
    """Children beside each other; those that are None are left out."""
    return Markup("".join(_flat(children)))


def element(name: str, /, *children: Child, **attributes: object) -> Markup:
    """`<name attributes>children</name>`.

    Attributes are spelled `class_`, `aria_label`; None and False leave one out, True gives its name
    alone.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escaped(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{given}>{joined(*children)}{end}")


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str):
            yield escaped(child)
        elif child is not None:
            yield from _flat(child)
