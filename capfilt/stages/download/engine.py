"""What the child process does with a slice of a list: img2dataset fetches, resizes and encodes; the limits are ours.

Bodies are fetched by threads and worked on one at a time. Each is decoded once, by `capfilt.data.images` (bounded,
upright, right colours, truncation told apart), and goes to img2dataset's `Resizer` as plain pixels.

Importing this module does not import img2dataset; making an `Engine` does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import queue
import sys
import threading
import types
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from capfilt.data.images import BadImage, check_scans, decode, phash, sha256
from capfilt.stages.download.budget import Share
from capfilt.stages.download.opener import SafeOpener
from capfilt.stages.download.schedule import Errand, Schedule
from capfilt.stages.download.settings import Settings
from capfilt.stages.download.shapes import check_shape, shape_fits
from capfilt.stages.download.urls import Fault, parse_url
from capfilt.stages.pictures import Header, read_header

OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"
"""img2dataset's words for it (its `download_image`)."""

_BACKOFF = (0.5, 8.0)

BEAT_SECONDS = 0.5
"""How often a child that waits for bodies looks whether to say that it is well."""


@dataclass(frozen=True)
class Fetched:
    """What came of one URL: a body, with what it has booked of the budget, or a fault."""

    row: int
    body: bytes | None
    fault: Fault | None
    share: Share | None = None


class Engine:
    """img2dataset's parts, imported once. Raises ImportError where img2dataset is missing or does not import."""

    def __init__(self) -> None:
        self.version = import_img2dataset()
        from img2dataset import downloader, resizer

        self._download_image = downloader.download_image
        self._resizer_class = resizer.Resizer
        self._watch = resizer.cv2 = _Watch(resizer.cv2)
        resizer.A = _Transforms(resizer.A)
        self._opener: SafeOpener | None = None
        self._free_at: dict[str, float] = {}

    def run(
        self,
        rows: Sequence[tuple[int, str | None]],
        settings: Settings,
        idle: Callable[[], object] = lambda: None,
        hashes: Mapping[int, str] | None = None,
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Work on (row, URL) pairs; `hashes` are the SHA-256 that bodies must have, by row. Yields frames, in order of
        completion; calls `idle` before it waits for a body.

        {"begin": row} comes before a body is decoded; {"row": row, "status": ..., ...} and the encoded picture (no
        bytes for a failure) once for every row; {"attempts": n} where fetches ended in nothing but another attempt.
        """
        expected = hashes or {}
        opener = self._configure(settings)
        resizer = self._resizer_class(
            settings.image_size,
            settings.resize_mode,
            settings.resize_only_if_bigger,
            encode_quality=settings.encode_quality,
            encode_format=settings.encode_format,
        )
        for fetched in self._fetch_all(rows, opener, settings, idle):
            if isinstance(fetched, int):
                yield {"attempts": fetched}, b""
                continue
            if fetched.body is None:
                assert fetched.fault is not None
                yield (
                    _failed(fetched.row, "failed_to_download", fetched.fault.failure, fetched.fault.message),
                    b"",
                )
                continue
            digest = sha256(fetched.body)
            facts = {"sha256": digest, "received": len(fetched.body)}
            other = _other_body(digest, expected.get(fetched.row))
            if other is None:
                yield {"begin": fetched.row}, b""
                frame, encoded = self._picture(fetched.row, fetched.body, resizer, settings)
                yield frame | facts, encoded
            else:
                # What was received is told; what it shows is not what was asked for, so nobody looks.
                yield _failed(fetched.row, "failed_to_download", "hash_mismatch", other) | facts, b""
            assert fetched.share is not None
            fetched.share.close()

    def _configure(self, settings: Settings) -> SafeOpener:
        if self._opener is None or self._opener.settings != settings:
            self._opener = SafeOpener(settings)
        # Typed for urllib's own class; `urlopen` calls nothing but its `open`.
        urllib.request.install_opener(self._opener)  # type: ignore[arg-type]
        return self._opener

    def _fetch_all(
        self,
        rows: Sequence[tuple[int, str | None]],
        opener: SafeOpener,
        settings: Settings,
        idle: Callable[[], object],
    ) -> Iterator[Fetched | int]:
        """What came of each URL, in order of completion; between them, how many attempts have ended."""
        schedule = Schedule(
            (Errand(row, url, _host(url)) for row, url in rows),
            concurrency=settings.host_concurrency,
            rate=settings.host_rate,
            free_at=self._free_at,
        )
        # Bounded, so that bodies do not pile up faster than they are decoded.
        done: queue.Queue[Fetched] = queue.Queue(2 * settings.thread_count)

        def work() -> None:
            while (errand := schedule.take()) is not None:
                fetched = self._fetch(errand.row, errand.url, opener, settings)
                fault = fetched.fault
                if fault is not None and fault.transient and fault.retry_after:
                    schedule.rest(fault.host, fault.retry_after)
                if fault is not None and fault.transient and errand.attempt < settings.retries:
                    wait = min(_BACKOFF[1], _BACKOFF[0] * 2**errand.attempt)
                    schedule.again(errand, max(wait, fault.retry_after))
                    continue
                schedule.done(errand)
                done.put(fetched)

        for _ in range(min(settings.thread_count, len(rows))):
            threading.Thread(target=work, name="fetch", daemon=True).start()
        said = 0
        for _ in rows:
            fetched: Fetched | None = None
            while fetched is None:
                if done.empty():
                    idle()
                try:
                    fetched = done.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    # Not by the clock alone: threads that are stuck are to be found out.
                    if schedule.attempts > said:
                        said = schedule.attempts
                        yield said
            yield fetched
        self._free_at = schedule.free_at()

    def _fetch(self, row: int, url: str | None, opener: SafeOpener, settings: Settings) -> Fetched:
        try:
            parse_url(url)
            opener.take_fault()
            _, stream, words = self._download_image(
                (row, url),
                settings.timeout,
                settings.user_agent_token,
                settings.disallowed_header_directives,
            )
            if stream is not None:
                return Fetched(row, stream.getvalue(), None, opener.take_share())
            return Fetched(row, None, opener.take_fault() or _unheard_of(str(words)))
        except Fault as bad:
            return Fetched(row, None, bad)
        except Exception as error:  # noqa: BLE001 - one URL's surprise must not end the thread that serves the others
            return Fetched(row, None, Fault("http_error", f"{type(error).__name__}: {error}"))

    def _picture(
        self, row: int, body: bytes, resizer: Any, settings: Settings
    ) -> tuple[dict[str, Any], bytes]:
        facts: dict[str, Any] = {}
        self._watch.shown = None
        try:
            check_scans(body)
            header = _plain_jpeg(body, settings)
            encoded, width, height, words = None, 0, 0, None
            if header is not None:
                encoded, width, height, _, _, words = resizer(io.BytesIO(body))
            if encoded is None:
                # Also after the resizer's refusal, which does not say what is wrong with the picture.
                picture = _decode(body, settings)
                header = read_header(body)
                facts |= _received_size(header)
                check_shape(header.width, header.height, settings)
                encoded, width, height, _, _, words = resizer(io.BytesIO(_plain_pixels(picture)))
            if encoded is None or header is None:
                raise BadImage("decode_error", str(words))
            facts |= _received_size(header)
            facts |= {"status": "success", "width": width, "height": height}
            facts["phash"] = self._phash(encoded, body, settings)
            return {"row": row, **facts}, encoded
        except BadImage as bad:
            if bad.failure == "too_small":
                facts |= _received_size(read_header(body))
            return _failed(row, "failed_to_resize", bad.failure, bad.message) | facts, b""
        except Exception as error:  # noqa: BLE001 - a picture that trips the encoder is a row, not the end of the slice
            words = f"{type(error).__name__}: {error}"
            return _failed(row, "failed_to_resize", "decode_error", words) | facts, b""

    def _phash(self, encoded: bytes, body: bytes, settings: Settings) -> str:
        # What the resizer encoded shows the whole picture, unless the mode cuts or pads it.
        if settings.resize_mode not in ("keep_ratio", "keep_ratio_largest", "no"):
            return phash(decode(body, max_pixels=settings.max_pixels, draft_size=128))
        grey = self._watch.grey()
        return phash(decode(encoded) if grey is None else grey)


class _Watch:
    """Stands in for `cv2` in img2dataset's resizer module: it is cv2, and `imencode` keeps what it was shown.

    So the perceptual hash is taken of the pixels in hand, instead of decoding again what was encoded a moment ago.
    """

    def __init__(self, cv2: Any) -> None:
        self._cv2 = cv2
        self.shown: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cv2, name)

    def imencode(self, extension: str, picture: Any, *arguments: Any, **options: Any) -> Any:
        self.shown = picture
        return self._cv2.imencode(extension, picture, *arguments, **options)

    def grey(self) -> Image.Image | None:
        """What was encoded last, without its colours."""
        if self.shown is None or self.shown.ndim != 3:
            return None
        return Image.fromarray(self._cv2.cvtColor(self.shown, self._cv2.COLOR_BGR2GRAY))


class _Transforms:
    """Stands in for `albumentations` in img2dataset's resizer module: what was made once with the same options is used again.

    The resizer makes its transforms anew for every picture, and checking their options takes longer than applying them.
    They are resizing, cropping and padding, which keep no state.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def make(**options: Any) -> Any:
            key = f"{name} {sorted(options.items())}"
            if key not in self._made:
                self._made[key] = getattr(self._module, name)(**options)
            return self._made[key]

        return make


def import_img2dataset() -> str:
    """Import the two modules of img2dataset that are used, and return its version. Raises ImportError.

    The package's own `__init__` is its command line: it imports pandas, webdataset and, where they are installed, Ray
    and wandb: three quarters of the start-up time, for nothing that is called here. So the package is entered beside
    its `__init__`, and wandb, which only img2dataset's own logger process talks to, is an empty module. For a process
    of its own: whoever imports img2dataset in this process later finds it so.
    """
    found = importlib.util.find_spec("img2dataset")
    if found is None or not found.submodule_search_locations:
        raise ImportError("img2dataset is not installed")
    package = types.ModuleType("img2dataset")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["img2dataset"] = package
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    importlib.import_module("img2dataset.downloader")
    importlib.import_module("img2dataset.resizer")
    return importlib.metadata.version("img2dataset")


def _plain_jpeg(body: bytes, settings: Settings) -> Header | None:
    """The header of a picture that img2dataset's own decoding makes the same of as ours, and no slower.

    That is an upright RGB JPEG within the limits. None for any other, and for whatever has no readable header.
    """
    if not body.startswith(b"\xff\xd8\xff"):
        return None
    try:
        header = read_header(body, ("JPEG",))
    except Exception:  # noqa: BLE001 - the careful decoder will say what is wrong with it
        return None
    shorter = min(header.width, header.height)
    plain = (
        header.mode == "RGB"
        and header.upright
        and header.width * header.height <= settings.max_pixels
        and shorter >= settings.min_image_size
        and shape_fits(header.width, header.height, settings)
        and (settings.resize_mode == "no" or shorter < 4 * settings.image_size)
    )
    return header if plain else None


def _host(url: str | None) -> str:
    try:
        return parse_url(url).host
    except Fault:
        return ""


def _received_size(header: Header) -> dict[str, int]:
    return {"original_width": header.width, "original_height": header.height}


def _decode(body: bytes, settings: Settings) -> Image.Image:
    # JPEGs of at least four times the target are decoded at a fraction of their size. Twice the target is left for
    # img2dataset's own resizing: the result differs from the full decode's by less than two of its filters differ.
    return decode(
        body,
        max_pixels=settings.max_pixels,
        max_bytes=settings.max_bytes,
        min_size=settings.min_image_size,
        draft_size=None if settings.resize_mode == "no" else 2 * settings.image_size,
    )


def _plain_pixels(picture: Image.Image) -> bytes:
    """The picture as a binary PPM: what costs least to write here and to read in the resizer."""
    return b"P6\n%d %d\n255\n" % picture.size + picture.tobytes()


def _other_body(received: str, expected: str | None) -> str | None:
    """In words, that the body is not the one that the list means; None where it is, or where any may come."""
    if expected is None or received == expected.strip().lower():
        return None
    return f"the body's SHA-256 is {received[:16]}..., the list says {expected.strip()[:16]}"


def _unheard_of(words: str) -> Fault:
    if words == OPTED_OUT:
        return Fault("opted_out", "the X-Robots-Tag header asks to keep hands off")
    return Fault("http_error", words)


def _failed(row: int, status: str, failure: str, message: str) -> dict[str, Any]:
    return {"row": row, "status": status, "failure": failure, "error_message": message[:500]}
