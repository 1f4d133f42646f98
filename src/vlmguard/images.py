"""Pictures from a request to what a model takes.

    data URI --open_url--> bytes --decode--> RGB frames --model_ready--> a frame that every vision tower takes

What `decode` reads and how is written at the top of pixels.py.
"""

import binascii
import math
from typing import Protocol
from urllib.parse import unquote, unquote_to_bytes

import pybase64
from PIL import Image

from vlmguard.errors import ConfigError, ImageNotAllowed, ImageUnreadable
from vlmguard.pixels import LIMITS, MIME_TYPES, Limits, decode, format_of, too_many_bytes

__all__ = ["LIMITS", "Limits", "decode", "frames", "model_ready", "open_url", "to_data_uri"]

REMEDY = "Send the picture itself as data:image/png;base64,..."


class Located(Protocol):
    """Something with a `url`, such as an image part of a chat."""

    @property
    def url(self) -> str: ...


def frames(image: str | Located, limits: Limits = LIMITS) -> tuple[Image.Image, ...]:
    """The RGB frames of an image part, or of a data URI.

    Raises:
        ImageError: as `open_url` and `decode`.
    """
    return decode(open_url(image if isinstance(image, str) else image.url, limits), limits)


def open_url(url: str, limits: Limits = LIMITS) -> bytes:
    """The bytes in a data URI, in whatever spelling (F055, F056).

    It takes any case, any MIME type and parameters or none, percent encoding, white space and line breaks,
    the URL-safe alphabet and missing padding.

    Raises:
        ImageNotAllowed: it is another kind of address, or a path.
        ImageUnreadable: it cannot be decoded.
        ImageTooLarge: it holds more bytes than allowed.
    """
    scheme, colon, _ = url[:32].lstrip().partition(":")
    if not colon or scheme.lower() != "data":
        raise _not_allowed(scheme.lower() if colon else "")
    if len(url) > 3 * limits.bytes + 4096:  # more than every byte percent-encoded
        raise too_many_bytes(len(url) // 3, limits)
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageUnreadable("the data URI has no comma", REMEDY)
    parameters = [parameter.strip().lower() for parameter in head.split(";")]
    data = _from_base64(body) if "base64" in parameters else unquote_to_bytes(body.strip())
    if len(data) > limits.bytes:
        raise too_many_bytes(len(data), limits)
    return data


def to_data_uri(data: bytes) -> str:
    """A data URI in base64 with the MIME type that the bytes have.

    Raises:
        ImageUnreadable: they are of no format that is read here.
    """
    return f"data:{MIME_TYPES[format_of(data)]};base64,{pybase64.b64encode(data).decode()}"


def model_ready(frame: Image.Image, min_side: int = 32, max_side: int = 2048, max_aspect: float = 20.0) -> Image.Image:
    """The frame in a size that vision towers and their processors take (F049).

    It is shrunk until its long side is at most `max_side`, padded with white until its sides are at most
    `max_aspect` to 1, and enlarged until its short side is at least `min_side`. One that fits is left alone.

    Args:
        frame: RGB.
        min_side: 28 for Qwen2-VL, 32 for Qwen3-VL.
        max_aspect: Qwen2-VL's processor refuses 200 and more.
    """
    if not 1 <= min_side <= max_side or max_aspect < 1:
        got = (min_side, max_side, max_aspect)
        raise ConfigError.wrong("sides", expected="1 <= min_side <= max_side and max_aspect >= 1", got=got)
    if max(frame.size) > max_side:
        frame = _scaled(frame, max_side / max(frame.size))
    short = math.ceil(max(frame.size) / min(max_aspect, max_side / min_side))
    if min(frame.size) < short:
        page = Image.new("RGB", (max(frame.width, short), max(frame.height, short)), "white")
        page.paste(frame, ((page.width - frame.width) // 2, (page.height - frame.height) // 2))
        frame = page
    return _scaled(frame, min_side / min(frame.size)) if min(frame.size) < min_side else frame


def _scaled(frame: Image.Image, factor: float) -> Image.Image:
    size = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
    return frame.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _from_base64(body: str) -> bytes:
    try:
        return pybase64.b64decode(body, validate=True)  # as nearly all are spelled; fifty times as fast as what follows
    except ValueError:
        pass
    text = "".join((unquote(body) if "%" in body else body).split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError as error:
        raise ImageUnreadable(f"the data URI is not base64 ({error})", REMEDY) from None


def _not_allowed(scheme: str) -> ImageNotAllowed:
    if scheme in ("http", "https"):
        return ImageNotAllowed(f"the image is a remote address ({scheme}:), which is not fetched", REMEDY)
    if scheme in ("", "file"):
        return ImageNotAllowed("the image is a path, and files here are not read", REMEDY)
    return ImageNotAllowed("the image is an address of a kind that is not read", REMEDY)
