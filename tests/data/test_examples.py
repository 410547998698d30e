"""Bugs caught here: a weight that is refused as float32 and passed over, unheard, in every other type."""

from __future__ import annotations

import pyarrow as pa
import pytest

from capfilt.data.examples import weighed
from tests.refusals import refused


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int32()])
def test_a_weight_of_any_type_is_refused_with_its_image(kind):
    def table(*texts):
        rows = [
            [{"text": "a", "source": "web", "itm_score": 0.9, "weight": weight} for weight in each]
            for each in texts
        ]
        names = ["text", "source", "itm_score", "weight"]
        entry = pa.struct(list(zip(names, [pa.string(), pa.string(), pa.float32(), kind], strict=True)))
        return pa.table({"image_id": ["x", "y", "z"][: len(rows)], "texts": pa.array(rows, pa.list_(entry))})

    alike = table([1, None], [], [1])
    assert weighed(alike, "here") is alike
    with refused("here", "image y", "weight 3"):
        weighed(pa.concat_tables([alike.slice(1), table([], [1, 3])]), "here")
