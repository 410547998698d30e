"""The layouts that well-known lists of URLs are published in, for `--preset`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layout:
    """How to read a list.

    Attributes:
        url_col: column of the URLs.
        caption_col: column of the texts; empty for none.
        header: names of the columns of a csv or tsv that is published without a first line of names; empty: it has one.
        carried: further columns that come through where the list has them.
        license_cols: columns that fill the table's `license`; the first that the list has.
    """

    url_col: str = "url"
    caption_col: str = "caption"
    header: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    license_cols: tuple[str, ...] = ()


PRESETS = {
    # LAION-400M and LAION-5B as published (laion.ai); their WIDTH and HEIGHT are those of another day's pictures.
    "laion": Layout(
        "URL", "TEXT", (),
        ("SAMPLE_ID", "hash", "similarity", "NSFW", "LANGUAGE", "pwatermark", "punsafe", "AESTHETIC_SCORE"),
        ("LICENSE", "license"),
    ),
    # DataComp's metadata (its download_upstream.py reads `url` and `text`); uid joins with its subsets.
    "datacomp": Layout(
        "url", "text", (), ("uid", "clip_b32_similarity_score", "clip_l14_similarity_score", "face_bboxes")
    ),
    # Train_GCC-training.tsv: the caption first, no line of names.
    "cc3m": Layout("url", "caption", ("caption", "url")),
    # cc12m.tsv: the URL first, no line of names.
    "cc12m": Layout("url", "caption", ("url", "caption")),
}  # fmt: skip
"""Layouts by name."""


def layout(preset: str, url_col: str, caption_col: str) -> Layout:
    """The layout of a preset ("" for none); columns that were named otherwise than by default win."""
    found, plain = PRESETS.get(preset, Layout()), Layout()
    if url_col != plain.url_col:
        found = replace(found, url_col=url_col)
    if caption_col != plain.caption_col:
        found = replace(found, caption_col=caption_col)
    return found


def fitting(names: list[str]) -> str | None:
    """The preset whose columns these names have, for an error's hint."""
    for preset, each in PRESETS.items():
        if each.url_col in names and each.caption_col in names and (each.url_col, each.caption_col) != (
            "url", "caption",
        ):  # fmt: skip
            return preset
    return None
