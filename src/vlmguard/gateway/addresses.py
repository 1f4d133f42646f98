"""Which hosts' names are names, and which addresses are on the open internet."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TypeAlias

from yarl import URL

from vlmguard.errors import ConfigError

Address: TypeAlias = IPv4Address | IPv6Address

NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # what ends in one is an address in some spelling: 127.1, 0x7f.1, 2130706433

# IANA's special-purpose networks and the clouds' metadata addresses. They are written out because Python 3.11's
# own list lacks some, and others (Azure's, the relays) are in nobody's.
REFUSED: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's metadata
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo and others, examples, 6to4, examples
    )
)
GLOBAL_IPV6 = IPv6Network("2000::/3")  # all else is loopback, mapped, link-local, unique local, multicast or unassigned
NAT64 = IPv6Network("64:ff9b::/96")
ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # the third quarter of an address that wraps an IPv4 address


def public(address: Address) -> bool:
    """Whether an address is on the open internet, and hides no other that isn't."""
    if isinstance(address, IPv6Address):
        bits = int(address)
        if address in NAT64:  # a network without IPv4 reaches every IPv4 host so
            return public(IPv4Address(bits & 0xFFFF_FFFF))
        if address not in GLOBAL_IPV6 or address.scope_id or (bits >> 32 & 0xFFFF_FFFF) in ISATAP:
            return False
    return address.is_global and not any(address in network for network in REFUSED)


def host_name(host: str) -> str | None:
    """A host's name in lower case and ASCII (IDNA), without a last dot; None for an address or what is no name."""
    try:
        name = (URL.build(scheme="https", host=host).raw_host or "").removesuffix(".")
    except ValueError:
        return None
    if len(name) > 253 or not NAME.fullmatch(name) or NUMBER.fullmatch(name.rpartition(".")[2]):
        return None
    return name


def pattern(host: str) -> str:
    """An allowed host as the operator wrote it, normalised: a name, or "*." and a name of two labels or more.

    Raises:
        ConfigError: it is neither.
    """
    star = "*." if host.startswith("*.") else ""
    name = host_name(host.removeprefix(star))
    if name is None or (star and "." not in name):
        raise ConfigError.wrong("images.hosts", expected='names such as "a.example.com" or "*.example.com"', got=host)
    return star + name
