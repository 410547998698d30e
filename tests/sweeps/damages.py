"""Damages to files: to any bytes, and to the structure of JSON, JSON Lines, tables, YAML, Parquet files and tars.

Each takes the bytes of a whole file and a `random.Random`, and returns other bytes. `damage` draws one of them.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

DEEP = 100_000
Damage = Callable[[bytes, Random], bytes]


def flipped_bit(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def set_byte(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([rng.choice((0, 255, 10, 34, 92, rng.randrange(256)))]) + data[place + 1 :]


def truncated(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def inserted(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    more = rng.choice((b"\0", b" ", b"\n", b"\xff\xfe", b"\xed\xa0\x80", rng.randbytes(rng.randint(1, 64))))
    return data[:place] + more + data[place:]


def removed(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.randint(1, 64) :]


def swapped(data: bytes, rng: Random) -> bytes:
    size = rng.randint(1, max(1, min(512, len(data) // 3)))
    first = rng.randrange(max(1, len(data) - 2 * size))
    second = rng.randint(first + size, max(first + size, len(data) - size))
    return (
        data[:first]
        + data[second : second + size]
        + data[first + size : second]
        + data[first : first + size]
        + data[second + size :]
    )


def appended(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((b"\0", b"\n", b"{}", data, rng.randbytes(rng.randint(1, 99))))


def zeroed(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    size = min(rng.randint(1, 4096), len(data) - place)
    return data[:place] + bytes(size) + data[place + size :]


BYTES: list[Damage] = [
    flipped_bit,
    flipped_bit,
    set_byte,
    truncated,
    inserted,
    removed,
    swapped,
    appended,
    zeroed,
]


# -- values of JSON and YAML -----------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, 0, -1, 2**63, 10**400, 1.5, float("inf"), float("nan"), "", "0", "\0", "\ud800", "x" * 100_000,
    "../../etc/passwd", "/etc/passwd", "a\nb", "=1+1", [], {}, [None], [[]], {"": {}}, ["\ud800"], {"\0": 1},
    "a" * 300 + ".jpg",
]  # fmt: skip
"""What no field expects."""


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    found = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *_places(value[key])]
    return found


def changed(value: Any, rng: Random) -> Any:
    """The value with one node of it replaced, removed, renamed, doubled or moved."""
    places = _places(value)
    if not places or rng.random() < 0.03:
        return rng.choice(ODD)
    container, key = rng.choice(places)
    what = rng.randrange(6)
    if what < 3:
        container[key] = rng.choice(ODD)
    elif what == 3:
        del container[key]
    elif isinstance(container, list):
        container.insert(rng.randint(0, len(container)), container[key])
    elif what == 4:
        container[str(key) + rng.choice(("2", " ", "\0"))] = container.pop(key)
    else:
        container[key] = container[rng.choice(list(container))]
    return value


def _nested(rng: Random) -> str:
    return rng.choice(("[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "[" * DEEP + '"'))


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:
        # A container that became its own descendant.
        return "[]"


def in_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.03:
        return _nested(rng).encode()
    return _dumped(changed(json.loads(data), rng)).encode()


def in_lines(data: bytes, rng: Random) -> bytes:
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    what = rng.random()
    if what < 0.03:
        lines[place] = _nested(rng)
    elif what < 0.1:
        lines[place] = rng.choice(("", "null", "{}", "[]", "7", '"a"', "nonsense", "{" + lines[place]))
    elif what < 0.15:
        lines.insert(place, rng.choice(lines))
    else:
        lines[place] = _dumped(changed(json.loads(lines[place]), rng))
    return "\n".join(lines).encode() + b"\n"


def in_table(data: bytes, rng: Random) -> bytes:
    """Of text cut into lines and cells."""
    separator = b"\t" if b"\t" in data else b","
    lines = data.split(b"\n")
    place = rng.randrange(max(1, len(lines) - 1))
    cells = lines[place].split(separator)
    cell = rng.randrange(len(cells))
    what = rng.randrange(7)
    if what == 0:
        cells[cell] = rng.choice(
            (
                b'"',
                b'"a',
                b'a"b"',
                b"\xff",
                b"\0",
                b"x" * 200_000,
                b"",
                b"\xef\xbb\xbf",
                b"\r",
                b'"a\nb"',
                "\u2028".encode(),
            )
        )
    elif what == 1:
        cells.insert(cell, b"more")
    elif what == 2:
        del cells[cell]
    elif what == 3:
        cells.append(cells[cell])
    lines[place] = separator.join(cells)
    if what == 4:
        lines.insert(place, rng.choice(lines))
    elif what == 5:
        del lines[place]
    elif what == 6:
        return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b"\0", b"\x0b")))
    return b"\n".join(lines)


def in_yaml(data: bytes, rng: Random) -> bytes:
    what = rng.random()
    if what < 0.05:
        bombs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
        return rng.choice(
            (bombs.encode() + data, data + bombs.encode(), b"&a [*a]", b"{" * DEEP, b"[" * DEEP)
        )
    if what < 0.1:
        tags = (
            b"!!python/object/apply:os.getpid []",
            b"!!binary x",
            b"!!float a",
            b"!!timestamp 99-99",
            b"? [a]\n: b",
            b"2001-99-99",
            b"<<: 1",
        )
        lines = data.split(b"\n")
        place = rng.randrange(len(lines))
        lines[place] = lines[place].split(b":")[0] + b": " + rng.choice(tags)
        return b"\n".join(lines)
    value = changed(yaml.safe_load(data), rng)
    try:
        return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[]"


# -- Parquet and tars --------------------------------------------------------------------------------------------------------


def in_parquet(data: bytes, rng: Random) -> bytes:
    """A whole Parquet file whose columns are not what they were."""
    table = pq.read_table(pa.BufferReader(data))
    place = rng.randrange(table.num_columns)
    name, column = table.column_names[place], table.column(place).combine_chunks()
    rows, what = table.num_rows, rng.randrange(9)
    if what == 0 and table.num_columns > 1:
        table = table.remove_column(place)
    elif what == 1:
        table = table.rename_columns(
            [
                each if each != name else rng.choice((name.upper(), "", name + "2"))
                for each in table.column_names
            ]
        )
    elif what == 2:
        table = table.append_column(name, column)
    elif what == 3:
        table = table.slice(0, rng.randrange(rows))
    elif what == 4:
        table = pa.concat_tables([table, table])
    else:
        some = pa.array([rng.choice((None, 7)) for _ in range(rows)], pa.int64())
        values: list[tuple[Any, Any]] = [
            (None, pa.null()), (2**64 - 1, pa.uint64()), (float("nan"), pa.float64()), (b"\xff\xfe", pa.binary()),
            (["a", None], pa.list_(pa.string())), ([["a"]], pa.list_(pa.list_(pa.string()))), (True, pa.bool_()),
            ({"bytes": b"x", "path": "p"}, None), ({"a": {"b": 1}}, None), (1, pa.timestamp("us")),
            ("x" * 10_000, pa.large_string()), ([("k", 1)], pa.map_(pa.string(), pa.int64())),
        ]  # fmt: skip
        others = [some, pa.array(["a\0b"] * rows).dictionary_encode()]
        others += [pa.array([value] * rows, type_) for value, type_ in values]
        table = table.set_column(place, name, rng.choice(others))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=rng.choice(("none", "zstd")))
    return sink.getvalue().to_pybytes()


def in_tar(data: bytes, rng: Random) -> bytes:
    """A whole tar whose members are not what they were."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    place = rng.randrange(len(members))
    member, body = members[place]
    what = rng.randrange(7)
    if what == 0:
        member.name = rng.choice(
            (
                "../../x.jpg",
                "/etc/passwd",
                "a" * 300 + ".jpg",
                "",
                "a/b/../c.jpg",
                "\udcff.jpg",
                "x",
                ".jpg",
                "a\n.txt",
            )
        )
    elif what == 1:
        member.type = rng.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        )
        member.linkname = rng.choice(("/etc/passwd", "../x", member.name))
    elif what == 2:
        members.insert(place, members[rng.randrange(len(members))])
    elif what == 3:
        del members[place]
    elif what == 4:
        body = flipped_bit(body, rng) if body else b"x"
    elif what == 5:
        body = b""
    else:
        body = body * 50
    if what in (0, 1, 4, 5, 6):
        members[place] = (member, body)
    sink = io.BytesIO()
    with tarfile.open(
        fileobj=sink, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for each, content in members:
            each.size = len(content) if each.isreg() else 0
            tar.addfile(each, io.BytesIO(content) if each.isreg() else None)
    return sink.getvalue()


SHAPES: dict[str, Damage] = {
    "json": in_json, "lines": in_lines, "table": in_table, "yaml": in_yaml, "parquet": in_parquet, "tar": in_tar,
}  # fmt: skip


def packed(name: str, data: bytes) -> bytes:
    """As a file of this name is stored."""
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    if name.endswith(".zst"):
        return pa.compress(data, "zstd", asbytes=True)
    return data


def damage(name: str, shape: str, whole: bytes, foreign: bytes | None, rng: Random) -> tuple[str, bytes]:
    """(which damage, the bytes): of a file called `name` whose bytes, unpacked, are `whole`; never those it had."""
    while True:
        if foreign is not None and rng.random() < 0.05:
            how, data = "another file of its name", foreign
        elif shape in SHAPES and rng.random() < 0.6:
            how, data = SHAPES[shape].__name__, packed(name, SHAPES[shape](whole, rng))
        elif name.endswith((".gz", ".zst")) and rng.random() < 0.5:
            done = rng.choice(BYTES)
            how, data = f"{done.__name__}, then packed", packed(name, done(whole, rng))
        else:
            done = rng.choice(BYTES)
            how, data = done.__name__, done(packed(name, whole), rng)
        if data != packed(name, whole):
            return how, data
