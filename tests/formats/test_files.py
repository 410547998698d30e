"""Would catch: a name or a link that leads out of its folder, a pipe waited for, a name unfound for its accents."""

from __future__ import annotations

import os
import string
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.formats.files import read_file, safe_join

NAMES = st.text(st.sampled_from(string.ascii_letters + "./\\ \0é"), max_size=12)


@settings(deadline=None)
@given(NAMES)
def test_no_name_leads_out_of_its_folder(name):
    root = Path("/folder/of/pictures")
    joined = safe_join(root, name)
    if joined is not None:
        normal = os.path.normpath(joined)
        assert normal.startswith(f"{root}/")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "big.jpg").write_bytes(b"12345")
    assert read_file(tmp_path / "pipe.jpg")[0] == "file_missing"
    assert read_file(tmp_path)[0] == "file_missing"
    assert read_file(tmp_path / "gone.jpg")[0] == "file_missing"
    assert read_file(tmp_path / "\ud800.jpg")[0] == "file_missing"
    assert read_file(Path("/dev/zero"))[0] == "file_missing"
    assert read_file(tmp_path / "big.jpg", most=4)[0] == "too_large"
    assert read_file(tmp_path / "big.jpg", most=5) == b"12345"
