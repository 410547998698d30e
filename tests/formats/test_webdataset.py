"""Would catch: a member without a row, a cut tar that passes for whole, a pickled member being loaded."""

from __future__ import annotations

import json
import os
import pickle
import tarfile

from capfilt.formats.webdataset import REST
from tests.formats.sources import listed, write_tar


class Explodes:
    """Were this ever unpickled, the test would not end well."""

    def __reduce__(self):
        return (os._exit, (99,))


def test_tars_of_other_tools(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("x.jpg", b"X"),
            ("sub/y.seg.png", b"mask"),
            ("x.pyd", pickle.dumps(Explodes())),
            ("sub/y.png", b"Y"),
            ("x.txt", "a tëxt\n".encode()),  # not side by side with its picture
            ("z.json", json.dumps({"caption": "z", "url": "http://z", "n": 1}).encode()),
            ("z.JPG", b"Z"),
            ("w.json", b"{"),
            ("w.jpg", b"W"),
            ("v.txt", b"no picture"),
            ("x.jpg", b"X again"),
        ],
    )
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    write_tar(tmp_path / "b.tar", [("x.jpg", b"other X"), ("../../up.jpg", b"up")])
    write_tar(tmp_path / "c.tar", [("c0001.jpg", b"C")])
    rows = listed(tmp_path, extra=("n",))
    assert [(row.key, row.captions, row.picture, row.failure) for row in rows] == [
        ("a/x", ("a tëxt\n",), b"X again", None),
        ("a/sub/y", (), b"Y", None),
        ("a/z", ("z",), b"Z", None),
        ("a/w", (), None, "decode_error"),
        ("a/v", ("no picture",), None, "file_missing"),
        ("b/x", (), b"other X", None),
        ("b/../../up", (), b"up", None),
        ("c0001", (), b"C", None),
    ]
    assert rows[2].url == "http://z"
    assert [row.extra["n"] for row in rows] == [None, None, 1, *[None] * 5]
    assert [row.key for row in listed(tmp_path / "b.tar", "webdataset")] == ["b/x", "b/../../up"]


def test_a_tar_cut_anywhere_keeps_what_is_whole_and_says_so(tmp_path):
    members = [(f"{i}.jpg", bytes([65 + i]) * 700) for i in range(4)]
    whole = write_tar(tmp_path / "t.tar", members).read_bytes()
    for cut in [*range(0, 4 * 1536, 97), 512, 1536, 3 * 1536]:
        (tmp_path / "t.tar").write_bytes(whole[:cut])
        rows = listed(tmp_path)
        good = [row for row in rows if row.failure is None]
        assert [(row.key, row.picture) for row in good] == [
            (f"t/{i}", data) for i, (_, data) in enumerate(members[: len(good)])
        ]
        assert {row.failure for row in rows[len(good) :]} == {"truncated"}
        assert rows[-1].key == f"t/{REST}"
