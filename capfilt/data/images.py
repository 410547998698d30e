"""Encoded bytes to pictures, within limits: bounded decoding of hostile images, encoding, perceptual and exact hashes.

Not here: resizing to a model's input (`transforms.py`), or fetching bytes (`stages/download`).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, features

from capfilt.tables.contracts import FAILURES

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
if "avif" in features.modules and features.check_module("avif"):  # Pillow's own wheels since 11.3
    FORMATS += ("AVIF",)
SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe", "jfif", "avif", "jp2", "j2k", "ppm", "pgm", "pbm",
    "pnm", "dib", "apng", "heic", "heif", "jxl",
)  # fmt: skip
"""Endings of pictures' names, the usual ones first."""
MAX_PIXELS = (
    64_000_000  # 192 MB as RGB, above any consumer camera; Pillow's own hard limit is about 179 million
)
MAX_BYTES = 50_000_000
MAX_SCANS = 100
"""Scans of a JPEG: an encoder writes about ten (libjpeg's jpeg_simple_progression), and each goes over every pixel."""
JPEG_QUALITY = 95  # img2dataset's default encode_quality

# On web images Pillow warns about every odd EXIF field, and about sizes that MAX_PIXELS already judges. Filtering once
# is the only way that is safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_DEEP_COLOUR = b"\x10\x02"
"""Sixteen bits and RGB, in the place where a PNG's header has them (W3C PNG, section 11.2.1)."""

_JPEG, _SCAN, _END = b"\xff\xd8\xff", b"\xff\xda", b"\xd9"
# A marker (ITU-T T.81, section B.1.1.2); what a scan has in it is FF 00 and the restart markers, which are none here.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """A picture that cannot be used: `.failure` from the closed list of failures, `.message` in words."""

    def __init__(self, failure: str, message: str) -> None:
        if failure not in FAILURES:
            raise ValueError(f"{failure!r} is not in the closed list of failures")
        super().__init__(f"{failure}: {message}")
        self.failure = failure
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return (BadImage, (self.failure, self.message))


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    min_size: int = 0,
    draft_size: int | None = None,
) -> Image.Image:
    """The picture in `data` as RGB: upright by its EXIF, alpha laid on white, the first frame of an animation.

    Size limits are checked on the header, before a pixel is decoded. Colour profiles are ignored, broken or not.

    Args:
        data: an encoded JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, PPM (PGM, PBM) or, where Pillow has it, AVIF.
        max_pixels: width times height allowed; `too_many_pixels` above it.
        max_bytes: encoded bytes allowed; `too_large` above it.
        min_size: shorter side required, in pixels; `too_small` below it.
        draft_size: where given, JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size, with both sides still at
            least this many pixels: several times faster when a small picture is wanted.

    Raises:
        BadImage: with the failure `not_an_image`, `truncated`, `too_many_pixels`, `too_small`, `too_large` or
            `decode_error`; nothing else, whatever the bytes.
    """
    if len(data) > max_bytes:
        raise BadImage("too_large", f"{len(data)} bytes, more than {max_bytes}")
    if size := _webp_size(
        data
    ):  # Pillow before 12 allocates a WebP's canvas before anyone can ask for its size
        _check_size(size, max_pixels, min_size)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", str(error)) from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything on hostile bytes; a bad image is a row
        kind = kind_of(data)
        if kind is None:
            raise BadImage("not_an_image", f"{_describe(data)} is none of {', '.join(FORMATS)}") from None
        if kind not in FORMATS:
            cure = "install Pillow 11.3 or later" if kind == "AVIF" else "convert it to JPEG or PNG"
            raise BadImage("decode_error", f"{kind} cannot be decoded here; {cure}") from None
        raise BadImage(*_fault(data, kind, f"the {kind} header cannot be read ({error})")) from None
    _check_size(image.size, max_pixels, min_size)
    check_scans(data)
    kind = image.format or kind_of(data)
    if (ImageFile.LOAD_TRUNCATED_IMAGES or kind == "JPEG2000") and _is_cut(data, kind):
        # Pillow invents the missing pixels where another library of this process told it to; OpenJPEG always does.
        raise BadImage("truncated", f"{len(data)} bytes end before the {kind} does")
    try:
        if draft_size is not None:
            image.draft(None, (draft_size, draft_size))
        image.load()
        if data[24:26] == _DEEP_COLOUR and kind == "PNG" and "transparency" in image.info:
            # Pillow keeps the upper halves of the colours, but the whole of the one that is transparent.
            image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
        picture = _to_rgb(image)
        turn = _ORIENTATIONS.get(_orientation(image))
        return picture if turn is None else picture.transpose(turn)
    except Exception as error:  # noqa: BLE001 - as above
        raise BadImage(*_fault(data, kind, f"{type(error).__name__}: {error}")) from None


def check_scans(data: bytes) -> None:
    """Raise BadImage `decode_error` for a JPEG of more than MAX_SCANS scans: little to send, minutes to decode."""
    # By a pattern: it looks for the first byte as fast as memory is read, where `bytes.count` takes twice the time.
    if not data.startswith(_JPEG) or next(islice(re.finditer(_SCAN, data), MAX_SCANS, None), None) is None:
        return
    # There are so many pairs of bytes that could begin a scan; what other pictures and films are in or behind the
    # picture has them too.
    scans, place = 0, 2
    while scans <= MAX_SCANS and (marker := _MARKER.search(data, place)):
        if marker[1] == _END:
            return
        scans += marker[0] == _SCAN
        place = marker.end()
        # In front of the segment's bytes is how many they are; none follow TEM and SOI.
        if marker[1] not in (b"\x01", b"\xd8"):
            place += int.from_bytes(data[place : place + 2], "big")
    if scans > MAX_SCANS:
        raise BadImage("decode_error", f"more than {MAX_SCANS} scans")


def encode_jpeg(image: Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    """The picture as a JPEG: RGB, no metadata, the same bytes each time for the same Pillow."""
    buffer = io.BytesIO()
    _to_rgb(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """As `encode_jpeg`, as a PNG: no pixel changes."""
    buffer = io.BytesIO()
    _to_rgb(image).save(buffer, "PNG")
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    """SHA-256 of the bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def phash(image: Image.Image) -> str:
    """64-bit DCT perceptual hash, 16 hex digits; near-duplicates differ in few bits.

    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), sec. 3.2.1, in the form the
    ImageHash package made common: grey, 32x32 by Lanczos (after averaging to at least 64x64, where it is larger),
    DCT-II both ways, the 8x8 lowest frequencies (DC included), one bit each for being above their median, row by row,
    most significant bit first.
    """
    grey = image if image.mode == "L" else image.convert("L")
    grey = grey.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    low = _DCT @ np.asarray(grey, dtype=np.float64) @ _DCT.T
    # What np.median gives for an even count, in a fifth of its time.
    ranked = np.sort(low, axis=None)
    bits = (low > (ranked[31] + ranked[32]) / 2).ravel()
    return np.packbits(bits).tobytes().hex()


def _dct_rows(low: int, size: int) -> npt.NDArray[np.float64]:
    """The first `low` rows of the unnormalised DCT-II matrix: 2 cos(pi k (2n + 1) / (2 size))."""
    k, n = np.arange(low)[:, None], np.arange(size)[None, :]
    return 2.0 * np.cos(math.pi * k * (2 * n + 1) / (2 * size))


_DCT = _dct_rows(8, 32)

# Copies differ in no more bits than with Lanczos alone, which takes six times as long (docs/decisions/0015).
_REDUCING_GAP = 2.0


def _check_size(size: tuple[int, int], max_pixels: int, min_size: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width}x{height} pixels, more than {max_pixels}")
    if width < 1 or height < 1:
        raise BadImage("decode_error", f"{width}x{height} pixels")
    if min(width, height) < min_size:
        raise BadImage("too_small", f"{width}x{height} pixels, the shorter side under {min_size}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        # An ImageFile keeps its source and metadata alive; a plain copy-free Image does not.
        return image if type(image) is Image.Image else image.convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _to_eight_bits(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        # In blocks, for four layers of the whole picture would be a gigabyte.
        picture = Image.new("RGB", image.size)
        for top, block in _blocks(image):
            layered = block.convert("RGBA")
            white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
            picture.paste(Image.alpha_composite(white, layered).convert("RGB"), (0, top))
        return picture
    return image.convert("RGB")


def _blocks(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in blocks of whole rows, about a megapixel each, with the row that each begins at."""
    rows = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey pixels as RGB; Pillow's own conversion clips everything above 255 to white.

    16-bit values are scaled from [0, 65535]; a PNG's transparent one becomes white. Wider ones have no agreed range:
    values within [0, 1] (floats), [0, 255] or [0, 65535] are taken as such, anything else is stretched from its minimum
    to its maximum.
    """
    low, span = (0.0, 65535.0) if image.mode.startswith("I;") else _range(image)
    clear = image.info.get("transparency")
    grey = Image.new("L", image.size)
    for top, block in _blocks(image):
        values = np.asarray(block)
        if image.mode.startswith("I;"):
            # Rounded: a 257th is 255 / 65535, and no sixteen bits are halfway between two of them.
            levels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        else:
            levels = np.rint((_finite(values) - low) * (255.0 / span)).clip(0, 255).astype(np.uint8)
        if isinstance(clear, int):
            levels[values == clear] = 255
        grey.paste(Image.fromarray(levels), (0, top))
    return grey.convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
    """Where the values of a wide grey picture begin, and how far they reach from there."""
    extremes = [(values.min(), values.max()) for values in (_finite(block) for _, block in _blocks(image))]
    low, high = float(min(low for low, _ in extremes)), float(max(high for _, high in extremes))
    if low >= 0 and image.mode == "F" and high <= 1:
        return 0.0, 1.0
    if low >= 0 and high <= 255:
        return 0.0, 255.0
    if low >= 0 and high <= 65535:
        return 0.0, 65535.0
    return low, high - low or 1.0


def _finite(values: Image.Image | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(np.asarray(values).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - broken EXIF says nothing about the pixels
        return 1
    return value if isinstance(value, int) else 1


# Kind, width and height, and where there is one the largest value, perhaps with comments between.
_PPM = re.compile(rb"P([1-6f])\s+" + rb"(?:#[^\n]*\n\s*)*(\d+)\s+" * 2 + rb"(?:(?:#[^\n]*\n\s*)*(\d+)\s)?")
_KINDS = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    # "BM" alone begins many a text; a bitmap also has four reserved zero bytes.
    ("BMP", re.compile(rb"BM....\0\0\0\0", re.DOTALL)),
    # ISO base media files name their brand; `mif1` and `msf1` may be either, and HEIC is the common one.
    ("AVIF", re.compile(rb"....ftyp(?:avi[fs]|mi[af]f|mif1....(?:....)*?avif)", re.DOTALL)),
    ("HEIC", re.compile(rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)),
    ("JPEG2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    ("JXL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n")),
    ("PPM", _PPM),
)
HEAD_BYTES = 256
"""As many of a file's first bytes `kind_of` looks at."""


def kind_of(data: bytes) -> str | None:
    """The kind of picture that bytes begin like, HEIC and JPEG XL too, which `decode` refuses; None for anything else."""
    head = data[:HEAD_BYTES]
    return next((kind for kind, pattern in _KINDS if pattern.match(head)), None)


def _is_cut(data: bytes, kind: str | None) -> bool:
    """Whether the bytes end before the format says they do; False where the format does not say."""
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" not in data[-1024:]
    if kind == "PNG":
        return b"IEND" not in data[-1024:]
    if kind == "GIF":
        return b"\x3b" not in data[-64:]
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    if kind == "PPM" and (header := _PPM.match(data)) and header[1] in b"56":
        samples = int(header[2]) * int(header[3]) * (3 if header[1] == b"6" else 1)
        return header.end() + samples * (2 if int(header[4] or 0) > 255 else 1) > len(data)
    if kind == "JPEG2000":
        return b"\xff\xd9" not in data[-1024:]
    if kind == "AVIF":
        place = 0
        while (size := int.from_bytes(data[place : place + 4], "big")) > 0 and place < len(data):
            place += size
        return place > len(data) or b"mdat" not in data
    return False


def _fault(data: bytes, kind: str | None, message: str) -> tuple[str, str]:
    """The failure of bytes that start like a picture but do not decode: cut off, or broken."""
    cut = "truncated" in message.lower() or _is_cut(data, kind)
    return ("truncated" if cut else "decode_error"), message[:500]


def _describe(data: bytes) -> str:
    return f"a body of {len(data)} bytes beginning {data[:12]!r}" if data else "an empty body"


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size from a WebP's first chunk (WebP container specification, RFC 9649), None for anything else."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None
