"""An encoded picture to RGB frames; what it would cost is checked before anything is decoded.

The rules, the same for every guard:
- The bytes decide what a picture is, never its name or MIME type. Formats: `MIME_TYPES`; others are an error.
- Transparency lies on white. The orientation in the EXIF data is applied. Colour profiles are ignored.
- 16-bit greys are scaled to 8 bits; integers and floats without a range are stretched from their least to
  their greatest value.
- Every frame of an animation and page of a TIFF counts, not the first alone (F400). Of more than
  `Limits.frames` an even sample is given, the first and the last in it. Further pictures in a JPEG (MPO:
  previews, depth maps) are left.
- A picture that ends early is broken.
- Large frames are given reduced (`Limits.kept_pixels`), by averaging.
- Pictures are decoded one at a time in a process: that bounds its memory, and Pillow's warnings can only be
  kept in by a filter that is the whole process's.
"""

import io
import math
import re
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageMath

from vlmguard.errors import ImageTooLarge, ImageUnreadable

MIME_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
REMEDY = f"Send a whole picture as {', '.join(MIME_TYPES)}."
SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    *((start, "TIFF") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
# Bytes that Pillow 13 takes at its peak for each pixel of a (still, animated) picture, measured, rounded up.
MEMORY_PER_PIXEL = {
    "PNG": (5, 20),
    "JPEG": (5, 5),
    "progressive JPEG": (8, 8),
    "WEBP": (21, 21),
    "GIF": (5, 20),
    "AVIF": (21, 36),
    "BMP": (5, 5),
    "TIFF": (13, 13),
}
JPEG_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # those that have a length, and the end
START_OF_SCAN, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"
BAND_PIXELS = 1_000_000
ORIENTATION = 0x0112
BITS_PER_SAMPLE, TILE_WIDTH, TILE_LENGTH = 258, 322, 323
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on broken files.
BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError),
    *(MemoryError, RuntimeError, AssertionError, struct.error, zlib.error),
)
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What a picture may cost.

    Args:
        bytes: of the encoded picture.
        pixels, side, min_side: of one frame, as its header says.
        frames: given of an animation.
        animation_pixels: of all frames together, given or not; bounds the time.
        kept_pixels: of a frame as it is given; with more than 4 frames, 4 times as many for all together.
        memory: bytes that decoding may take. Some formats have room for fewer `pixels` in it: WebP and AVIF
            for 12 million, animations for 5 to 9.
        scans: of a JPEG; an ordinary progressive one has 10.
        seconds: of the thread's processor time until reading the file is given up.
    """

    bytes: int = 20 * 2**20
    pixels: int = 40_000_000
    side: int = 16_384
    min_side: int = 1
    frames: int = 16
    animation_pixels: int = 250_000_000
    kept_pixels: int = 4_000_000
    memory: int = 260 * 10**6
    scans: int = 50
    seconds: float = 5.0


LIMITS = Limits()


def decode(data: bytes, limits: Limits = LIMITS) -> tuple[Image.Image, ...]:
    """The frames of an encoded picture, RGB, by the rules at the top of this file.

    Returns:
        one image or more; an animation's in their order.

    Raises:
        ImageTooLarge: it is over one of `limits`.
        ImageUnreadable: it is broken, or of a format that is not allowed.
    """
    with _reading(data, limits) as kind:
        return tuple(_frames(data, kind, limits))


def outline(data: bytes, limits: Limits = LIMITS) -> tuple[int, int, int]:
    """(width, height, frames) of an encoded picture as its header says; nothing is decoded.

    Raises:
        ImageTooLarge, ImageUnreadable: as `decode`, as far as the header tells.
    """
    with _reading(data, limits) as kind, _opened(data, kind, limits) as (image, count):
        return image.width, image.height, count


def format_of(data: bytes) -> str:
    """The format by its first bytes, a key of `MIME_TYPES`.

    Raises:
        ImageUnreadable: it is none of them.
    """
    for start, kind in SIGNATURES:
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and (b"avif" in data[8:64] or b"avis" in data[8:64]):
        return "AVIF"
    raise ImageUnreadable("the image is of no format that is read here" if data else "the image is empty", REMEDY)


def too_many_bytes(count: int, limits: Limits) -> ImageTooLarge:
    return ImageTooLarge(f"the image has {count:,} bytes", f"Send {limits.bytes:,} at most.")


class _Watched(io.BytesIO):
    """Bytes that stop being readable after a while: a million tiny blocks keep Pillow busy for minutes."""

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self.seconds, self.until = seconds, time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.until:
            raise ImageTooLarge(f"the image takes over {self.seconds:g} seconds to read", "Save it anew.")
        return super().read(size)


@contextmanager
def _reading(data: bytes, limits: Limits) -> Iterator[str]:
    """What may be done to a picture of the yielded format: one at a time, Pillow's warnings kept in, its errors ours."""
    if len(data) > limits.bytes:
        raise too_many_bytes(len(data), limits)
    kind = format_of(data)
    with _one_at_a_time, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield kind
        except Image.DecompressionBombError:
            most = _most_pixels(kind, 1, limits)
            raise ImageTooLarge(f"the {kind} image has too many pixels", f"Send {most:,} at most.") from None
        except BROKEN as error:
            raise ImageUnreadable(f"the {kind} image is broken ({type(error).__name__})", REMEDY) from error


@contextmanager
def _opened(data: bytes, kind: str, limits: Limits) -> Iterator[tuple[Image.Image, int]]:
    """The picture with nothing decoded, and how many frames it has; refused by what its header says."""
    # Pillow makes the canvas of these two as it opens them, or grows it frame by frame: so their size is read here.
    outlined = 1
    if kind == "GIF":
        size, outlined = _gif_outline(data)
        _check(size, outlined, kind, limits)
    elif kind == "WEBP":
        _check(_webp_size(data), 1, kind, limits)
    with Image.open(_Watched(data, limits.seconds), formats=[kind]) as image:
        _check(image.size, 1, kind, limits)
        count = 1 if kind == "JPEG" else int(getattr(image, "n_frames", 1))
        if kind == "GIF" and count != outlined:
            raise ImageUnreadable("the GIF image's blocks are out of step", REMEDY)
        _check(image.size, count, kind, limits)
        yield image, count


def _frames(data: bytes, kind: str, limits: Limits) -> list[Image.Image]:
    with _opened(data, kind, limits) as (image, count):
        kept = min(limits.kept_pixels, 4 * limits.kept_pixels // min(count, limits.frames))
        frames: list[Image.Image] = []
        turn = None
        for index in _sample(count, limits.frames):
            if index:
                image.seek(index)
            if kind == "TIFF":
                _check(_tiff_size(image), count, kind, limits)
            elif kind == "JPEG":
                _check_jpeg(data, image, limits)
                scale = math.sqrt(kept / math.prod(image.size))
                image.draft(None, (int(image.width * scale), int(image.height * scale)))
            frames.append(_reduced(image, kept))
            if not index and kind != "TIFF":  # Pillow turns the pages of a TIFF itself
                turn = TURNS.get(_orientation(image))
    return frames if turn is None else [frame.transpose(turn) for frame in frames]


def _sample(count: int, limit: int) -> Sequence[int]:
    if count <= limit:
        return range(count)
    return [round(at * (count - 1) / max(1, limit - 1)) for at in range(limit)]


def _check(size: tuple[int, int], count: int, kind: str, limits: Limits) -> None:
    """Refuses a picture of `count` frames by what its header says."""
    named = f"the {kind} image has {size[0]} x {size[1]} pixels"
    if min(size) < limits.min_side:
        raise ImageUnreadable(named, f"Send {limits.min_side} or more a side.")
    if max(size) > limits.side:
        raise ImageTooLarge(named, f"Send {limits.side:,} a side at most.")
    if math.prod(size) > (most := _most_pixels(kind, count, limits)):
        raise ImageTooLarge(named, f"Send {most:,} pixels at most.")
    if math.prod(size) * count > limits.animation_pixels:
        raise ImageTooLarge(f"{named} in {count} frames", f"Send {limits.animation_pixels:,} in all at most.")


def _most_pixels(kind: str, count: int, limits: Limits) -> int:
    held = min(4, count) * limits.kept_pixels * 4 if count > 1 else 0  # the frames to give; Pillow has 4 bytes a pixel
    return min(limits.pixels, (limits.memory - held) // MEMORY_PER_PIXEL[kind][count > 1])


def _check_jpeg(data: bytes, image: Image.Image, limits: Limits) -> None:
    """Refuses a progressive JPEG that takes too much memory (for coefficients) or time (for scans)."""
    if "progressive" in image.info:
        _check(image.size, 1, "progressive JPEG", limits)
    at, scans, segments = 2, 0, 0
    while (found := JPEG_SEGMENT.search(data, at)) and found[0] != END_OF_JPEG:
        scans, segments = scans + (found[0] == START_OF_SCAN), segments + 1
        if scans > limits.scans or segments > 100 * limits.scans:
            raise ImageTooLarge(f"the JPEG image has {scans} scans or more", f"Send {limits.scans} at most.")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _gif_outline(data: bytes) -> tuple[tuple[int, int], int]:
    """The size of a GIF's canvas, grown to hold all its frames as Pillow grows it, and how many they are."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, count = 13 + _palette_bytes(flags), 0
    while at < len(data) and data[at] != 0x3B:
        block = data[at]
        if block == 0x2C:
            left, top, wide, high, flags = struct.unpack_from("<4HB", data, at + 1)
            width, height, count = max(width, left + wide), max(height, top + high), count + 1
            at = _after_blocks(data, at + 11 + _palette_bytes(flags))
        elif block == 0x21:
            at = _after_blocks(data, at + 2)
        else:
            at += 1
    return (width, height), count


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def _tiff_size(image: Image.Image) -> tuple[int, int]:
    """The size of a TIFF, or of its tiles if larger: libtiff makes room for a whole one, however small the picture."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    return max(image.width, int(tags.get(TILE_WIDTH, 1))), max(image.height, int(tags.get(TILE_LENGTH, 1)))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except BROKEN:  # broken EXIF data: the pixels are still there
        return 1


def _reduced(image: Image.Image, kept: int) -> Image.Image:
    """The frame as RGB with `kept` pixels at most, made in bands: a whole copy would take too much memory."""
    image.load()
    width, height = image.size
    factor = max(1, math.isqrt(width * height // kept))
    rows = max(1, BAND_PIXELS // (width * factor)) * factor
    levels = _levels(image)
    frame = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    for top in range(0, height, rows):
        band = _rgb(image.crop((0, top, width, min(top + rows, height))), levels)
        frame.paste(band.reduce(factor) if factor > 1 else band, (0, top // factor))
    if math.prod(frame.size) > kept:
        scale = math.sqrt(kept / math.prod(frame.size))
        size = max(1, int(frame.width * scale)), max(1, int(frame.height * scale))
        frame = frame.resize(size, Image.Resampling.BOX)
    return frame


def _levels(image: Image.Image) -> tuple[float, float] | None:
    """The values that become black and white, where they are not 0 and 255."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        return 0, 2 ** min(16, max(8, bits)) - 1
    if image.mode not in ("I", "F"):
        return None
    low, high = image.getextrema()
    if isinstance(low, tuple) or isinstance(high, tuple) or not math.isfinite(high - low) or high <= low:
        return 0, 255
    return low, high


def _rgb(image: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    key = image.info.get("transparency")
    if levels:
        low, high = levels
        scale = 255 / (high - low)
        grey = image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L").convert("RGB")
        if isinstance(key, int):
            same = ImageMath.lambda_eval(lambda it: it["convert"](it["image"] == key, "L"), image=image.convert("I"))
            grey.paste("white", mask=same.point(lambda value: value * 255))
        return grey
    if key is None and not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page
