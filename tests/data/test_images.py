"""Catches: a decompression bomb decoded before it is measured, a cut picture passed on half grey, colours lost (CMYK,
16 bit, palette, alpha), pictures lying on their side, and any exception but BadImage on hostile bytes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, ImageOps

from capfilt.data.images import FORMATS, BadImage, decode, encode_jpeg, kind_of, phash, sha256
from capfilt.tables.contracts import FAILURES
from tests.refusals import names

# pytest puts aside the filter that importing the module sets.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth enough for JPEG, different in every corner."""
    image = Image.new("RGB", (width, height), (200, 180, 40))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 3, height // 3), fill=(220, 20, 20))
    draw.ellipse((width // 2, height // 2, width - 2, height - 2), fill=(20, 40, 200))
    return image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, raw: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(raw, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body + chunk(b"IEND", b"")


def failure(data: bytes, **options: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    assert caught.value.failure in FAILURES
    assert caught.value.message
    return caught.value.failure


def close(
    image: Image.Image, colour: tuple[int, int, int], at: tuple[int, int] = (0, 0), within: int = 6
) -> bool:
    return bool(np.abs(np.array(image.getpixel(at)) - np.array(colour)).max() <= within)


# ------------------------------------------------------------------ limits


def test_bombs_are_refused_on_their_header() -> None:
    # 30000 x 30000 at one bit compresses to a hundred kilobytes and would decode to 900 MB of RGB.
    bomb = png(30_000, 30_000, 1, 0, b"\0" * (3751 * 30_000))
    assert len(bomb) < 200_000
    tracemalloc.start()
    assert failure(bomb) == "too_many_pixels"
    assert (
        failure(png(8_100, 8_000, 1, 0, b"")) == "too_many_pixels"
    )  # between capfilt's limit and Pillow's own
    assert failure(png(2**31 - 1, 2**31 - 1, 1, 0, b"")) == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_bombs_in_other_formats() -> None:
    webp = bytearray(encoded(scene(), "WEBP", lossless=True))
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16_383).to_bytes(3, "little") * 2
    assert (
        failure(b"RIFF" + struct.pack("<I", len(webp) + 10) + b"WEBP" + vp8x + bytes(webp[12:]))
        == "too_many_pixels"
    )
    lossless = webp.copy()
    lossless[21:25] = struct.pack("<I", 0xFFFFFFF)
    assert failure(bytes(lossless)) == "too_many_pixels"
    gif = bytearray(encoded(scene(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    assert failure(bytes(gif)) == "too_many_pixels"
    bmp = bytearray(encoded(scene(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    assert failure(bytes(bmp)) == "too_many_pixels"


def scans(times: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = encoded(scene(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    tables = data.rindex(b"\xff\xc4", 0, last)
    return data[:-2] + data[tables:-2] * times + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    assert decode(scans(20)).size == (60, 40)
    with pytest.raises(BadImage, match=r"decode_error.*scans"):
        decode(scans(100))


def test_what_only_looks_like_scans_is_not_counted() -> None:
    """In metadata, and in a film behind the picture."""
    data = encoded(scene(), "JPEG")
    noise = b"\xff\xda" * 200
    comment = b"\xff\xfe" + struct.pack(">H", len(noise) + 2) + noise
    assert decode(data[:2] + comment + data[2:] + noise).tobytes() == decode(data).tobytes()


def test_text_chunk_bomb_is_a_bad_image() -> None:
    data = png(2, 2, 8, 0, b"\0\1\2" * 2, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 50_000_000, 9)))
    assert failure(data) == "decode_error"


def test_limits_are_options() -> None:
    data = encoded(scene(60, 40))
    assert decode(data, max_pixels=2400).size == (60, 40)
    assert failure(data, max_pixels=2399) == "too_many_pixels"
    assert failure(data, max_bytes=len(data) - 1) == "too_large"
    assert decode(data, min_size=40).size == (60, 40)
    assert failure(data, min_size=41) == "too_small"
    assert decode(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)


# ------------------------------------------------------------------ what is no picture, or half of one


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"BM is how this text begins",
        b"\0" * 100,
        b"%PDF-1.7",
        b"MZ",
    ],
    ids=["empty", "html", "text", "zeros", "pdf", "exe"],
)
def test_not_an_image(data: bytes) -> None:
    assert failure(data) == "not_an_image"


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("AVIF", "RGB", {}),
        ("AVIF", "RGBA", {}),
        ("JPEG2000", "RGB", {}),
        ("JPEG2000", "RGB", {"no_jp2": True}),
        ("JPEG2000", "L", {}),
        ("PPM", "RGB", {}),
        ("PPM", "L", {}),
        ("PPM", "1", {}),
        ("PPM", "F", {}),
    ],
)
def test_what_img2dataset_decodes_is_decoded(kind: str, mode: str, options: dict) -> None:
    """Catches: AVIF, JPEG 2000 (with its box or as a bare codestream) and portable maps taken for no picture."""
    image = scene().convert(mode)
    data = encoded(image, kind, **options)
    assert kind_of(data) == kind
    difference = np.asarray(decode(data), int) - np.asarray(decode(encoded(image, "TIFF")), int)
    assert np.abs(difference).mean() < 8  # AVIF halves the colours' resolution


@pytest.mark.parametrize(
    "text", ["P6 is the name of a Yamaha", "P3 5 apples", "P1\n2 cats", "avif ftyp", "\xff\x4f"]
)
def test_a_text_that_begins_like_a_picture_is_none(text: str) -> None:
    assert kind_of(text.encode("latin-1")) is None


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
        (b"\xff\x0a\xfa\x1f", "JXL"),
    ],
)
def test_a_picture_that_nothing_here_decodes_says_which_kind_it_is(head: bytes, kind: str) -> None:
    with pytest.raises(BadImage, match=kind) as caught:
        decode(head + b"\0" * 40)
    assert caught.value.failure == "decode_error"


def test_a_pillow_without_avif_says_so_and_decodes_the_rest() -> None:
    """Catches: a format that Pillow does not know, which has it decode none of those named behind it either."""
    code = """
import io
import subprocess
import sys
from PIL import Image, features
body = io.BytesIO(); Image.new("RGB", (8, 8)).save(body, "AVIF")
del features.modules["avif"]
from capfilt.data.images import BadImage, decode
for kind in ("PPM", "JPEG"):
    other = io.BytesIO(); Image.new("RGB", (8, 8)).save(other, kind); decode(other.getvalue())
try: decode(body.getvalue())
except BadImage as bad: print(bad)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert names(ran.stdout, "decode_error", "AVIF", "Pillow 11.3"), ran.stderr


def test_formats_outside_the_list_are_not_images() -> None:
    for kind in ("ICO", "TGA", "PDF", "EPS"):
        assert failure(encoded(scene(), kind)) == "not_an_image", kind


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_of_a_file(kind: str) -> None:
    data = encoded(scene(24, 16), kind)
    whole = np.asarray(decode(data))
    seen = set()
    for length in range(16, len(data), 3):
        try:
            # Bytes behind the last pixel may be missing: then every pixel must be right.
            assert np.array_equal(np.asarray(decode(data[:length])), whole), length
        except BadImage as error:
            seen.add(error.failure)
    # A TIFF does not say how long it is: with its directory gone it is merely broken.
    assert seen <= ({"truncated", "decode_error"} if kind == "TIFF" else {"truncated"})
    assert "truncated" in seen


def test_half_a_photograph_is_truncated() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    for options in ({}, {"progressive": True}):
        data = encoded(Image.fromarray(noise), "JPEG", **options)
        assert failure(data[: len(data) // 2]) == "truncated"
        assert failure(data[:-2]) == "truncated"


def test_truncated_even_if_another_library_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in set(FORMATS) - {"TIFF"}:
        data = encoded(scene(), kind)
        assert failure(data[: len(data) * 2 // 3]) == "truncated", kind


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_raise_nothing_else(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(scene(24, 16), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadImage):
        assert decode(bytes(damaged)).mode == "RGB"


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data)


def test_bad_image_is_a_value() -> None:
    error = BadImage("truncated", "of 3 bytes")
    again = pickle.loads(pickle.dumps(error))
    assert (again.failure, again.message) == ("truncated", "of 3 bytes")
    assert str(error) == "truncated: of 3 bytes"
    with pytest.raises(ValueError, match="closed list"):
        BadImage("ugly", "in my opinion")


# ------------------------------------------------------------------ colours


def test_modes_keep_their_colours() -> None:
    red = (220, 20, 20)
    assert close(decode(encoded(Image.new("RGB", (9, 9), red).convert("CMYK"), "JPEG")), red)
    assert close(decode(encoded(Image.new("RGB", (9, 9), red).convert("CMYK"), "TIFF")), red)
    assert close(decode(encoded(Image.new("RGB", (9, 9), red).quantize(4), "PNG")), red)
    assert close(decode(encoded(Image.new("L", (9, 9), 77))), (77, 77, 77), within=0)
    assert close(decode(encoded(Image.new("1", (9, 9), 1))), (255, 255, 255), within=0)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    for kind in ("PNG", "TIFF"):
        image = np.asarray(decode(encoded(Image.fromarray(ramp), kind)))
        assert image.shape == (1, 256, 3)
        assert np.abs(image[0, :, 0].astype(int) - np.arange(256)).max() <= 1, kind
    colour = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0))
    assert close(decode(colour), (255, 128, 0), within=1)


def test_deep_pictures_are_converted_in_little_memory_and_rounded() -> None:
    values = np.resize(np.arange(65536, dtype=np.uint16), (2048, 2048))
    for picture, expected in (
        (values, np.rint(values / 257)),
        (values.astype(np.float32) - 7, np.rint(values * (255 / 65535))),
    ):
        data = encoded(Image.fromarray(picture), "TIFF")
        tracemalloc.start()
        image = np.asarray(decode(data))[:, :, 0]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(image, expected)
        # float64 for all of it would be 32 MiB, and twice so; the file and the array here are in it.
        assert peak < len(data) + image.nbytes * 3 + 36 * 2**20


def test_a_deep_transparent_colour_is_white() -> None:
    key = chunk(b"tRNS", struct.pack(">H", 10000))
    grey = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 10000, 40000), key)
    assert close(decode(grey), (255, 255, 255), within=0)
    assert close(decode(grey), (156, 156, 156), at=(1, 0), within=0)
    key = chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000))
    colour = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 1000, 2000, 3000, 40000, 10000, 60000), key)
    assert close(decode(colour), (255, 255, 255), within=0)
    assert close(decode(colour), (156, 39, 234), at=(1, 0), within=0)


def test_deep_tiffs() -> None:
    for values, last in (
        (np.linspace(0, 1, 11, dtype=np.float32), 255),
        (np.linspace(0, 255, 11, dtype=np.float32), 255),
        (np.linspace(-5, 1e6, 11, dtype=np.float32), 255),
        (np.linspace(0, 65535, 11).astype(np.int32), 255),
    ):
        image = np.asarray(decode(encoded(Image.fromarray(values.reshape(1, -1)), "TIFF")))
        assert (image[0, 0, 0], image[0, -1, 0]) == (0, last)
        assert abs(int(image[0, 5, 0]) - 127) <= 1
    broken = np.array([[np.nan, np.inf, 0.5]], dtype=np.float32)
    assert np.asarray(decode(encoded(Image.fromarray(broken), "TIFF")))[0, 2, 0] == 128


def test_alpha_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        assert close(decode(encoded(clear, kind, **lossless)), (255, 255, 255), within=0), kind
        assert close(decode(encoded(half, kind, **lossless)), (255, 127, 127), within=1), kind
    grey = Image.new("LA", (8, 8), (0, 0))
    assert close(decode(encoded(grey)), (255, 255, 255), within=0)


def test_palette_and_colour_key_transparency() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((0, 0), 0)
    data = encoded(image, transparency=0)
    assert close(decode(data), (255, 255, 255), within=0)
    assert close(decode(data), (200, 0, 0), at=(4, 4), within=0)
    translucent = encoded(image, transparency=b"\xff\x80")
    assert close(decode(translucent), (10, 20, 30), within=0)
    assert close(decode(translucent), (227, 127, 127), at=(4, 4), within=1)
    key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert close(decode(png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", key)), (255, 255, 255), within=0)
    assert close(decode(png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", key)), (4, 5, 6), at=(1, 0), within=0)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert close(decode(data), (250, 0, 0)), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
    ):
        data = encoded(stored, kind, exif=exif.tobytes(), **options)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.array_equal(np.asarray(decode(data)), expected), kind
        assert decode(data).size == ((60, 40) if orientation < 5 else (40, 60))


def test_broken_metadata_does_not_cost_the_picture() -> None:
    plain = np.asarray(decode(encoded(scene(), "JPEG", quality=100)))
    for options in (
        {"icc_profile": b"\0\1garbage" * 50},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40},
        {"exif": b"Exif\0\0"},
        {"comment": b"\xff\xfe" * 10},
    ):
        assert np.array_equal(np.asarray(decode(encoded(scene(), "JPEG", quality=100, **options))), plain)
    profile = chunk(b"iCCP", b"name\0\0" + b"not zlib")
    assert close(decode(png(1, 1, 8, 2, b"\0\x0a\x14\x1e", profile)), (10, 20, 30), within=0)


# ------------------------------------------------------------------ draft, encoding, hashes


def test_draft_keeps_both_sides_large_enough() -> None:
    big = scene(800, 600)
    data = encoded(big, "JPEG", quality=95)
    assert decode(data, draft_size=100).size == (134, 100) or min(decode(data, draft_size=100).size) >= 100
    assert max(decode(data, draft_size=100).size) < 800
    assert decode(data, draft_size=599).size == (800, 600)
    small = np.asarray(decode(data, draft_size=100).resize((32, 24)), dtype=int)
    assert np.abs(small - np.asarray(big.resize((32, 24)), dtype=int)).mean() < 6
    assert decode(encoded(big, "PNG"), draft_size=10).size == (800, 600)


def test_decode_from_many_threads() -> None:
    data = [encoded(scene(40 + i, 40), "JPEG") for i in range(8)]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(20) if decode(data[index]).size != (40 + index, 40))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_encode_jpeg() -> None:
    data = encode_jpeg(scene())
    assert data == encode_jpeg(scene())
    assert np.abs(np.asarray(decode(data), dtype=int) - np.asarray(scene(), dtype=int)).mean() < 6
    assert close(decode(encode_jpeg(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))), (255, 255, 255), within=1)
    assert len(encode_jpeg(scene(), quality=30)) < len(data)


def test_sha256_known_answer() -> None:
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_phash_against_scipy() -> None:
    fft = pytest.importorskip("scipy.fft")
    for seed in range(5):
        noise = np.random.default_rng(seed).integers(0, 255, (9, 13, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((130, 90), Image.Resampling.BICUBIC)
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
        low = fft.dct(fft.dct(grey, axis=0), axis=1)[:8, :8]
        bits = "".join("1" if value else "0" for value in (low > np.median(low)).ravel())
        assert phash(image) == f"{int(bits, 2):016x}"


def test_phash_is_near_for_copies_and_far_for_others() -> None:
    def picture(seed: int) -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((200, 160), Image.Resampling.BICUBIC)

    def apart(one: Image.Image, other: Image.Image) -> int:
        return (int(phash(one), 16) ^ int(phash(other), 16)).bit_count()

    one, other = picture(1), picture(2)
    copy = decode(encode_jpeg(one.resize((90, 70)), quality=50))
    assert len(phash(one)) == 16
    assert apart(one, copy) <= 4
    assert apart(one, other) >= 16
    # Large enough to be averaged first, against copies that are and that are not.
    large = one.resize((1300, 1040), Image.Resampling.BICUBIC)
    for size in ((1300, 1040), (640, 512), (333, 267), (100, 80), (40, 32)):
        assert apart(large, decode(encode_jpeg(large.resize(size), quality=50))) <= 6
    assert apart(large, other) >= 16
    assert len(phash(Image.new("RGB", (1, 1)))) == 16
