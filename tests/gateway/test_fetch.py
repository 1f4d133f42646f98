import asyncio
import base64
import gzip
import logging
import random
import shutil
import ssl
import subprocess
import time
import traceback
import tracemalloc
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.picture_host import Answer, PictureHost, to
from vlmguard.chat import Chat
from vlmguard.errors import ConfigError, ImageError, ImageNotAllowed, ImageTooLarge, ImageUnreadable
from vlmguard.gateway.addresses import Address, host_name, public
from vlmguard.gateway.fetch import AT_ONCE, MAX_ADDRESS, TOGETHER_BYTES, Fetcher, Sources, resolve
from vlmguard.images import frames, open_url

NAME = "pictures.test"
KEY = "5ec" + "ret"  # in no line of source that a traceback shows
HOSTS = (NAME, "*.cdn.test")


class Names:
    """A resolver that gives its answers in order, then the last one for ever; `asked` holds the names."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = answers or (["127.0.0.1"],)
        self.asked: list[str] = []

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked.append(name)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def loopback(address: Address) -> bool:
    return str(address) == "127.0.0.1"


def fetcher(port: int, names: Names | None = None, *, tls: ssl.SSLContext | bool = True, **sources: Any) -> Fetcher:
    options = {"hosts": HOSTS, "ports": (port,), "seconds": 5.0, **sources}
    return Fetcher(Sources(**options), resolve=names or Names(), allowed_address=loopback, tls=tls)


def asking(*urls: str) -> Chat:
    return Chat.of("What is it?", urls)


async def got(host: PictureHost, path: str = "/a", **sources: Any) -> bytes:
    """The bytes that a chat holds after the picture at `path` was fetched."""
    chat = await fetcher(host.port, **sources).fetched(asking(f"http://{NAME}:{host.port}{path}"))
    return open_url(chat.images[0].url)


async def refused(address: str, kind: type[ImageError] = ImageNotAllowed, port: int = 80, **options: Any) -> ImageError:
    with pytest.raises(kind) as caught:
        await fetcher(port, **options).fetched(asking(address))
    return caught.value


# What comes back


async def test_a_picture_of_an_allowed_host_becomes_its_bytes(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png)}) as host:
        assert await got(host) == png
    assert host.paths == ["/a"]


async def test_only_the_url_of_the_part_changes(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png)}) as host:
        url = f"http://{NAME}:{host.port}/a"
        own = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        remote = {
            "type": "image_url",
            "image_url": {"url": url, "detail": "low"},
            "cache_control": {"type": "ephemeral"},
        }
        local = {"type": "image_url", "image_url": {"url": own}}
        turns = [
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "tool_result", "content": [remote]}]},
            {"role": "user", "content": [local, {"type": "text", "text": "and"}, remote]},
        ]
        chat = Chat.parse({"model": "m", "messages": turns, "seed": 7})
        wire = (await fetcher(host.port).fetched(chat)).to_wire()
    remote["image_url"] = {"url": own, "detail": "low"}
    assert wire == {"model": "m", "messages": turns, "seed": 7}
    assert host.paths == ["/a"], "the same address is fetched once"


async def test_a_chat_without_remote_pictures_is_returned_itself(png: bytes) -> None:
    names = Names()
    for chat in (Chat.of("hello"), Chat.of("hello", [png])):
        assert await fetcher(80, names).fetched(chat) is chat
        assert await Fetcher(Sources()).fetched(chat) is chat
    assert names.asked == []


async def test_ten_pictures_are_fetched_several_at_a_time(png: bytes) -> None:
    bodies = {f"/{at}": png + bytes([at]) for at in range(10)}
    async with PictureHost({path: Answer(body, delay=0.2) for path, body in bodies.items()}) as host:
        begun = time.perf_counter()
        chat = await fetcher(host.port).fetched(asking(*(f"http://{NAME}:{host.port}{path}" for path in bodies)))
    assert [open_url(image.url) for image in chat.images] == list(bodies.values())
    assert time.perf_counter() - begun < 2
    assert host.most == AT_ONCE


async def test_a_redirect_is_followed(png: bytes) -> None:
    async with PictureHost({"/last": Answer(png)}) as host:
        there = f"http://eu.cdn.test:{host.port}/first"
        host.answers |= {"/a": to(there), "/first": to("next", 307), "/next": to(f"//{NAME}:{host.port}/last?x=1#part")}
        names = Names()
        assert await got(host, names=names) == png
    assert names.asked == [NAME, "eu.cdn.test", "eu.cdn.test", NAME]
    assert host.paths == ["/a", "/first", "/next", "/last?x=1"]


async def test_signed_addresses_are_asked_for_as_they_are(png: bytes) -> None:
    path = "/a%2Fb%7e//../c?Signature=a%2Bb+c%3D~&x='(é)'&y=[1]"
    async with PictureHost({path.partition("?")[0]: Answer(png)}) as host:
        await got(host, path)
    assert host.paths == [path.replace("é", "%C3%A9")]


async def test_a_query_without_a_path_is_asked_for_at_the_root(png: bytes) -> None:
    async with PictureHost({"/": Answer(png)}) as host:
        await got(host, "?a=1")
        await got(host, "")
    assert host.paths == ["/?a=1", "/"]


# Which hosts


async def test_f060_without_allowed_hosts_nothing_is_fetched() -> None:
    names = Names()
    error = await refused("http://169.254.169.254/latest/meta-data/", hosts=(), names=names)
    assert "[images] hosts" in error.remedy
    assert names.asked == []
    assert Sources().hosts == ()


@pytest.mark.parametrize(
    "name", ["other.test", "cdn.test", "evilpictures.test", "pictures.test.evil.test", "xcdn.test"]
)
async def test_other_hosts_are_refused(name: str) -> None:
    names = Names()
    error = await refused(f"https://{name}/a", names=names, port=443)
    assert f"{name}, which is not an allowed host" in str(error)
    assert names.asked == []


@pytest.mark.parametrize(
    "name", ["PICTURES.test", "pictures.test.", "ｐｉｃｔｕｒｅｓ。test", "a.b.CDN.test", "bücher.cdn.test"]
)
async def test_names_are_compared_in_one_spelling(name: str, png: bytes) -> None:
    names = Names()
    async with PictureHost({"/a": Answer(png)}) as host:
        await fetcher(host.port, names).fetched(asking(f"HTTP://{name}:{host.port}/a"))
    (asked,) = names.asked
    assert asked == host_name(name)
    assert f"Host: {asked}:{host.port}\r\n" in host.heads[0]


def test_hosts_are_checked_when_they_are_set() -> None:
    assert Sources(["Bücher.Example.", "*.CDN.test"]).hosts == ("xn--bcher-kva.example", "*.cdn.test")
    for wrong in (
        "*",
        "*.test",
        "*.*.test",
        "a*.test",
        "127.0.0.1",
        "::1",
        "https://a.test",
        "a.test:80",
        "",
        "*.0x7f.1",
    ):
        with pytest.raises(ConfigError, match=r"images\.hosts"):
            Sources([wrong])
    for option in ({"seconds": 0}, {"max_bytes": 0}, {"redirects": -1}, {"ports": (0,)}, {"ports": (65536,)}):
        with pytest.raises(ConfigError, match=f"images.{next(iter(option))}"):
            Sources(**option)


async def test_only_allowed_ports_are_asked() -> None:
    names = Names()
    for address in (f"https://{NAME}:22/a", f"http://{NAME}/a", f"http://{NAME}:65536/a", f"http://{NAME}:0/a"):
        await refused(address, names=names, port=443)
    assert names.asked == []


# Every spelling of an address that is no name, and of one that two readers take differently
SPELLINGS = (
    *("127.0.0.1", "127.0.0.1.", "127.1", "127.0.1", "2130706433", "017700000001", "0x7f000001", "0X7F000001"),
    *("0x7f.1", "0x7f.0x0.0x0.0x1", "0177.0.0.1", "0177.0.0.01", "00000177.1", "127.0.0.0x1", "0", "0.0.0.0", "0x"),
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0xa9.0xfe.43518", "0251.0376.0251.0376", "169.16689662"),
    *("100.100.100.200", "10.0.0.1", "192.168.1.1", "8.8.8.8", "134744072", "4294967297"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[fd00:ec2::254]"),
    *("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25eth0]", "[::127.0.0.1]", "[2606:4700::1111]", "::1"),
    *("１２７.０.０.１", "127。0。0。1", "①②⑦.0.0.1", "𝟏𝟐𝟕.0.0.1", "0ｘ7f.1", "１６９.254.169.254"),
    *("%31%32%37.0.0.1", "127%2e0%2e0%2e1", "pictures%2etest", "pictures.test%00.evil.test", "%5b::1%5d"),
    *(
        "user@pictures.test",
        "user:key@pictures.test",
        "@pictures.test",
        "pictures.test@127.0.0.1",
        "127.0.0.1:80@pictures.test",
    ),
    *(
        "pictures.test\\@127.0.0.1",
        "127.0.0.1\\.pictures.test",
        "pictures.test:80:80",
        "pictures.test:",
        "pictures.test:+80",
    ),
    *(
        "pictures .test",
        "pictures.test\t",
        "pictures\n.test",
        "pictures.test\0",
        "pictures\u200b.test",
        "pictures\xad.test",
    ),
    *("pictures..test", ".pictures.test", "pictures.test..", "", "-", "a" * 64 + ".cdn.test", "a." * 130 + "cdn.test"),
    *(
        "/pictures.test",
        "pictures.test,127.0.0.1",
        "pictures.test;127.0.0.1",
        "pictures.test&127.0.0.1",
        "{pictures.test}",
    ),
)


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_f060_every_other_spelling_of_an_address_is_refused(spelling: str) -> None:
    assert len(SPELLINGS) > 60
    for scheme, port in (("http", 80), ("https", 443)):
        names = Names(["127.0.0.1"])
        error = await refused(f"{scheme}://{spelling}/a", names=names, port=port)
        if spelling not in ("-", "pictures\xad.test"):  # which are names
            assert "not http(s)://NAME/PATH" in str(error), "refused for what it is, not for a missing permission"
        assert names.asked == []


@pytest.mark.parametrize(
    "address",
    [
        *(
            "file:///etc/passwd",
            "/etc/passwd",
            "../../etc/passwd",
            "ftp://pictures.test/a",
            "gopher://127.0.0.1:6379/_x",
        ),
        *(
            "//pictures.test/a",
            "http:/pictures.test/a",
            "http:pictures.test/a",
            "http:\\\\pictures.test\\a",
            "https",
            "data",
        ),
        *("blob:https://pictures.test/a", "view-source:http://pictures.test", "jar:http://pictures.test!/a"),
        *(
            " file:///etc/passwd",
            "FILE:/etc/passwd",
            "file-id:abc",
            "javascript:1",
            "unix:/run/docker.sock",
            "s3://b/a",
        ),
    ],
)
async def test_f063_no_other_scheme_and_no_file_is_taken(address: str) -> None:
    names = Names()
    part = {"type": "image_url", "image_url": {"url": address}}
    chat = Chat.parse({"messages": [{"role": "user", "content": [part]}]})
    for sources in (Sources(), Sources(HOSTS)):
        with pytest.raises(ImageNotAllowed):
            await Fetcher(sources, resolve=names, allowed_address=loopback).fetched(chat)
    assert names.asked == []


async def test_odd_addresses_are_refused() -> None:
    names = Names()
    for path in ("a" * MAX_ADDRESS, "a b", "a\tb", "a\r\nX: y", "a\x01", "a\x7f", "a\u202eb", "a\\b"):
        assert "not http(s)://NAME/PATH" in str(await refused(f"http://{NAME}/{path}", names=names))
    assert names.asked == []


# Which addresses

PRIVATE = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.0.9"),
    *("192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *(
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
    ),
    *("::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::a00:1", "64:ff9b:1::808:808"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::", "2001::1", "2001:0:808:808::f5ff:fffe", "2001:10::1"),
    *(
        "2001:db8::1",
        "3fff::1",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "ff02::1",
    ),
    *(
        "ff0e::1",
        "100::1",
        "5f00::1",
        "4000::1",
        "2606:4700::5efe:7f00:1",
        "2606:4700::200:5efe:a00:1",
        "2606:4700::1%1",
    ),
)
PUBLIC = ("8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::200e", "64:ff9b::808:808")


@pytest.mark.parametrize("text", PRIVATE)
async def test_f060_a_name_for_a_private_address_is_refused(text: str) -> None:
    assert not public(ip_address(text))
    for answer in ([text], ["8.8.8.8", text], [text, "8.8.8.8"]):
        strict = Fetcher(Sources(HOSTS, seconds=0.5), resolve=Names(answer))
        with pytest.raises(ImageNotAllowed, match="not public") as caught:
            await strict.fetched(asking(f"https://{NAME}/a"))
        assert text not in str(caught.value), "what a name means inside is not told"


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_allowed(text: str) -> None:
    assert public(ip_address(text))


async def test_this_machines_own_names_are_refused_by_default() -> None:
    assert set(await resolve("localhost", 80)) <= {"127.0.0.1", "::1"}
    with pytest.raises(ImageNotAllowed, match="not public"):
        await Fetcher(Sources(["localhost"])).fetched(asking("http://localhost/a"))


@pytest.mark.parametrize("answer", [[], ["nonsense"], ["127.0.0.1/8"], [""]])
async def test_a_look_up_without_a_usable_answer_is_an_error(answer: list[str]) -> None:
    await refused(f"http://{NAME}/a", ImageUnreadable, names=Names(answer))


async def test_f060_a_name_is_looked_up_once_and_its_answer_kept(png: bytes) -> None:
    """DNS rebinding: the second answer would lead elsewhere."""
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    async with PictureHost({"/a": Answer(png)}) as host:
        assert await got(host, names=names) == png
        assert names.asked == [NAME]
        with pytest.raises(ImageNotAllowed, match="not public"):
            await got(host, names=names)
    assert len(host.heads) == 1


@pytest.mark.parametrize(
    "location",
    [
        *(
            "http://169.254.169.254/latest/",
            "http://127.0.0.1:{port}/b",
            "http://[::1]:{port}/b",
            "http://0x7f.1:{port}/b",
        ),
        *(
            "http://localhost:{port}/b",
            "//127.0.0.1:{port}/b",
            "http://pictures.test@127.0.0.1:{port}/b",
            "file:///etc/passwd",
        ),
        *("http://other.test:{port}/b", "http://pictures.test/b", "http://user:key@pictures.test:{port}/b", "data:,x"),
        *(
            "/\\127.0.0.1:{port}/b",
            "\\\\127.0.0.1:{port}\\b",
            "http:\\\\127.0.0.1:{port}/b",
            "http://pictures.test:{port}\\b",
        ),
    ],
)
@pytest.mark.parametrize("status", [301, 308])
async def test_f061_f064_a_redirect_is_checked_like_a_first_address(location: str, status: int, png: bytes) -> None:
    names = Names()
    async with PictureHost({"/b": Answer(png)}) as host:
        host.answers["/a"] = to(location.format(port=host.port), status)
        with pytest.raises(ImageNotAllowed):
            await got(host, names=names)
    assert host.paths == ["/a"]
    assert names.asked == [NAME]


async def test_f061_a_redirects_name_is_looked_up_anew() -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    async with PictureHost({"/a": to("/b")}) as host:
        with pytest.raises(ImageNotAllowed, match="not public"):
            await got(host, names=names)
    assert host.paths == ["/a"]


@pytest.mark.parametrize("redirects", [0, 1, 3])
async def test_redirects_are_counted(redirects: int, png: bytes) -> None:
    chain = {f"/{at}": to(f"/{at + 1}") for at in range(redirects + 1)}
    async with PictureHost({**chain, f"/{redirects + 1}": Answer(png)}) as host:
        assert await got(host, "/1", redirects=redirects) == png
        with pytest.raises(ImageNotAllowed, match=f"over {redirects} times"):
            await got(host, "/0", redirects=redirects)


# What is sent


async def test_nothing_of_the_callers_or_of_this_machines_is_sent(
    png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {NAME} login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    async with PictureHost({"/b": Answer(png)}) as host:
        host.answers["/a"] = Answer(status=302, headers={"Location": "/b", "Set-Cookie": "id=secret; Path=/"})
        await got(host)
    for head in host.heads:
        names = {line.partition(":")[0].lower() for line in head.strip().split("\r\n")[1:]}
        assert names <= {"host", "accept", "accept-encoding", "user-agent", "connection"}
        assert "secret" not in head
        assert "Accept-Encoding: identity\r\n" in head


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(b"no", 404), ImageUnreadable),
        (Answer(b"<html>"), ImageUnreadable),
        (Answer(b"x" * 5000), ImageTooLarge),
        (Answer(b"x", headers={"Content-Length": "nine"}), ImageUnreadable),
        (Answer(b"x", delay=9), ImageUnreadable),
        (to(f"http://127.0.0.1/?key={KEY}"), ImageNotAllowed),
    ],
)
async def test_f066_no_error_and_no_log_tells_the_query(
    answer: Answer, kind: type[ImageError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with PictureHost({"/a": answer}) as host:
        with pytest.raises(kind) as caught:
            await got(host, f"/a?key={KEY}", max_bytes=4000, seconds=0.2 if answer.delay else 5)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caught.value.remedy + caplog.text
    assert KEY not in told
    assert host.paths == [f"/a?key={KEY}"]


# What is taken


async def test_f065_only_a_picture_is_taken_whatever_the_host_calls_it(png: bytes) -> None:
    html = {"Content-Type": "text/html"}
    async with PictureHost({"/a": Answer(png, headers=html), "/b": Answer(b"<svg/>"), "/c": Answer()}) as host:
        assert await got(host, "/a") == png
        with pytest.raises(ImageUnreadable, match="no format"):
            await got(host, "/b")
        with pytest.raises(ImageUnreadable, match="empty"):
            await got(host, "/c")


async def test_a_broken_picture_is_left_to_the_decoder(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png[:40])}) as host:
        chat = await fetcher(host.port).fetched(asking(f"http://{NAME}:{host.port}/a"))
    with pytest.raises(ImageUnreadable, match="PNG image is broken"):
        frames(chat.images[0])


async def test_a_huge_content_length_is_refused_unread(png: bytes) -> None:
    for length in ("4001", "999999999999999999"):
        async with PictureHost({"/a": Answer(png, headers={"Content-Length": length}, gap=0.1)}) as host:
            with pytest.raises(ImageTooLarge, match="4,000"):
                await got(host, max_bytes=4000)
        assert host.sent < len(png)


async def test_an_endless_body_is_cut_off(png: bytes) -> None:
    endless = Answer(png + bytes(2**16), headers={"Content-Length": None}, times=10_000)
    async with PictureHost({"/a": endless}) as host:
        with pytest.raises(ImageTooLarge):
            await got(host, max_bytes=2**20)
        await asyncio.wait_for(host.hung_up.wait(), 1)
    assert host.sent < 2**24


async def test_a_body_of_exactly_the_limit_is_taken(png: bytes) -> None:
    for headers in ({}, {"Content-Length": None}):
        async with PictureHost({"/a": Answer(png, headers=headers)}) as host:
            assert await got(host, max_bytes=len(png)) == png
            with pytest.raises(ImageTooLarge):
                await got(host, max_bytes=len(png) - 1)


async def test_all_pictures_together_are_bounded() -> None:
    each = 2**23
    body = b"\xff\xd8\xff" + bytes(each - 3)
    paths = [f"/{at}" for at in range(TOGETHER_BYTES // each + 1)]
    async with PictureHost({path: Answer(body) for path in paths}) as host:
        with pytest.raises(ImageTooLarge, match="together"):
            await fetcher(host.port).fetched(asking(*(f"http://{NAME}:{host.port}{path}" for path in paths)))


async def test_a_drip_is_given_up(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png, gap=0.05)}) as host:
        begun = time.perf_counter()
        with pytest.raises(ImageUnreadable, match=r"took over 0\.4 s"):
            await got(host, seconds=0.4)
        assert 0.3 < time.perf_counter() - begun < 2
        await asyncio.wait_for(host.hung_up.wait(), 1)
    assert 0 < host.sent < len(png)


async def test_silence_is_given_up_sooner(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png, delay=5)}) as host:
        with pytest.raises(ImageUnreadable, match=r"said nothing for 0\.3 s"):
            await got(host, seconds=0.6)


async def test_a_slow_look_up_is_given_up() -> None:
    async def slow(name: str, port: int) -> list[str]:
        await asyncio.sleep(9)
        return []

    slowly = Fetcher(Sources(HOSTS, seconds=0.1), resolve=slow, allowed_address=loopback)
    with pytest.raises(ImageUnreadable, match="took over"):
        await slowly.fetched(asking(f"https://{NAME}/a"))


async def test_redirects_share_the_time() -> None:
    async with PictureHost({"/a": Answer(status=302, headers={"Location": "/a"}, delay=0.2)}) as host:
        with pytest.raises(ImageUnreadable, match="took over"):
            await got(host, seconds=0.8, redirects=100)
    assert len(host.heads) <= 4


async def test_a_host_that_breaks_off_or_is_not_there_is_an_error(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png, headers={"Content-Length": "999"})}) as host:
        with pytest.raises(ImageUnreadable, match="could not be fetched"):
            await got(host)
    with pytest.raises(ImageUnreadable, match="could not be fetched"):
        await got(host)


async def test_compressed_pictures_are_bounded(png: bytes) -> None:
    packed = {"Content-Encoding": "gzip"}
    bomb = gzip.compress(png + bytes(2**26))
    assert len(bomb) < 2**17
    answers = {
        "/a": Answer(gzip.compress(png), headers=packed),
        "/bomb": Answer(bomb, headers=packed),
        "/broken": Answer(png, headers=packed),
        "/br": Answer(png, headers={"Content-Encoding": "br"}),
        "/twice": Answer(png, headers={"Content-Encoding": "gzip, gzip"}),
    }
    async with PictureHost(answers) as host:
        assert await got(host, "/a") == png
        tracemalloc.start()
        with pytest.raises(ImageTooLarge):
            await got(host, "/bomb", max_bytes=2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()
        for path in ("/broken", "/br", "/twice"):
            with pytest.raises(ImageUnreadable):
                await got(host, path)


async def test_noise_is_an_image_error() -> None:
    rng = random.Random(4)
    async with PictureHost({"/a": Answer()}) as host:
        for _ in range(30):
            host.answers["/a"] = Answer(rng.randbytes(200), rng.choice((200, 206, 301, 304, 500)))
            with pytest.raises(ImageUnreadable):
                await got(host)


# How it ends


async def test_cancelling_closes_the_connections(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png, delay=9), "/b": Answer(png, gap=1)}) as host:
        urls = [f"http://{NAME}:{host.port}/{path}" for path in "ab"]
        task = asyncio.create_task(fetcher(host.port).fetched(asking(*urls)))
        await asyncio.wait_for(host.asked.wait(), 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(host.hung_up.wait(), 1)


async def test_the_first_failure_ends_the_others(png: bytes) -> None:
    async with PictureHost({"/a": Answer(png, delay=9), "/b": Answer(b"", 404, delay=0.1)}) as host:
        urls = [f"http://{NAME}:{host.port}/{path}" for path in "ab"]
        with pytest.raises(ImageUnreadable, match="404"):
            await fetcher(host.port).fetched(asking(*urls))
        await asyncio.wait_for(host.hung_up.wait(), 1)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of `NAME` and its key, in one file."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("makes its certificate with openssl")
    path = tmp_path_factory.mktemp("tls") / "pictures.pem"
    options = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2", "-subj", f"/CN={NAME}")
    files = ("-addext", f"subjectAltName=DNS:{NAME}", "-keyout", path, "-out", path.with_suffix(".crt"))
    subprocess.run((openssl, "req", "-x509", "-nodes", *options, *files), check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


def serving(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_tls_checks_the_name_of_the_pinned_host(certificate: Path, png: bytes) -> None:
    trusting = ssl.create_default_context(cafile=certificate)
    async with PictureHost({"/a": Answer(png)}, serving(certificate)) as host:
        mine, other = (f"https://{name}:{host.port}/a" for name in (NAME, "x.cdn.test"))
        chat = await fetcher(host.port, tls=trusting).fetched(asking(mine))
        assert open_url(chat.images[0].url) == png
        for url, tls in ((other, trusting), (mine, True)):
            with pytest.raises(ImageUnreadable, match="no certificate that is trusted"):
                await fetcher(host.port, tls=tls).fetched(asking(url))
    assert len(host.heads) == 1


async def test_a_redirect_never_leaves_tls(certificate: Path, png: bytes) -> None:
    trusting = ssl.create_default_context(cafile=certificate)
    async with PictureHost({"/a": Answer(png)}) as plain, PictureHost({}, serving(certificate)) as host:
        host.answers["/a"] = to(f"http://{NAME}:{plain.port}/a")
        both = fetcher(host.port, tls=trusting, ports=(host.port, plain.port))
        with pytest.raises(ImageNotAllowed, match="from https to http"):
            await both.fetched(asking(f"https://{NAME}:{host.port}/a"))
    assert plain.heads == []
