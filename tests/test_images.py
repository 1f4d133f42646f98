"""Fixtures are made here; those that others made are in test_hostile_images.py."""

import base64
import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pybase64
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmguard import pixels
from vlmguard.errors import ConfigError, ImageNotAllowed, ImageTooLarge, ImageUnreadable
from vlmguard.images import LIMITS, Limits, decode, frames, model_ready, open_url, to_data_uri

RED, GREEN, BLUE, WHITE = (250, 0, 0), (0, 250, 0), (0, 0, 250), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners() -> Image.Image:
    """A picture 48 x 32 whose corners are red, green, blue, white: any turn or flip shows."""
    image = Image.new("RGB", (48, 32))
    for at, colour in zip([(0, 0), (24, 0), (0, 16), (24, 16)], [RED, GREEN, BLUE, WHITE], strict=True):
        image.paste(colour, (*at, at[0] + 24, at[1] + 16))
    return image


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the quarters."""
    at = [(image.width * x // 4, image.height * y // 4) for y in (1, 3) for x in (1, 3)]
    return [tuple(image.convert("RGB").getpixel(point)) for point in at]  # type: ignore[arg-type]


def near(image: Image.Image, *expected: tuple[int, ...], within: int = 16) -> bool:
    return all(
        abs(a - b) <= within
        for got, want in zip(colours(image), expected, strict=True)
        for a, b in zip(got, want, strict=True)
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def blank_png(width: int, height: int) -> bytes:
    """A PNG that says it is of any size, in a few bytes."""
    return png(width, height, 1, 0, b"")


ORDINARY: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded(corners()),
    "palette png": lambda: encoded(corners().quantize(4)),
    "jpeg": lambda: encoded(corners(), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": lambda: encoded(corners(), "JPEG", quality=95, subsampling=0, progressive=True),
    "cmyk jpeg": lambda: encoded(corners().convert("CMYK"), "JPEG", quality=95),
    "mpo": lambda: encoded(corners(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], quality=95),
    "webp": lambda: encoded(corners(), "WEBP", quality=95),
    "lossless webp": lambda: encoded(corners(), "WEBP", lossless=True),
    "webp with alpha": lambda: encoded(corners().convert("RGBA"), "WEBP", exact=True, exif=Image.Exif()),
    "gif": lambda: encoded(corners(), "GIF"),
    "avif": lambda: encoded(corners(), "AVIF", quality=95, subsampling="4:4:4"),
    "bmp": lambda: encoded(corners(), "BMP"),
    "32-bit bmp": lambda: encoded(corners().convert("RGBA"), "BMP"),
    "tiff": lambda: encoded(corners(), "TIFF"),
    "lzw tiff": lambda: encoded(corners(), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": lambda: encoded(corners(), "TIFF", big_tiff=True),
    "cmyk tiff": lambda: encoded(corners().convert("CMYK"), "TIFF"),
    "ycbcr tiff": lambda: encoded(corners().convert("YCbCr"), "TIFF"),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_formats_and_modes(make: Callable[[], bytes]) -> None:
    (frame,) = decode(make())
    assert (frame.mode, frame.size) == ("RGB", (48, 32))
    assert near(frame, RED, GREEN, BLUE, WHITE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    image = corners()
    if (turn := back.get(orientation, pixels.TURNS.get(orientation))) is not None:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = orientation
    options = {"subsampling": "4:4:4"} if kind == "AVIF" else {}
    (frame,) = decode(encoded(image, kind, exif=exif, **options))
    assert frame.size == (48, 32)
    assert near(frame, RED, GREEN, BLUE, WHITE, within=40)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    for kind, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True, "exact": True}),
        ("TIFF", {}),
        ("AVIF", {}),
    ):
        assert near(decode(encoded(clear, kind, **options))[0], *[WHITE] * 4, within=2)
        assert near(decode(encoded(half, kind, **options))[0], *[(127, 127, 127)] * 4, within=3)
    assert near(decode(encoded(Image.new("LA", (8, 8), (0, 0))))[0], *[WHITE] * 4, within=0)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_lies_on_white(mode: str) -> None:
    image = Image.new(mode, (8, 8))  # black
    key = (0, 0, 0) if mode == "RGB" else 0
    assert near(decode(encoded(image, transparency=key))[0], *[WHITE] * 4, within=0)
    if mode in ("P", "L"):
        assert near(decode(encoded(image, "GIF", transparency=0))[0], *[WHITE] * 4, within=0)


def test_partly_transparent_palettes() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    assert near(decode(encoded(image, transparency=bytes([255, 128])))[0], *[(127, 127, 127)] * 4, within=1)


def test_sixteen_bit_greys_are_scaled() -> None:
    def row(*values: int) -> bytes:
        return b"\0" + struct.pack(f">{len(values)}H", *values)

    grey = decode(png(4, 1, 16, 0, row(0, 0x4000, 0x8000, 0xFFFF)))[0]
    assert [grey.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 64, 128, 255)]
    keyed = decode(png(2, 1, 16, 0, row(0x0100, 0x0101), chunk(b"tRNS", struct.pack(">H", 0x0100))))[0]
    assert [keyed.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (1, 1, 1)]
    rgb = decode(png(1, 1, 16, 2, row(0xFFFF, 0x8000, 0)))[0]
    assert rgb.getpixel((0, 0)) == (255, 128, 0)
    for mode in ("I;16", "I;16B"):
        tiff = Image.frombytes(mode, (2, 1), struct.pack("<2H" if mode == "I;16" else ">2H", 0, 65535))
        assert [decode(encoded(tiff, "TIFF"))[0].getpixel((x, 0)) for x in range(2)] == [
            (0, 0, 0),
            (255, 255, 255),
        ]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_stretched(mode: str) -> None:
    image = Image.new(mode, (3, 1), -1000)
    image.putpixel((1, 0), 0)
    image.putpixel((2, 0), 1000)
    frame = decode(encoded(image, "TIFF"))[0]
    assert [frame.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    assert decode(encoded(Image.new(mode, (2, 2), 7), "TIFF"))[0].getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_do_no_harm(bad: float) -> None:
    assert len(decode(encoded(Image.new("F", (2, 2), bad), "TIFF"))) == 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_every_frame_of_an_animation_is_given(kind: str) -> None:
    shown = [RED, GREEN, BLUE, WHITE]
    first, *rest = (Image.new("RGB", (16, 16), colour) for colour in shown)
    options: dict[str, Any] = {} if kind == "TIFF" else {"duration": 100}
    got = decode(encoded(first, kind, save_all=True, append_images=rest, **options))
    assert len(got) == 4
    assert all(near(frame, *[colour] * 4) for frame, colour in zip(got, shown, strict=True))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_many_frames_an_even_sample_with_the_last_is_given(kind: str) -> None:
    first, *rest = (Image.new("RGB", (16, 16), (2 * at, 0, 0)) for at in range(101))
    data = encoded(
        first,
        kind,
        save_all=True,
        append_images=rest,
        duration=40,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    got = decode(data, Limits(frames=5))
    assert [frame.getpixel((0, 0)) for frame in got] == [(2 * at, 0, 0) for at in (0, 25, 50, 75, 100)]
    assert len(decode(data)) == LIMITS.frames
    assert len(decode(data, Limits(frames=1))) == 1


def test_pages_of_several_sizes() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "TIFF", save_all=True, append_images=[Image.new("L", (20, 4), 9)])
    assert [frame.size for frame in decode(data)] == [(8, 8), (20, 4)]
    with pytest.raises(ImageTooLarge, match="20 x 4"):
        decode(data, Limits(side=10))


def test_large_frames_are_given_reduced() -> None:
    limits = Limits(kept_pixels=1000)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        image = corners().resize((3600, 2400), Image.Resampling.NEAREST)
        (frame,) = decode(encoded(image, kind), limits)
        assert 700 < frame.width * frame.height <= 1000
        assert frame.width / frame.height == pytest.approx(1.5, abs=0.1)
        assert near(frame, RED, GREEN, BLUE, WHITE)
    first, *rest = [corners()] * 2
    assert decode(encoded(first, "TIFF", save_all=True, append_images=rest * 15), limits)[9].width == 19


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_the_outline_is_told_without_decoding(kind: str) -> None:
    data = encoded(Image.new("RGB", (5000, 30)), kind)
    assert pixels.outline(data) == (5000, 30, 1)
    with pytest.raises(ImageTooLarge, match="5000 x 30"):
        pixels.outline(data, Limits(side=4000))


def test_the_outline_counts_frames_and_does_not_read_what_follows_the_header() -> None:
    shots = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "lime")]
    assert pixels.outline(encoded(shots[0], "GIF", save_all=True, append_images=shots[1:])) == (9, 7, 3)
    half = encoded(Image.effect_noise((300, 200), 90).convert("RGB"))[:5000]
    assert pixels.outline(half) == (300, 200, 1)
    with pytest.raises(ImageUnreadable):
        decode(half)


def test_the_bytes_decide_the_format() -> None:
    assert to_data_uri(encoded(corners(), "WEBP")).startswith("data:image/webp;base64,")
    assert {to_data_uri(make())[5:].partition(";")[0] for make in ORDINARY.values()} == set(pixels.MIME_TYPES.values())
    assert near(
        frames("data:image/jpeg;base64," + to_data_uri(encoded(corners())).partition(",")[2])[0],
        RED,
        GREEN,
        BLUE,
        WHITE,
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\x0a" + bytes(20),  # JPEG XL
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(20),
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"8BPS" + bytes(40),
        b"P6 1 1 255 abc",
        b"\0\0\1\0\1\0" + bytes(40),  # ICO
    ],
)
def test_other_formats_are_refused_by_name(data: bytes) -> None:
    for reader in (decode, to_data_uri):
        with pytest.raises(ImageUnreadable, match="PNG, JPEG, WEBP, GIF, AVIF, BMP, TIFF"):
            reader(data)


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_a_picture_that_ends_early_is_broken(make: Callable[[], bytes]) -> None:
    data = make()
    if b"MPF\0" in data[:200]:
        data = data[: data.index(b"\xff\xd9")]
    with pytest.raises(ImageUnreadable, match=r"broken|out of step|pixels"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((6400, 6400), "40,000,000"),
        ((16_385, 1), "16,384"),
        ((1, 20_000), "16,384"),
        ((60_000, 60_000), "16,384|40,000,000"),
    ],
)
def test_bombs_are_refused_by_their_header(size: tuple[int, int], match: str) -> None:
    with pytest.raises(ImageTooLarge, match=match):
        decode(blank_png(*size))


def test_bombs_in_other_formats() -> None:
    large = Image.new("L", (4000, 4000))
    hungry: dict[str, dict[str, Any]] = {"WEBP": {"method": 0}, "AVIF": {"speed": 10}}
    for kind, options in hungry.items():  # they need more memory: there is room for fewer pixels
        with pytest.raises(ImageTooLarge, match="4000 x 4000"):
            decode(encoded(large, kind, **options))
    small = encoded(Image.new("L", (8, 8)), "GIF")
    at = small.index(b",\0\0\0\0\x08\0\x08\0")
    with pytest.raises(ImageTooLarge, match="65535 x 8"):  # a frame beyond its canvas
        decode(small[: at + 5] + b"\xff\xff" + small[at + 7 :])
    webp = encoded(corners().convert("RGBA"), "WEBP", exif=b"x")
    with pytest.raises(ImageTooLarge, match="16777216"):
        decode(webp[:24] + b"\xff\xff\xff" + webp[27:])
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 16_000, 323: 16_000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with pytest.raises(ImageTooLarge, match="16000"):  # a tile far larger than the picture
        decode(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4))
    with pytest.raises(ImageTooLarge, match="20,971,520"):
        decode(bytes(20 * 2**20 + 1))
    first, *rest = (Image.new("L", (500, 500), at) for at in range(11))
    animation = encoded(first, "GIF", save_all=True, append_images=rest)
    with pytest.raises(ImageTooLarge, match="11 frames"):
        decode(animation, Limits(animation_pixels=2_500_000))


def test_jpegs_of_many_scans_are_refused() -> None:
    data = encoded(corners(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageTooLarge, match="scans"):
        decode(data[:-2] + data[last:-2] * 50 + data[-2:])


def test_reading_is_given_up_after_a_while() -> None:
    blocks = b"\x21\xfe" + b"\x01a" * 500_000 + b"\0"
    data = encoded(corners(), "GIF")
    at = data.index(b",\0\0\0\0")
    with pytest.raises(ImageTooLarge, match=r"0\.05 seconds"):
        decode(data[:at] + blocks + data[at:], Limits(seconds=0.05))


@given(st.text("ABab01+/=-_ \n", max_size=16))
def test_the_fast_reader_of_base64_takes_nothing_that_the_careful_one_would_not(body: str) -> None:
    def fast() -> bytes | None:
        try:
            return pybase64.b64decode(body, validate=True)
        except ValueError:
            return None

    def careful() -> bytes | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlmguard.images.pybase64.b64decode", refuse)
            try:
                return open_url(f"data:;base64,{body}")
            except ImageUnreadable:
                return None

    assert fast() in (None, careful())


def refuse(*_: object, **__: object) -> bytes:
    raise ValueError


def test_pillows_settings_are_left_alone_and_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in (None, 89_478_485):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", setting)
        with pytest.raises(ImageTooLarge):
            decode(blank_png(16_000, 16_000))
        assert setting == Image.MAX_IMAGE_PIXELS


def test_no_warning_gets_out_and_the_filters_stay() -> None:
    broken_exif = encoded(corners(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xffabcd")
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(decode(broken_exif)) == 1
    assert caught == []
    assert warnings.filters == before


def test_threads_decode_alike() -> None:
    data, got = encoded(corners(), "JPEG"), list[bytes]()
    threads = [threading.Thread(target=lambda: got.append(decode(data)[0].tobytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(got)) == 1


MEASURE = """
import sys
from pathlib import Path
from PIL import Image
from vlmguard.images import decode

def kilobytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

decode(Path(sys.argv[1]).read_bytes())
data, before = Path(sys.argv[2]).read_bytes(), kilobytes("VmRSS")
decode(data)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["rgba png", "webp", "tiff", "progressive jpeg"])
def test_the_largest_pictures_take_under_300_megabytes(kind: str, tmp_path: Path) -> None:
    if kind == "rgba png":
        data = png(6324, 6324, 8, 6, (b"\0" + b"\x80\x20\x60\x7f" * 6324) * 6324)
    else:
        recipes: dict[str, dict[str, Any]] = {
            "webp": {"kind": "WEBP", "lossless": True, "quality": 0, "method": 0},
            "tiff": {
                "kind": "TIFF",
                "compression": "tiff_lzw",
                "tiffinfo": {pixels.ORIENTATION: 6, 278: 4470},
            },
            "progressive jpeg": {"kind": "JPEG", "progressive": True, "subsampling": 0},
        }
        side = {"webp": 3518, "tiff": 4470, "progressive jpeg": 5700}[kind]
        data = encoded(Image.new("RGB", (side, side), RED), **recipes[kind])
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(encoded(corners()))
    large.write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    out = subprocess.run(command, capture_output=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}).stdout
    assert int(out) < 300_000


HOP = encoded(corners())
PLAIN = base64.b64encode(HOP).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{PLAIN}",
        f"DATA:Image/PNG;charset=utf-8;BASE64,{PLAIN}",
        f"data:;base64,{PLAIN}",
        f"data:image/png;name=a.png; base64 ,{PLAIN}",
        f"data:text/plain;base64,{PLAIN}",
        f"  data:image/png;base64,  {PLAIN}\n",
        "data:image/png;base64," + "\r\n".join(PLAIN[at : at + 76] for at in range(0, len(PLAIN), 76)),
        f"data:image/png;base64,{PLAIN.rstrip('=')}",
        f"data:image/png;base64,{PLAIN.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{quote(PLAIN, safe='')}",
        f"data:image/png,{quote(HOP)}",
        f"data:,{quote(HOP)}",
    ],
)
def test_data_uris_of_every_spelling(url: str) -> None:
    assert open_url(url) == HOP
    assert frames(url)[0].size == (48, 32)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:",
        "data:image/png;base64,A",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,Aä!!",
    ],
)
def test_data_uris_that_cannot_be_decoded(url: str) -> None:
    with pytest.raises(ImageUnreadable):
        open_url(url)


def test_empty_data_uris_are_unreadable() -> None:
    for url in ("data:image/png;base64,", "data:,", "data:image/png;base64,===="):
        with pytest.raises(ImageUnreadable, match="empty"):
            frames(url)


def test_data_uris_over_the_limit() -> None:
    limits = Limits(bytes=len(HOP) - 1)
    with pytest.raises(ImageTooLarge):
        open_url(f"data:;base64,{PLAIN}", limits)
    with pytest.raises(ImageTooLarge):
        open_url("data:," + " " * (3 * LIMITS.bytes + 4096))


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("https://example.org/secret.png", "remote"),
        ("HTTP://169.254.169.254/", "remote"),
        ("file:///etc/hostname", "path"),
        ("/etc/hostname", "path"),
        ("C:\\a.png", "kind"),
        ("ftp://example.org/a.png", "kind"),
        ("file-id:file-7", "kind"),
        ("javascript:alert(1)", "kind"),
        ("", "path"),
        (PLAIN, "path"),
        ("x" * 10_000_000, "path"),
    ],
)
def test_other_addresses_are_refused_without_repeating_them(url: str, match: str) -> None:
    with pytest.raises(ImageNotAllowed, match=match) as caught:
        frames(url)
    assert "secret" not in str(caught.value)
    assert "data:image/png" in str(caught.value)


@pytest.mark.parametrize(
    "size", [(1, 1), (16_384, 1), (1, 16_384), (27, 27), (5, 300), (640, 480), (4000, 10), (3, 2000)]
)
@pytest.mark.parametrize("min_side", [28, 32])
def test_model_ready_bounds_sides_and_aspect(size: tuple[int, int], min_side: int) -> None:
    frame = model_ready(Image.new("RGB", size, RED), min_side=min_side)
    assert min(frame.size) >= min_side
    assert max(frame.size) <= 2048
    assert max(frame.size) / min(frame.size) <= 20
    assert frame.getpixel((frame.width // 2, frame.height // 2)) == RED or size == (16_384, 1)


def test_model_ready_leaves_what_fits() -> None:
    fits = corners()
    assert model_ready(fits) is fits
    assert near(model_ready(fits, max_side=40), RED, GREEN, BLUE, WHITE)
    assert model_ready(fits, min_side=64).size == (96, 64)
    with pytest.raises(ConfigError, match="min_side"):
        model_ready(fits, min_side=64, max_side=32)
