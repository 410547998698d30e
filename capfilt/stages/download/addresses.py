"""Which network addresses may be asked: public ones, and what the user allowed by name.

Resolving a name and connecting to the address that was checked is `opener.py`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from capfilt.errors import UserError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# IANA's special-purpose address registries for IPv4 and IPv6 (RFC 6890 and its updates), written out because what
# `ipaddress.is_global` covers differs between patch releases of Python; and the addresses of cloud metadata services
# that are not inside any of them.
_SPECIAL = {
    # First, for some lie inside networks that are otherwise private.
    "metadata service": (
        "169.254.169.254/32",
        "168.63.129.16/32",
        "100.100.100.200/32",
        "fd00:ec2::254/128",
    ),
    "unspecified": ("0.0.0.0/8", "::/128"),
    "loopback": ("127.0.0.0/8", "::1/128"),
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10"),
    "carrier-grade NAT": ("100.64.0.0/10",),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
    "reserved": (
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "240.0.0.0/4",
        "::/8",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
    ),
}
_PRIVATE = ("loopback", "private", "carrier-grade NAT")
"""What an intranet's hosts have; a cloud's metadata service, link-local addresses and the rest are no intranet."""

_NETWORKS = [(ipaddress.ip_network(text), kind) for kind, texts in _SPECIAL.items() for text in texts]

# Prefixes whose addresses are an IPv4 address in their last 32 bits: mapped, translated (RFC 7915), NAT64 (RFC 6052).
_CARRIERS = [ipaddress.IPv6Network(text) for text in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")]


def special_kind(address: IPAddress) -> str | None:
    """What kind of special address this is ("loopback", "private", ...), or None for a public one.

    An IPv6 address that carries an IPv4 one (mapped, 6to4, NAT64, ...) is public when both are.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _CARRIERS):
            return special_kind(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        for inner in (address.sixtofour, *(address.teredo or ())):
            if inner is not None and (kind := special_kind(inner)):
                return kind
    for network, kind in _NETWORKS:
        if address.version == network.version and address in network:
            return kind
    return None if address.is_global and not address.is_reserved else "reserved"


def parse_allowed_host(text: str) -> tuple[str, int]:
    """HOST:PORT as (lower-case host, port); an IPv6 host may stand in brackets. Raises UserError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]").lower()
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--allow-host {text!r}: give HOST:PORT, such as localhost:8000")
    return host, int(port)


@dataclass(frozen=True)
class AddressPolicy:
    """What may be connected to.

    Attributes:
        hosts: (host, port) as a URL names them that may have any address.
        private: whether an intranet's addresses may be connected to: private ones, loopback, carrier-grade NAT.
    """

    hosts: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    private: bool = False

    @staticmethod
    def of(allow_host: Iterable[str], allow_private: bool) -> AddressPolicy:
        """The policy of the options `--allow-host` and `--allow-private`. Raises UserError."""
        return AddressPolicy(
            frozenset(parse_allowed_host(text) for text in allow_host if text), allow_private
        )

    def objection(self, host: str, port: int, address: str) -> str | None:
        """Why `address`, to which `host` resolved, must not be connected to, in words; None when it may be."""
        if (host, port) in self.hosts:
            return None
        try:
            # A scope (fe80::1%eth0) names an interface, not an address.
            kind = special_kind(ipaddress.ip_address(address.partition("%")[0]))
        except ValueError:
            kind = "unreadable"
        if kind is None or (self.private and kind in _PRIVATE):
            return None
        where = host if host == address else f"{host} ({address})"
        name = f"[{host}]" if ":" in host else host
        return f"{where} is a {kind} address; --allow-host {name}:{port} permits it"
