"""Would catch: any text, attribute or number that becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from capfilt.catalog.html import Html, element, escape, join, table
from capfilt.tables.visible import visible


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(), st.text())
def test_text_and_attributes_read_back_as_text(text: str, attribute: str) -> None:
    reader = Reader()
    reader.feed(element("p", text, title=attribute))
    reader.close()
    assert reader.tags == ["p"]
    assert reader.attributes == [("title", visible(attribute))]
    assert reader.text == visible(text)


def test_markup_is_kept_and_everything_else_escaped() -> None:
    inner = element("b", "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert element("p", inner, "&", None, 7) == "<p><b>&lt;i&gt;</b>&amp;7</p>"
    assert escape("a\x00b") == r"a\u0000b"
    assert isinstance(join(["<", Html("<br>")], ", "), Html)
    assert join(["<", Html("<br>")], ", ") == "&lt;, <br>"


def test_attributes_names_and_absence() -> None:
    assert element("img", src="x", class_=None, aria_hidden="true", width=1.5) == (
        '<img src="x" aria-hidden="true" width="1.5">'
    )
    assert element("meta", name="viewport") == '<meta name="viewport">'


def test_table_escapes_cells_and_aligns_numbers() -> None:
    shown = table(("<a>", "n"), [("<script>", "1")], numeric=(1,))
    assert "<script>" not in shown
    assert '<th>&lt;a&gt;</th><th class="n">n</th>' in shown
    assert '<td class="n">1</td>' in shown
    assert "<thead>" not in table((), [("a", "b")])
