"""Which addresses a backend may have: checked when written and again when connecting."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
URL_PATTERN = r"^https?://(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}))?(?:/[A-Za-z0-9._~%+-]{0,100}){0,10}$"
_URL = re.compile(r"^https?://[^\s/?#@\\]+(?:/[^\s?#\\]*)?$")
_METADATA = {
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "100.100.100.200", "fd00:ec2::254", "168.63.129.16")
}
_SHARED = ipaddress.ip_network("100.64.0.0/10")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_MAX_PORT = 65535


class AddressRefused(ValueError):  # noqa: N818 - said to the admin as it is
    """An address the sidecar will not talk to; the message says why and what would be accepted."""


def embedded(address: IpAddress) -> IpAddress:
    """The IPv4 address hidden in an IPv6 one, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def check_ip(address: IpAddress, allowed: Sequence[str] = ()) -> None:
    """Raises AddressRefused unless traffic to this address is allowed."""
    real = embedded(address)
    if real.is_loopback:
        return
    if real in _METADATA or real.is_link_local:
        raise AddressRefused(f"{address} is a link-local or metadata address")
    if real.is_unspecified or real.is_multicast or (real.version == 4 and int(real) >> 24 == 0):  # noqa: PLR2004
        raise AddressRefused(f"{address} is not the address of a server")
    if real.is_private or real.is_reserved or real in _SHARED:
        if any(real in ipaddress.ip_network(network) for network in allowed):
            return
        raise AddressRefused(f"{address} is private; allow its network in SIDECAR_PRIVATE_NETWORKS")


def literal(host: str) -> IpAddress | None:
    """The address a host spells, decimal, octal and hex spellings included; None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    try:
        # inet_aton reads what connect() would read: 2130706433, 0x7f.1, 0177.0.0.1.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def check_url(url: str, allowed: Sequence[str] = ()) -> None:
    """Raises AddressRefused unless the base address is one we would talk to."""
    if not _URL.match(url):
        raise AddressRefused(
            "must be http:// or https:// with a host, and no user info, query or fragment, "
            "like https://api.example.com/v1"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressRefused(f"cannot be read: {error}") from None
    host = parts.hostname or ""
    if not host or (port is not None and not 0 < port <= _MAX_PORT):
        raise AddressRefused("has no host, or a port out of range")
    address = literal(host)
    if address is not None:
        check_ip(address, allowed)
    elif host.lower().rstrip(".") in {"metadata.google.internal", "metadata"}:
        raise AddressRefused(f"{host} is a metadata address")


def base_of(url: str, *, anthropic: bool) -> str:
    """What precedes `/chat/completions` or `/messages`: `/v1` is assumed for a bare host."""
    base = url.rstrip("/")
    path = urlsplit(base).path.rstrip("/")
    if anthropic:
        return base if path.endswith("/v1") else base + "/v1"
    return base if path else base + "/v1"
