"""Would catch: one key for pictures of two files, so one image_id; keys that change without need."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.formats import keys as module
from capfilt.formats.keys import Keys, shared_key


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # img2dataset's own: the shard's number is the key's beginning.
        (["00000.tar", "00001.tar"], {("00000.tar", "000000003"): "000000003"}),
        # Samples that begin anew, tars of one width; of several widths, where `12` may be of `1.tar` too.
        (["0.tar", "1.tar"], {("0.tar", "7"): "0/7", ("1.tar", "7"): "1/7", ("1.tar", "10"): "10"}),
        (["1.tar", "12.tar"], {("1.tar", "120"): "1/120", ("12.tar", "120"): "120"}),
        (["a.tar", "c.tar"], {("c.tar", "c0001"): "c0001", ("a.tar", "c0001"): "a/c0001"}),
        # Several outputs in one folder.
        (["x/00000.tar", "y/00000.tar"], {("x/00000.tar", "000000000"): "x/00000/000000000"}),
        # A path that is another's beginning, and one name with two endings.
        (["a.tar", "a/b.tar"], {("a.tar", "b/x"): "a.tar/b/x", ("a/b.tar", "x"): "a/b.tar/x"}),
        (["a.tar", "a.tar.gz"], {("a.tar", "x"): "a.tar/x", ("a.tar.gz", "x"): "a.tar.gz/x"}),
    ],
)
def test_a_key_is_kept_where_it_tells_its_file(names, expected):
    keys = Keys(names)
    assert {(name, key): keys.of(name, key) for name, key in expected} == expected


PARTS = st.text(st.sampled_from("01a/."), min_size=1, max_size=4).filter(
    lambda text: not text.startswith("/") and not text.endswith("/") and "//" not in text
)
FILES = st.builds(lambda stem, ending: stem + ending, PARTS, st.sampled_from([".tar", ".tar.gz", ".parquet"]))


@given(st.sets(FILES, min_size=2, max_size=6), st.lists(PARTS, max_size=6))
def test_no_two_files_share_a_key_whatever_is_in_them(names, keys):
    # No file is a folder too.
    names = {name for name in names if not any(other.startswith(f"{name}/") for other in names)}
    whole = Keys(sorted(names))
    keys = [
        *keys,
        *(f"{name}/{key}" for name in names for key in keys),
        *(n[:-4] + k for n in names for k in keys),
    ]
    made = {name: {whole.of(name, key) for key in keys} for name in names}
    for one, other in itertools.combinations(names, 2):
        assert not made[one] & made[other]


@given(st.lists(st.lists(st.text(max_size=3), max_size=8), min_size=1, max_size=5), st.integers(1, 5))
def test_a_shared_key_is_found_in_runs_of_any_size(files, run):
    old, module.RUN = module.RUN, run
    try:
        found = shared_key((f"{number}", keys) for number, keys in enumerate(files))
    finally:
        module.RUN = old
    shared = {key for one, other in itertools.combinations(files, 2) for key in set(one) & set(other)}
    assert (found is None) == (not shared)
    if found:
        key, one, other = found
        assert key in shared
        assert one != other
        assert key in files[int(one)]
        assert key in files[int(other)]
