"""Pictures at remote addresses, fetched by us once and put into the request, so that guard and target see the same bytes.

    address -> spelling, scheme, port, host's name -> look-up -> every address checked -> connection to those alone
       ^                                                                                        |
       +------------------------ a redirect starts at the beginning -----------------------------+

What connects gets the addresses that were checked and never asks for the name again; TLS still checks the name.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import string
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeAlias
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from vlmguard.chat import Chat
from vlmguard.errors import ConfigError, ImageNotAllowed, ImageTooLarge, ImageUnreadable
from vlmguard.gateway.addresses import Address, host_name, pattern, public
from vlmguard.images import REMEDY, open_url, to_data_uri
from vlmguard.pixels import MIME_TYPES
from vlmguard.strict_json import MAX_BODY_BYTES

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

AT_ONCE = 8  # pictures of one chat
TOGETHER_BYTES = MAX_BODY_BYTES  # of a chat's fetched pictures: no more than it could have sent itself
MAX_ADDRESS = 8192  # characters
HEADERS = {
    "Accept": ", ".join(MIME_TYPES.values()),
    "Accept-Encoding": "identity",
    "User-Agent": "vlmguard",
}
REDIRECTS = (301, 302, 303, 307, 308)
OPERATOR = f"{REMEDY} Or ask the gateway's operator to allow its host"

# One reading of an address: what clients and servers take for an authority differently (userinfo, backslashes, brackets,
# escapes, white space) is in none of them.
SPELLING = re.compile(r"(https?)://([^/?#\\@%\[\]:\s]+)(?::([0-9]{1,5}))?([/?][^\s\\#]*)?(?:#.*)?", re.IGNORECASE)


async def resolve(name: str, port: int) -> list[str]:
    """The addresses that this machine finds for a host's name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


@dataclass(frozen=True)
class Sources:
    """Where pictures may be fetched from, and what that may cost.

    Args:
        hosts: names; "*.example.com" stands for every name below example.com, itself not included. Empty: no picture
            is fetched.
        seconds: for all pictures of a chat, look-ups and redirects included. Half of it is the longest silence.
        max_bytes: of one picture.
        redirects: followed for one picture; each must lead to an allowed host.
        ports: without 80 or another one for it there is no http.
    """

    hosts: Sequence[str] = ()
    seconds: float = 10.0
    max_bytes: int = 10 * 2**20
    redirects: int = 3
    ports: Sequence[int] = (443, 80)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", tuple(pattern(host) for host in self.hosts))
        for what, fits, expected, got in (
            ("seconds", self.seconds > 0, "more than 0", self.seconds),
            ("max_bytes", self.max_bytes > 0, "more than 0", self.max_bytes),
            ("redirects", self.redirects >= 0, "0 or more", self.redirects),
            ("ports", all(0 < port < 65536 for port in self.ports), "1 to 65535", self.ports),
        ):
            if not fits:
                raise ConfigError.wrong(f"images.{what}", expected=expected, got=got)

    def allow(self, name: str) -> bool:
        """Whether a host's name, as `host_name` gives it, is one of the `hosts`."""
        return any(name.endswith(host[1:]) if host.startswith("*") else name == host for host in self.hosts)


@dataclass(frozen=True)
class Fetcher:
    """
    Args:
        resolve: a host's name and port to its addresses; asked once for a request to a host.
        allowed_address: whether a connection to an address may be made.
        tls: whom to trust; by default what this machine trusts.
    """

    sources: Sources
    resolve: Resolve = resolve
    allowed_address: Callable[[Address], bool] = public
    tls: ssl.SSLContext | bool = True

    async def fetched(self, chat: Chat) -> Chat:
        """The chat with every picture at an http(s) address replaced by its bytes as a data URI.

        An address that occurs twice is fetched once. A chat without one is returned itself.

        Raises:
            ImageNotAllowed: an address, or where it leads to, is not allowed; or it is a path or of another scheme.
            ImageTooLarge: a picture has over `max_bytes`, or all together over `TOGETHER_BYTES`.
            ImageUnreadable: it can't be fetched, not in time, or is no picture.
        """
        remote = [address for image in chat.images if (address := _remote(image.url))]
        if not remote:
            return chat
        if not self.sources.hosts:
            scheme = remote[0].partition(":")[0].lower()
            raise ImageNotAllowed(
                f"the image is a remote address ({scheme}:), which is not fetched", f"{OPERATOR} ([images] hosts)."
            )
        uris = await self._all(dict.fromkeys(remote))
        at = (uris.get(_remote(image.url) or "") for image in chat.images)
        return chat.with_images([image.at(uri) if uri else image for image, uri in zip(chat.images, at, strict=True)])

    async def _all(self, addresses: dict[str, None]) -> dict[str, str]:
        """Each address with its picture as a data URI; the first failure ends all."""
        turns, room = asyncio.Semaphore(AT_ONCE), _Room(max(TOGETHER_BYTES, self.sources.max_bytes))

        async def one(address: str) -> str:
            async with turns:
                return to_data_uri(await self._picture(address, room))

        try:
            async with asyncio.timeout(self.sources.seconds), asyncio.TaskGroup() as group:
                tasks = {address: group.create_task(one(address)) for address in addresses}
        except TimeoutError:
            raise ImageUnreadable(f"fetching the image took over {self.sources.seconds:g} s", REMEDY) from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return {address: task.result() for address, task in tasks.items()}

    async def _picture(self, address: str, room: _Room) -> bytes:
        url = self._checked(address)
        for _ in range(self.sources.redirects + 1):
            found = await self._get(url, room)
            if isinstance(found, bytes):
                return found
            url = self._checked(found, url)
        raise ImageNotAllowed(f"the image's address redirects over {self.sources.redirects} times", REMEDY)

    def _checked(self, address: str, before: URL | None = None) -> URL:
        """The one reading of an address, its name normalised, if it may be asked; `before` redirected to it."""
        spelling = SPELLING.fullmatch(address) if len(address) <= MAX_ADDRESS and address.isprintable() else None
        name = host_name(spelling[2]) if spelling else None
        if spelling is None or name is None:
            raise ImageNotAllowed("the image's address is not http(s)://NAME/PATH with a plain host name", REMEDY)
        scheme, rest = spelling[1].lower(), spelling[4] or "/"
        port = int(spelling[3] or (443 if scheme == "https" else 80))
        where = "the image's address redirects to" if before else "the image is at"
        if before and before.scheme == "https" and scheme == "http":
            raise ImageNotAllowed("the image's address redirects from https to http", REMEDY)
        if not self.sources.allow(name):
            raise ImageNotAllowed(f"{where} {name}, which is not an allowed host", f"{OPERATOR} ([images] hosts).")
        if port not in self.sources.ports:
            raise ImageNotAllowed(f"{where} port {port}, which is not allowed", f"{OPERATOR}'s port ([images] ports).")
        path = quote(rest if rest.startswith("/") else f"/{rest}", safe=string.punctuation)  # signatures stay valid
        return URL(f"{scheme}://{name}:{port}{path}", encoded=True)

    async def _get(self, url: URL, room: _Room) -> bytes | str:
        """One request: the picture's bytes, or the address that it redirects to."""
        name = url.raw_host or ""
        silence = self.sources.seconds / 2
        with _translating(name, silence):
            pinned = _Pinned(name, self._allowed(name, await self.resolve(name, url.port or 0)))
            async with (
                # A session for one request: no cookie, connection or look-up is left over for another.
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(
                        resolver=pinned, use_dns_cache=False, force_close=True, ssl=self.tls
                    ),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence),
                    headers=HEADERS,
                    auto_decompress=False,
                    trust_env=False,
                ) as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                if answer.status in REDIRECTS and (location := answer.headers.get("Location")):
                    return _joined(url, location)
                if answer.status != 200:
                    raise ImageUnreadable(f"the image's host {name} answered with status {answer.status}", REMEDY)
                return await self._body(answer, room)

    def _allowed(self, name: str, found: Sequence[str]) -> list[Address]:
        """The addresses of a host, if a connection to every one of them may be made."""
        addresses = [ip_address(text) for text in found]
        if not addresses:
            raise ImageUnreadable(f"the image's host {name} has no address", REMEDY)
        if not all(map(self.allowed_address, addresses)):  # a mixed answer is an attack, or a mistake
            raise ImageNotAllowed(f"the image's host {name} has an address that is not public", REMEDY)
        return addresses

    async def _body(self, answer: aiohttp.ClientResponse, room: _Room) -> bytes:
        most = self.sources.max_bytes
        too_large = ImageTooLarge(f"the image has over {most:,} bytes", f"Send {most:,} at most.")
        if (answer.content_length or 0) > most:
            raise too_large
        pieces, count = list[bytes](), 0
        async for piece in answer.content.iter_any():
            pieces.append(piece)
            count += len(piece)
            if count > most:
                raise too_large
            room.take(len(piece))
        data = b"".join(pieces)
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding in ("gzip", "x-gzip"):  # from hosts that store it so, whatever is asked for
            data = await asyncio.to_thread(zlib.decompressobj(wbits=31).decompress, data, most + 1)
            if len(data) > most:
                raise too_large
            room.take(len(data) - count)
        elif encoding != "identity":
            raise ImageUnreadable("the image came compressed, though it was asked for as it is", REMEDY)
        return data


@dataclass
class _Room:
    """Bytes that a chat's pictures may still take."""

    left: int

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ImageTooLarge("the request's images have too many bytes together", "Send fewer or smaller ones.")


class _Pinned(AbstractResolver):
    """Knows one name, and the addresses that were checked for it."""

    def __init__(self, name: str, addresses: Sequence[Address]) -> None:
        self._name, self._addresses = name, addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host != self._name:
            raise OSError("another name than the one that was checked")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


def _joined(url: URL, location: str) -> str:
    """A redirect's address, still to be checked."""
    try:
        return str(url.join(URL(location, encoded=True)))
    except ValueError:
        return location


@contextmanager
def _translating(name: str, silence: float) -> Iterator[None]:
    """Turns what the network raises into our errors; theirs quote the address, which may hold a key (F066)."""
    try:
        yield
    except TimeoutError:
        raise ImageUnreadable(f"the image's host {name} said nothing for {silence:g} s", REMEDY) from None
    except aiohttp.ClientSSLError:
        raise ImageUnreadable(f"the image's host {name} has no certificate that is trusted", REMEDY) from None
    except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
        reason = type(error).__name__
        raise ImageUnreadable(f"the image could not be fetched from {name} ({reason})", REMEDY) from None


def _remote(url: str) -> str | None:
    """The http(s) address of a picture, None for a data URI.

    Raises:
        ImageNotAllowed: it is neither.
    """
    scheme, colon, _ = url[:32].lstrip().lower().partition(":")
    if colon and scheme in ("http", "https"):
        return url.strip()
    if not colon or scheme != "data":
        open_url(url)  # its own error: a target with the guard off must not open files either (F063)
    return None
