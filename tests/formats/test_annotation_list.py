"""Would catch: a list whose texts are lost, or joined with another picture."""

from __future__ import annotations

from tests.formats.sources import listed


def test_a_tsv_does_not_quote(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('file_name\tcaption\na.jpg\t"Quoted" she said\n')
    assert listed(path)[0].captions == ('"Quoted" she said',)
