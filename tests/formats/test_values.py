"""Would catch: a text that Arrow cannot hold, a column of two types."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from capfilt.formats.values import ColumnTypes, arrow_column, storable


@given(st.text())
def test_storable_text_is_the_text_but_for_lone_surrogates(text):
    result = storable(text)
    assert pa.array([result])[0].as_py() == result
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert result == text


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            st.text(),
            st.lists(st.integers()),
        )
    )
)
def test_a_column_of_any_json_values_has_one_type(values):

    types = ColumnTypes(["x"])
    for value in values:
        types.notice({"x": value})
    array = arrow_column(values, types.types()["x"])
    assert [value is None for value in array.to_pylist()] == [value is None for value in values]
