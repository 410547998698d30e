"""HTML and SVG built so that text can never become markup: every child and attribute is escaped unless it is `Html`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from capfilt.tables.visible import visible

_VOID = frozenset({"img", "meta", "br", "hr", "col"})


class Html(str):
    """Text that is markup already. Only this module and constants of our own make it."""

    __slots__ = ()


Child = str | int | None


def escape(child: Child) -> Html:
    """`child` as markup: Html as it is, everything else made visible and escaped; None is nothing."""
    if isinstance(child, Html):
        return child
    return Html("" if child is None else html.escape(visible(str(child)), quote=True))


def element(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """`<name attributes>children</name>`.

    In attribute names a trailing underscore is dropped (`class_`) and others become hyphens (`stroke_width`); an
    attribute that is None is left out.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(str(text))}"')
    parts.append(">")
    if name not in _VOID:
        parts += [*(escape(child) for child in children), f"</{name}>"]
    return Html("".join(parts))


def join(children: Iterable[Child], separator: str = "") -> Html:
    """The children one after another, with `separator` (escaped) between them."""
    return Html(escape(separator).join(escape(child) for child in children))


def table(
    headers: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    numeric: Iterable[int] = (),
    class_: str = "",
) -> Html:
    """A table that scrolls sideways in its own box; columns whose place is in `numeric` are right-aligned."""
    right = set(numeric)

    def line(name: str, cells: Sequence[Child]) -> Html:
        fields = (
            element(name, cell, class_="n" if place in right else None) for place, cell in enumerate(cells)
        )
        return element("tr", *fields)

    head = element("thead", line("th", headers)) if any(headers) else ""
    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", head, body, class_=class_ or None), class_="scroll")


def section(title: str, *children: Html | str) -> Html:
    """One section of the page, with its heading."""
    return element("section", element("h2", title), *children)
