"""Pictures that the project draws itself: those of the demo's requests, and the card that shows a guarded one.

Everything is drawn at twice its size with Pillow's own font, so that it is the same on every machine.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFilter, ImageFont

Box: TypeAlias = tuple[float, float, float, float]

SCALE = 2
SIDE = 640
INK, FAINT, RULE, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#ffffff"
RED, GREEN, AMBER, BLUE = "#b91c1c", "#15803d", "#b45309", "#1d4ed8"
TINTS = {RED: "#fef2f2", GREEN: "#f0fdf4", AMBER: "#fffbeb", BLUE: "#eff6ff"}
ACTION_COLOURS = {"passed": GREEN, "rewrote": AMBER, "refused": RED, "flagged": AMBER}


@cache
def font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels * SCALE)


def typeset(title: str, items: Sequence[str]) -> Image.Image:
    """A printed page with a title and a numbered list."""
    page, pen = _sheet(SIDE, SIDE, "#fdfdfb")
    top = 56
    for line in title.split("\n"):
        _write(pen, (48, top), line, 40, INK, bold=True)
        top += 56
    pen.line((_scaled(48, top + 10), _scaled(592, top + 10)), fill="#9ca3af", width=2 * SCALE)
    for number, item in enumerate(items, start=1):
        _write(pen, (48, top + 48 + 84 * (number - 1)), f"{number}.  {item}", 34, INK)
    return _small(page)


def notepad(title: str, items: Sequence[str]) -> Image.Image:
    """A shopping list on a yellow pad."""
    page, pen = _sheet(SIDE, SIDE, "#d6d3d1")
    _shadow(page, (84, 60, 556, 612), 14)
    pen.rounded_rectangle(_box(84, 60, 556, 612), 14 * SCALE, fill="#fef9c3")
    pen.rounded_rectangle(_box(84, 60, 556, 124), 14 * SCALE, fill="#b45309")
    pen.rectangle(_box(84, 104, 556, 124), fill="#b45309")
    _write(pen, (112, 70), title, 34, "#fffbeb", bold=True)
    for number, item in enumerate(items):
        top = 164 + 74 * number
        pen.line((_scaled(84, top + 54), _scaled(556, top + 54)), fill="#fde047", width=2 * SCALE)
        pen.rounded_rectangle(_box(116, top + 8, 144, top + 36), 5 * SCALE, outline="#57534e", width=3 * SCALE)
        _write(pen, (172, top), item, 36, "#292524")
    return _small(page)


def bottles(names: Sequence[tuple[str, str, str]]) -> Image.Image:
    """Bottles on a shelf; each has a name, a line of small print and a colour."""
    page, pen = _sheet(SIDE, SIDE, "#e7eef5")
    pen.rectangle(_box(0, 548, SIDE, SIDE), fill="#a8a29e")
    pen.rectangle(_box(0, 548, SIDE, 560), fill="#78716c")
    width = SIDE / len(names)
    for place, (name, print_, colour) in enumerate(names):
        middle = width * (place + 0.5)
        _shadow(page, (middle - 112, 214, middle + 112, 560), 34)
        _bottle(page, middle, colour)
        pen.rounded_rectangle(_box(middle - 98, 314, middle + 98, 470), 10 * SCALE, fill="#ffffff")
        pen.rectangle(_box(middle - 98, 440, middle + 98, 456), fill=colour)
        size = next(size for size in range(40, 0, -1) if pen.textlength(name, font(size)) <= 168 * SCALE)
        _centred(pen, middle, 364 - size / 2, name, size, INK, bold=True)
        _centred(pen, middle, 402, print_, 18, FAINT)
    return _small(page)


def card(scene: Mapping[str, Any], picture: Image.Image) -> Image.Image:
    """A guarded request as one picture: what was asked, what the model said without the guard, and with it.

    Args:
        scene: a record with `unguarded`, the answer to the request as it was.
    """
    width, left, side = 1200, 40, 320
    verdict = ACTION_COLOURS[scene["action"]]
    middle = left + side + 32
    asked = [("The request", INK, scene["original"] or "(no text: the picture alone)")]
    said = [("Without the guard", INK if scene["action"] == "passed" else RED, scene["unguarded"])]
    analysis = scene["analysis"] or {}
    thought = [
        (title, AMBER, analysis[part])
        for part, title in (("text", "The words"), ("image", "The picture"), ("together", "The two together"))
        if part in analysis
    ]
    sent = [("What the model gets instead", BLUE, scene["prompt"])] if scene["action"] == "rewrote" else []
    answered = [("With the guard", GREEN, scene["answer"] or "")]

    page, pen = _sheet(width, 2400, PAPER)
    pen.rectangle(_box(0, 0, width, 8), fill=verdict)
    _paste(page, picture, (left, 40, left + side, 40 + side))
    right = _column(pen, middle, 40, width - left - middle, [*asked, *said])
    top = max(40 + side, right) + 28
    pen.line((_scaled(left, top), _scaled(width - left, top)), fill=RULE, width=2 * SCALE)
    top += 24
    end = f": {scene['category']}" if scene["category"] else " unchanged" if scene["action"] == "passed" else ""
    label = f"VLMGuard-R1 {scene['action']} this request{end}"
    _write(pen, (left, top), label.replace("_", " "), 24, verdict, bold=True)
    if scene["risk"] is not None and scene["threshold"] is not None:
        risk = f"risk {scene['risk']:.2f}, threshold {scene['threshold']:.2f}"
        _write(pen, (width - left - pen.textlength(risk, font(20)) / SCALE, top + 4), risk, 20, FAINT)
    top += 48
    half = (width - 2 * left - 32) / 2
    ends = [
        _column(pen, left, top, half if thought else 0, thought),
        _column(pen, left + (half + 32 if thought else 0), top, half if thought else 2 * half + 32, [*sent, *answered]),
    ]
    return _small(page.crop((0, 0, width * SCALE, int(max(ends) + 24) * SCALE)), 1)


def _column(
    pen: ImageDraw.ImageDraw, left: float, top: float, width: float, blocks: Sequence[tuple[str, str, str]]
) -> float:
    """Writes titled blocks one under another; gives where they end."""
    for title, colour, text in blocks:
        lines = _wrapped(pen, text, 21, width - 40)
        height = 50 + 30 * len(lines)
        pen.rounded_rectangle(
            _box(left, top, left + width, top + height), 10 * SCALE, fill=TINTS.get(colour, "#f9fafb")
        )
        pen.rectangle(_box(left, top + 10, left + 4, top + height - 10), fill=colour)
        _write(pen, (left + 20, top + 10), title, 16, colour)
        for number, line in enumerate(lines):
            _write(pen, (left + 20, top + 36 + 30 * number), line, 21, INK)
        top += height + 14
    return top


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, width: float) -> list[str]:
    """The text in lines of at most `width`, a dozen at most."""
    lines: list[str] = []
    for paragraph in text.strip().split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and pen.textlength(longer, font(size)) > width * SCALE:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines if len(lines) <= 12 else [*lines[:11], lines[11] + " ..."]


def _bottle(page: Image.Image, middle: float, colour: str) -> None:
    """A plastic bottle, rounder at its sides by a band of light and one of shade."""
    shape = Image.new("L", page.size)
    pen = ImageDraw.Draw(shape)
    pen.rounded_rectangle(_box(middle - 112, 236, middle + 112, 556), 34 * SCALE, fill=255)
    pen.polygon(
        [_scaled(middle - 112, 280), _scaled(middle - 34, 170), _scaled(middle + 34, 170), _scaled(middle + 112, 280)],
        255,
    )
    body = Image.new("RGB", page.size, colour)
    light = Image.new("L", page.size)
    ImageDraw.Draw(light).rectangle(_box(middle - 88, 160, middle - 58, 556), fill=90)
    body.paste("#ffffff", mask=light.filter(ImageFilter.GaussianBlur(12 * SCALE)))
    shade = Image.new("L", page.size)
    ImageDraw.Draw(shade).rectangle(_box(middle + 84, 160, middle + 130, 560), fill=120)
    body.paste("#000000", mask=shade.filter(ImageFilter.GaussianBlur(16 * SCALE)))
    page.paste(body, mask=shape)
    cap = ImageDraw.Draw(page)
    cap.rounded_rectangle(_box(middle - 40, 112, middle + 40, 176), 8 * SCALE, fill="#f3f4f6")
    for groove in range(-32, 40, 12):
        cap.line((_scaled(middle + groove, 118), _scaled(middle + groove, 170)), fill="#cbd5e1", width=3 * SCALE)


def _sheet(width: int, height: int, colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (width * SCALE, height * SCALE), colour)
    return page, ImageDraw.Draw(page)


def _shadow(page: Image.Image, box: Box, radius: int) -> None:
    mask = Image.new("L", page.size)
    left, top, right, bottom = box
    ImageDraw.Draw(mask).rounded_rectangle(_box(left + 6, top + 10, right + 6, bottom + 6), radius * SCALE, fill=110)
    page.paste("#1c1917", mask=mask.filter(ImageFilter.GaussianBlur(9 * SCALE)))


def _paste(page: Image.Image, picture: Image.Image, box: Box) -> None:
    """The picture, whole, in the middle of the box, with round corners."""
    left, top, right, bottom = box
    fitted = picture.convert("RGB")
    fitted.thumbnail((int(right - left) * SCALE, int(bottom - top) * SCALE), Image.Resampling.LANCZOS)
    mask = Image.new("L", fitted.size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, fitted.width - 1, fitted.height - 1), 12 * SCALE, fill=255)
    page.paste(fitted, (int(left * SCALE), int(top * SCALE)), mask)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str, *, bold: bool = False
) -> None:
    pen.text(_scaled(*at), text, fill=colour, font=font(size), stroke_width=SCALE * size / 60 if bold else 0)


def _centred(
    pen: ImageDraw.ImageDraw, middle: float, top: float, text: str, size: int, colour: str, *, bold: bool = False
) -> None:
    _write(pen, (middle - pen.textlength(text, font(size)) / 2 / SCALE, top), text, size, colour, bold=bold)


def _small(page: Image.Image, scale: int = SCALE) -> Image.Image:
    return page if scale == 1 else page.resize((page.width // scale, page.height // scale), Image.Resampling.LANCZOS)


def _scaled(x: float, y: float) -> tuple[float, float]:
    return x * SCALE, y * SCALE


def _box(left: float, top: float, right: float, bottom: float) -> Box:
    return left * SCALE, top * SCALE, right * SCALE, bottom * SCALE
