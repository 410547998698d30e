"""Would catch: any text or attribute that becomes markup, and layout of a template that becomes text of the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from capfilt.catalog.pages import FOLDER, template
from capfilt.tables.visible import visible

PAGES = template("charts.jinja").environment


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
    reader.feed(PAGES.from_string('<p title="{{ a }}">{{ t }}</p>').render(a=attribute, t=text))
    reader.close()
    assert reader.tags == ["p"]
    assert reader.attributes == [("title", visible(attribute))]
    assert reader.text == visible(text)


@pytest.mark.parametrize(
    "source",
    [
        "{{ text }}",
        "{{ text ~ '' }}",
        "{{ [text]|join(', ') }}",
        "{{ text|upper }}",
        "{{ [text] }}",
        "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(text) }}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ text }}{% endcall %}",
        "{% for each in [text] %}{{ each }}{% endfor %}",
        "{% set kept %}{{ text }}{% endset %}{{ kept }}",
    ],
)
def test_no_way_into_a_page_leaves_markup_or_controls(source: str) -> None:
    page = PAGES.from_string(source).render(text="<b>\x00\u202e&")
    assert "<" not in page
    assert not {"\x00", "\u202e"} & {*page}
    assert "&lt;" in page
    assert not page.count("&amp;lt;")


def test_no_template_trusts_a_text() -> None:
    sources = [path.read_text() for path in FOLDER.glob("*.jinja")]
    assert len(sources) == 2
    assert not [
        found for source in sources if (found := re.search(r"\|\s*safe|autoescape|xmlattr|Markup", source))
    ]


def test_layout_of_a_template_is_no_part_of_the_page() -> None:
    assert PAGES.from_string("<p>\n  a\n</p>\n\n  <b>\n").render() == "<p>a</p><b>"
    assert PAGES.from_string("{{ text }}").render(text=Markup("<b>\n ")) == "<b>\n "


def test_a_forgotten_name_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="nobody"):
        PAGES.from_string("{{ nobody }}").render()
