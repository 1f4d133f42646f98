"""A chat from what a user gave on the command line or in a row of a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmguard.chat import Chat
from vlmguard.errors import BadRequest
from vlmguard.images import frames

MAX_TEXT_BYTES = 2**20  # some 250,000 tokens: more than the models that are guarded take


def request(
    text: str | None,
    images: Sequence[str] = (),
    *,
    system: str | None = None,
    turns: Sequence[Mapping[str, Any]] = (),
    folder: Path | None = None,
) -> Chat:
    """A chat whose pictures are known to be whole; without text it asks with its pictures alone.

    Args:
        images: paths, seen from `folder`, or data URIs.
        turns: earlier messages.

    Raises:
        BadRequest: there is neither text nor picture, or the text is over a mebibyte.
        ImageError: a picture is missing, broken, too large or a remote address.
    """
    for part in (text, system):
        if (size := len((part or "").encode(errors="replace"))) > MAX_TEXT_BYTES:
            raise BadRequest(f"the text has {size:,} bytes", f"Send {MAX_TEXT_BYTES:,} at most.")
    if not (text and text.strip()) and not images:
        raise BadRequest("there is nothing to guard: no text and no picture", "Give a text, a picture, or both.")
    chat = Chat.of(text or None, [_seen_from(folder, image) for image in images], system=system, turns=turns)
    for image in chat.images:
        frames(image)
    return chat


def _seen_from(folder: Path | None, image: str) -> str | Path:
    is_address = image[:5].lower() == "data:" or "://" in image
    return image if is_address else (folder or Path()) / image
