"""Would catch: a member without a row, a cut tar that passes for whole, a pickled member being loaded."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import pyarrow as pa
import pytest

from capfilt.formats.webdataset import REST
from tests.formats.sources import found, listed, picture, write_tar


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
    rows = listed(tmp_path, save_additional_columns=("n",))
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


def test_pictures_are_told_by_content(tmp_path):
    """Catches: a member with another ending, or none, or dots in its name, that is `no picture under this key`."""
    jpeg, png = picture(), picture("PNG")
    members = [
        ("a.jfif", jpeg),
        ("b.jpe", jpeg),
        ("c.jp2", picture("JPEG2000")),
        ("d.avif", picture("AVIF")),
        ("e.img", png),
        ("f", png),
        ("photo.1.jpg", jpeg),
        ("photo.1.txt", b"one"),
        ("photo.2.dat", png),
        ("photo.json", b'{"text": "both"}'),
        ("g.png", png),
        ("g.mask.png", jpeg),
        ("h.cls", b"3"),
        (".h.jpg", b""),
        ("g.cls", b"4"),
    ]
    write_tar(tmp_path / "t.tar", members)
    rows, left_out = found(tmp_path)
    assert [(row.key, row.picture, row.captions, row.failure) for row in rows] == [
        ("t/a", jpeg, (), None),
        ("t/b", jpeg, (), None),
        ("t/c", picture("JPEG2000"), (), None),
        ("t/d", picture("AVIF"), (), None),
        ("t/e", png, (), None),
        ("t/f", png, (), None),
        ("t/photo.1", jpeg, ("one",), None),
        ("t/photo.2", png, ("both",), None),
        ("t/g", png, (), None),
        ("t/h", None, (), "file_missing"),
    ]
    assert left_out == {".png": 1, ".cls": 2, "hidden": 1}


def compressed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "codec"), [("0.tar.gz", "gzip"), ("0.tgz", "gzip"), ("0.tar.zst", "zstd"), ("0.tar.bz2", "bz2")]
)
def test_a_compressed_tar_is_a_tar(tmp_path, name, codec):
    members = [
        (f"{i}.{ending}", data)
        for i in range(40)
        for ending, data in (("jpg", os.urandom(700)), ("txt", b"a"))
    ]
    whole = write_tar(tmp_path / "0.tar", members)
    rows = listed(whole)
    data = compressed(whole.read_bytes(), codec)
    (tmp_path / name).write_bytes(data)
    assert listed(tmp_path / name) == rows
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    cut = listed(tmp_path / name)
    assert cut[-1].key == f"0/{REST}"
    assert {row.failure for row in cut} <= {None, "truncated"}
    assert (codec == "gzip") <= sum(row.failure is None for row in cut) < 40


def test_little_that_is_very_much_is_not_read(tmp_path, monkeypatch):
    """Catches: a tar.gz of zeros, or one with holes, that takes the memory."""
    monkeypatch.setattr("capfilt.formats.webdataset._ROOM", 10_000)
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", bytes(8000)) for i in range(4)])
    (tmp_path / "0.tar.gz").write_bytes(compressed((tmp_path / "0.tar").read_bytes(), "gzip"))
    assert [row.failure for row in listed(tmp_path / "0.tar")] == [None] * 4
    assert [row.failure for row in listed(tmp_path / "0.tar.gz")] == [None, *["too_large"] * 3]


def test_links_and_names_of_a_tar_lead_nowhere(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("/etc/x.jpg", "../../y.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    rows, left_out = found(tmp_path)
    assert [(row.key, row.file, row.picture) for row in rows] == [
        ("0//etc/x", None, b"x"),
        ("0/../../y", None, b"x"),
    ]
    assert left_out == {"links": 2, "special files": 1}


@pytest.mark.parametrize("width", [1, 2, 5])
def test_samples_that_begin_anew_in_each_tar_have_keys_of_their_own(tmp_path, width):
    for shard in range(12):
        write_tar(tmp_path / f"{shard:0{width}d}.tar", [(f"{i}.jpg", b"x") for i in range(12)])
    assert len(listed(tmp_path)) == 144


def test_tars_in_folders_and_their_splits(tmp_path):
    for name in ("train/0.tar", "val/0.tar", "cc3m-test-0001.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [("a.jpg", b"x")])
    expected = {"cc3m-test-0001/a": "test", "train/0/a": "train", "val/0/a": "val"}
    assert {row.key: row.split for row in listed(tmp_path)} == expected
    assert [row.key for row in listed(tmp_path, splits=("val",))] == ["val/0/a"]


@pytest.mark.parametrize("field", ["TEXT", " caption ", "Captions", "text"])
def test_a_text_is_found_however_its_field_is_spelled(tmp_path, field):
    record = json.dumps({field: "a cat", "URL": "http://a"}).encode()
    write_tar(tmp_path / "0.tar", [("0.jpg", b"x"), ("0.json", record)])
    (row,) = listed(tmp_path)
    assert (row.captions, row.url) == (("a cat",), "http://a")
    assert listed(tmp_path, caption_col=("",))[0].captions == ()
