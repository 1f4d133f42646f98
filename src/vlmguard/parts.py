"""The parts of a message: text, images, and whatever else a server may take."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from vlmguard.errors import BadRequest, ImageUnreadable
from vlmguard.images import to_data_uri
from vlmguard.strict_json import unexpected

TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image_url", "input_image", "image", "image_file")
IMAGE_SOURCES = ("image_url", "image", "source", "image_file", "file_id", "url", "data", "base64", "path")
MIME_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")


@dataclass(frozen=True)
class Text:
    """A text part; a string content is one too, and `raw` is then the string."""

    text: str = field(repr=False)
    raw: Any = field(repr=False)


@dataclass(frozen=True)
class Image:
    """An image part; however it was spelled, `url` is a data URI or an address that `open_url` refuses."""

    url: str = field(repr=False)
    raw: Any = field(repr=False)

    @classmethod
    def of(cls, source: "bytes | str | Path | Image") -> "Image":
        """An image from encoded bytes, a local file (`Path`) or a URL (`str`)."""
        if isinstance(source, Image):
            return source
        data = _read(source) if isinstance(source, Path) else source
        url = data if isinstance(data, str) else to_data_uri(data)
        return cls(url, {"type": "image_url", "image_url": {"url": url}})

    def at(self, url: str) -> "Image":
        """The same part with another picture: `detail`, `cache_control` and unknown fields are kept."""
        if (old := self.raw.get("image_url")) is not None:
            new = {**old, "url": url} if isinstance(old, Mapping) else url
            return Image(url, {**self.raw, "image_url": new})
        kept = {key: value for key, value in self.raw.items() if key not in IMAGE_SOURCES}
        return Image(url, {**kept, "type": "image_url", "image_url": {"url": url}})


@dataclass(frozen=True)
class Other:
    """A part that is neither text nor image (audio, file, ...); `parts` are those nested in its "content"."""

    raw: Any = field(repr=False)
    parts: "tuple[Part, ...]" = ()


Part: TypeAlias = Text | Image | Other


def flat(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Other):
            yield from flat(part.parts)


def map_images(parts: Iterable[Part], change: Callable[[Image], Image | None]) -> list[Part]:
    new: list[Part] = []
    for part in parts:
        if isinstance(part, Other) and part.parts:
            inner = map_images(part.parts, change)
            new.append(Other({**part.raw, "content": [it.raw for it in inner]}, tuple(inner)))
        elif not isinstance(part, Image):
            new.append(part)
        elif (image := change(part)) is not None:
            new.append(image)
    return new


def text_part(text: str) -> Text:
    return Text(text, {"type": "text", "text": text})


def parse_parts(content: Sequence[Any], where: str) -> tuple[Part, ...]:
    return tuple(_part(raw, f"{where}[{at}]") for at, raw in enumerate(content))


def _part(raw: Any, where: str) -> Part:
    """Reads a part by what it carries, since its type may be missing (F056)."""
    if isinstance(raw, str):
        return Text(raw, raw)
    if not isinstance(raw, Mapping):
        raise unexpected("an object", raw, where)
    kind, text = raw.get("type"), raw.get("text")
    if kind is not None and not isinstance(kind, str):
        raise unexpected("a string", kind, f"{where}.type")
    kind = (kind or "").lower()
    if kind in IMAGE_TYPES or raw.get("image_url") or (raw.get("image") and kind in ("", *TEXT_TYPES)):
        if text:
            raise BadRequest(f"{where} holds a text and an image", "Send them as two parts.", param=where)
        return Image(_image_url(raw, where), raw)
    if isinstance(text, str):
        return Text(text, raw)
    if kind in TEXT_TYPES or (not kind and "text" in raw):
        raise unexpected("a string", text, f"{where}.text")
    inner = raw.get("content")
    return Other(raw, parse_parts(inner, f"{where}.content") if isinstance(inner, list) else ())


def _image_url(raw: Mapping[str, Any], where: str) -> str:
    given = [key for key in IMAGE_SOURCES if raw.get(key)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise BadRequest(f"{where}: expected one image source, got {found}", "Send one image_url.", param=where)
    source = raw[given[0]]
    fields = source if isinstance(source, Mapping) else {**raw, "url": source}
    if given[0] in ("data", "base64"):
        fields = {**raw, "data": source, "url": None}
    elif given[0] == "file_id":
        fields = {"file_id": source}
    url, data, file_id = fields.get("url"), fields.get("data"), fields.get("file_id")
    if isinstance(url, str) and url:
        return url
    if isinstance(data, str) and data:
        mime = str(fields.get("media_type") or fields.get("mime_type") or fields.get("mimeType") or "")
        return f"data:{mime if MIME_TYPE.fullmatch(mime) else ''};base64,{data}"
    if isinstance(file_id, str) and file_id:
        return f"file-id:{file_id}"
    raise unexpected("a URL", source, f"{where}.{given[0]}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageUnreadable(f"the image file {path} cannot be read: {reason}", "Check the path.") from None
