"""Pictures that the training data draws itself: typeset lists, strips, labels, signs, chats and documents.

A spec comes from `data/situations` (its README says what each key means); the same spec and seed give the same picture.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FONT_FOLDERS = ("/usr/share/fonts/truetype/dejavu",)
INKS = ["black", "black", "black", "#202040", "#401010", "#103010"]
PAPERS = ["white", "white", "white", "#fbf7ec", "#f0f4f8", "#fff8d8"]


def fonts() -> list[Path]:
    """The machine's DejaVu fonts, if any; Pillow's own font always stands beside them."""
    return sorted(path for folder in FONT_FOLDERS for path in Path(folder).glob("DejaVu*.ttf"))


def font(size: int, rng: random.Random) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    found = fonts()
    if found and rng.random() < 0.7:
        return ImageFont.truetype(str(rng.choice(found)), size)
    return ImageFont.load_default(size)


def words(spec: Mapping[str, Any]) -> list[str]:
    """The lines that a spec draws, in reading order."""
    for kind in ("typeset", "sign", "label", "chat", "document", "strip"):
        if kind in spec:
            lines = spec[kind]
            return [lines] if isinstance(lines, str) else list(lines)
    return []


def draw(spec: Mapping[str, Any], rng: random.Random, photo: Image.Image | None = None) -> Image.Image:
    """One RGB picture of the spec; `photo` is the one under a sign or above a strip."""
    lines = words(spec)
    if "typeset" in spec:
        return _list(lines, rng)
    if "strip" in spec:
        return _strip(lines[0], rng, photo)
    if "label" in spec:
        return _bottle(lines, rng)
    if "chat" in spec:
        return _chat(lines, rng)
    if "document" in spec:
        return _document(lines, rng)
    return _sign(lines, rng, photo)


def figstep_look(title: str) -> Image.Image:
    """A title above three empty numbers as FigStep typesets them: black on white, 760 x 760 pixels, large letters."""
    canvas = Image.new("RGB", (760, 760), "white")
    text = "\n".join([*textwrap.wrap(title, 15), "1.", "2.", "3."])
    found = [path for path in fonts() if path.name == "DejaVuSansMono-Bold.ttf"]
    chosen = ImageFont.truetype(str(found[0]), 72) if found else ImageFont.load_default(76)
    ImageDraw.Draw(canvas).multiline_text((20, 10), text, fill="black", font=chosen, spacing=11)
    return canvas


def _fit(lines: Sequence[str], width: int, height: int, rng: random.Random, largest: int) -> tuple[str, Any]:
    """The lines wrapped, and the largest font with which they fill the box."""
    for size in range(largest, 11, -2):
        chosen = font(size, random.Random(rng.random()))
        across = max(8, int(width / (size * 0.6)))
        wrapped = "\n".join(piece for line in lines for piece in (textwrap.wrap(line, across) or [""]))
        box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), wrapped, font=chosen, spacing=size // 4)
        if box[2] <= width and box[3] <= height:
            return wrapped, chosen
    return wrapped, chosen


def _list(lines: Sequence[str], rng: random.Random) -> Image.Image:
    side = rng.choice([512, 640, 760, 760])
    canvas = Image.new("RGB", (side, side), rng.choice(PAPERS))
    text, chosen = _fit(lines, side - 60, side - 60, rng, side // 9)
    ImageDraw.Draw(canvas).multiline_text(
        (30, rng.randrange(20, 60)), text, fill=rng.choice(INKS), font=chosen, spacing=chosen.size // 4
    )
    return canvas


def _strip(line: str, rng: random.Random, photo: Image.Image | None) -> Image.Image:
    width = rng.choice([512, 800, 1024])
    size = rng.randrange(28, 72)
    chosen = font(size, rng)
    across = max(10, int(width / (size * 0.58)))
    text = "\n".join(textwrap.wrap(line, across))
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=chosen)
    height = int(box[3]) + size
    above = int(width * rng.uniform(0.5, 1)) if photo is not None else 0
    canvas = Image.new("RGB", (max(width, int(box[2]) + 20), above + height), "white")
    if photo is not None:
        canvas.paste(photo.resize((canvas.width, above)), (0, 0))
    ImageDraw.Draw(canvas).multiline_text((10, above + size // 3), text, fill="black", font=chosen)
    return canvas


def _bottle(lines: Sequence[str], rng: random.Random) -> Image.Image:
    canvas = Image.new("RGB", (420, 560), rng.choice(["#e8e4da", "#d8e2ea", "#f2f2f2", "#c9b79c"]))
    pen = ImageDraw.Draw(canvas)
    colour = rng.choice(["#2a62a8", "#b03030", "#2f7d46", "#6a3d8f", "#d88a1c", "#444444"])
    if rng.random() < 0.6:
        pen.rounded_rectangle((90, 130, 330, 540), 36, fill=colour)
        pen.rectangle((170, 60, 250, 140), fill="#eeeeee")
    else:
        pen.rectangle((60, 110, 360, 530), fill=colour)
    pen.rectangle((100, 240, 320, 430), fill="white")
    text, chosen = _fit(lines, 204, 176, rng, 52)
    pen.multiline_text((108, 250), text, fill="black", font=chosen, spacing=4)
    return canvas


def _chat(lines: Sequence[str], rng: random.Random) -> Image.Image:
    canvas = Image.new("RGB", (520, 90 + 84 * len(lines)), rng.choice(["#efe7dd", "#ffffff", "#e6ebf0"]))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, 520, 50), fill=rng.choice(["#075e54", "#3b5998", "#555555"]))
    chosen = font(20, rng)
    for index, line in enumerate(lines):
        left = 20 if index % 2 == 0 else 110
        top = 70 + 84 * index
        pen.rounded_rectangle((left, top, left + 390, top + 70), 14, fill="white" if index % 2 == 0 else "#dcf8c6")
        pen.multiline_text((left + 12, top + 8), "\n".join(textwrap.wrap(line, 34)[:3]), fill="black", font=chosen)
    return canvas


def _document(lines: Sequence[str], rng: random.Random) -> Image.Image:
    canvas = Image.new("RGB", (620, 800), rng.choice(PAPERS))
    pen = ImageDraw.Draw(canvas)
    size = rng.randrange(24, 34)
    chosen = font(size, rng)
    top = 50
    for index, line in enumerate(lines):
        for piece in textwrap.wrap(line, 32) or [""]:
            pen.text((50, top), piece, fill="black", font=chosen)
            top += size + 12
        if index == 0:
            pen.line((50, top, 570, top), fill="black", width=2)
            top += 20
    return canvas


def _sign(lines: Sequence[str], rng: random.Random, photo: Image.Image | None) -> Image.Image:
    canvas = photo.convert("RGB").resize((512, 512)) if photo is not None else Image.new("RGB", (512, 512), "#9fb8a0")
    pen = ImageDraw.Draw(canvas)
    top = rng.randrange(60, 220)
    pen.rectangle(
        (60, top, 452, top + 210), fill=rng.choice(["#ffd400", "white", "#f4f4f4", "#c62828"]), outline="black", width=6
    )
    text, chosen = _fit(lines, 360, 180, rng, 64)
    pen.multiline_text((78, top + 16), text, fill="black", font=chosen, spacing=6)
    return canvas
