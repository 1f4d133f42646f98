"""Faults that neighbours' users reported, as far as the decoding of pictures is concerned; see FAULTS.md."""

import base64
import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from vlmguard.errors import ImageError, ImageNotAllowed, ImageTooLarge, ImageUnreadable
from vlmguard.images import Limits, decode, frames, model_ready, to_data_uri

RED, WHITE = (254, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def is_red(frame: Image.Image) -> bool:
    pixel = frame.getpixel((frame.width // 2, frame.height // 2))
    assert isinstance(pixel, tuple)
    return frame.mode == "RGB" and pixel[0] > 235 and max(pixel[1:]) < 20


def test_f044_a_picture_is_read_upright() -> None:
    sideways = Image.new("RGB", (60, 40), WHITE)
    sideways.paste(RED, (0, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    (frame,) = decode(encoded(sideways, "JPEG", exif=exif, quality=95))
    assert frame.size == (40, 60)
    assert is_red(frame.crop((30, 20, 40, 40)))
    assert not is_red(frame.crop((0, 20, 10, 40)))


def test_f045_transparency_has_one_rule_in_every_format() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    shown = {decode(encoded(clear, kind))[0].getpixel((9, 9)) for kind in ("PNG", "WEBP", "GIF", "TIFF", "AVIF")}
    assert shown == {WHITE}


def bomb(width: int, height: int) -> bytes:
    """A one-colour PNG: its rows are zeros."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((width // 8 + 1) * height), 1)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("setting", [None, 1, 89_478_485])
def test_f046_a_bomb_is_refused_whatever_pillow_is_set_to(setting: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", setting)
    with pytest.raises(ImageTooLarge):
        decode(bomb(10_000, 10_000))
    assert setting == Image.MAX_IMAGE_PIXELS


def test_f047_too_large_is_an_error_of_its_own() -> None:
    for data, limits in (
        (bomb(8, 8), Limits(bytes=10)),
        (bomb(99, 9), Limits(side=64)),
        (bomb(99, 9), Limits(pixels=9)),
    ):
        with pytest.raises(ImageTooLarge):
            decode(data, limits)


def test_f048_pixels_are_counted_before_decoding() -> None:
    with pytest.raises(ImageTooLarge, match="10000 x 10000"):
        decode(bomb(10_000, 10_000)[:64])  # no pixel data is there to decode


@pytest.mark.parametrize("size", [(1, 1), (27, 27), (1, 500), (3000, 2)])
def test_f049_small_and_thin_pictures_are_made_to_fit(size: tuple[int, int]) -> None:
    frame = model_ready(decode(encoded(red(size=size)))[0])
    assert min(frame.size) >= 32
    assert max(frame.size) / min(frame.size) <= 20


def test_f052_webp_is_read() -> None:
    assert is_red(decode(encoded(red(), "WEBP"))[0])
    assert is_red(frames("data:image/jpeg;base64," + base64.b64encode(encoded(red(), "WEBP")).decode())[0])


def test_f053_gif_is_read() -> None:
    assert is_red(decode(encoded(red(), "GIF"))[0])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_f400_a_frame_that_is_not_the_first_is_read(kind: str) -> None:
    harmless = Image.new("RGB", (40, 40), WHITE)
    got = decode(encoded(harmless, kind, save_all=True, append_images=[harmless.point(lambda v: v // 2), red()]))
    assert is_red(got[-1])


def test_f054_modes_and_formats() -> None:
    palette = red().quantize(2)
    for data in (
        encoded(red("CMYK"), "JPEG"),
        encoded(red("CMYK"), "TIFF"),
        encoded(palette, transparency=1),
        encoded(red(), "MPO", save_all=True, append_images=[red("L")]),
    ):
        assert is_red(decode(data)[0])
    sixteen = Image.new("I;16", (4, 4), 0x8000)
    assert decode(encoded(sixteen))[0].getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "data",
    [
        encoded(red(size=(400, 400)), "JPEG")[:-600],
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"\xff\x0a\0\0",
        b"\0\0\0\x0cJXL \r\n\x87\n",
    ],
    ids=["truncated", "heic", "svg", "jxl", "jxl container"],
)
def test_f054_what_is_not_read_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(ImageUnreadable, match="Send a whole picture as PNG, JPEG"):
        decode(data)


def test_f055_a_data_uri_needs_no_mime_type() -> None:
    assert is_red(frames("data:;base64," + to_data_uri(encoded(red())).partition(",")[2])[0])
    with pytest.raises(ImageError):
        frames("data:;base64")
    with pytest.raises(ImageError):
        frames("data:;base64,...")


def test_f056_data_uris_of_other_spellings_are_read() -> None:
    body = base64.encodebytes(encoded(red())).decode().replace("=", "")
    assert body.count("\n") > 0
    assert is_red(frames("DATA:Image/PNG;charset=utf-8;base64,\r\n" + body)[0])


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "HTTPS://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "../a.png"],
)
def test_f060_f063_nothing_is_fetched_or_opened(url: str) -> None:
    with pytest.raises(ImageNotAllowed):
        frames(url)


def test_f066_errors_hold_no_image() -> None:
    broken = base64.b64encode(encoded(red(size=(400, 400)), "JPEG")[:-600]).decode()
    for url in (f"data:image/jpeg;base64,{broken}", f"x:{broken}", broken, f"data:;base64,!{broken}"):
        with pytest.raises(ImageError) as caught:
            frames(url)
        assert len(str(caught.value)) < 300
        assert broken[:20] not in str(caught.value)
