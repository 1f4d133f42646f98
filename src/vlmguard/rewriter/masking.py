"""Paint over the words of a picture, for the image policy `mask`."""

from __future__ import annotations

import io
from functools import cache

from PIL import ImageDraw

from vlmguard.chat import Image
from vlmguard.images import frames
from vlmguard.rewriter.sight import Reader


def masked(image: Image, reader: Reader | None = None) -> bytes:
    """The picture's first frame as PNG, its lines of text under grey boxes."""
    frame = frames(image)[0].copy()
    pen = ImageDraw.Draw(frame)
    for box in (reader or _reader()).boxes(frame):
        pen.polygon([tuple(point) for point in box], fill="#808080")
    data = io.BytesIO()
    frame.save(data, "PNG")
    return data.getvalue()


@cache
def _reader() -> Reader:
    return Reader()  # its models take a while to load
