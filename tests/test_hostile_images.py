"""The shared folder of 128 hostile pictures: each gives pixels or one ImageError, quickly and in bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from vlmguard.images import decode

DATA = Path(os.environ.get("VLMGUARD_DATA") or Path(__file__).parents[2] / "shared" / "data")
FOLDER = DATA / "hostile_images"
ALLOWED = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
# Pillow reads these two; they are over our limit of a side.
TOO_LARGE = ("pillow_decompression_bomb_extents.gif", "gen_aspect_20000x1.png")
# Its first frame can be read, a later one cannot.
BROKEN_LATER = ("pillow_apng_sequence_gap.png", "pillow_apng_chunk_no_fdat.png")
READ_ALL = """
import json, resource, sys, time
from pathlib import Path
from vlmguard.errors import ImageError, ImageTooLarge
from vlmguard.images import decode

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

decode((Path(sys.argv[1]) / "gen_one_pixel.png").read_bytes())
before = peak()
for name in sys.argv[2:]:
    data, start = (Path(sys.argv[1]) / name).read_bytes(), time.perf_counter()
    try:
        sizes, error = [frame.size for frame in decode(data)], None
    except ImageError as refused:
        sizes, error = [], type(refused).__name__
    seconds = time.perf_counter() - start
    print(json.dumps({"file": name, "sizes": sizes, "error": error, "seconds": seconds, "grown": peak() - before}))
"""

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="set VLMGUARD_DATA to the shared data folder")


def manifest() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def read() -> dict[str, dict[str, Any]]:
    names = [row["file"] for row in manifest()]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_ALL, str(FOLDER), *names],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert b"Warning" not in done.stderr
    return {row["file"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_each_gives_pixels_or_one_error(read: dict[str, dict[str, Any]]) -> None:
    assert len(read) == 128
    for row in manifest():
        name, pillow, ours = row["file"], row["pillow13"], read[row["file"]]
        readable = pillow["ok"] and pillow["format"] in ALLOWED and name not in TOO_LARGE + BROKEN_LATER
        assert bool(ours["sizes"]) == readable, (name, ours)
        if readable:
            assert len(ours["sizes"]) == (1 if pillow["format"] == "MPO" else min(16, pillow["frames"])), name


def test_none_takes_long_or_much_memory(read: dict[str, dict[str, Any]]) -> None:
    assert max(row["seconds"] for row in read.values()) < 2
    assert max(row["grown"] for row in read.values()) < 300_000  # kB


def test_bombs_are_too_large(read: dict[str, dict[str, Any]]) -> None:
    bombs = [name for name in read if "bomb" in name or "huge_header" in name or name in TOO_LARGE]
    allowed = [name for name in bombs if not name.endswith(".ico") and "ztxt" not in name]
    assert len(allowed) == 6
    assert {read[name]["error"] for name in allowed} == {"ImageTooLarge"}


def pixels(name: str) -> tuple[Image.Image, ...]:
    return decode((FOLDER / name).read_bytes())


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientations_look_alike(orientation: int) -> None:
    (upright,), (turned,) = pixels("exif_landscape_1.jpg"), pixels(f"exif_landscape_{orientation}.jpg")
    assert turned.size == upright.size
    assert max(ImageStat.Stat(ImageChops.difference(upright, turned)).mean) < 12


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_text_in_the_second_frame_is_there(kind: str) -> None:
    ink = [ImageStat.Stat(frame.convert("L")).stddev[0] for frame in pixels(f"gen_animated_text_frame2.{kind}")]
    assert ink[1] > 10 > max(ink[0], ink[2])


def test_transparency_shows_what_a_viewer_shows() -> None:
    assert pixels("gen_alpha0_hidden_text.png")[0].getextrema() == ((255, 255),) * 3
    assert pixels("gen_black_on_transparent.png")[0].convert("L").getextrema() == (0, 255)
