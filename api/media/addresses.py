"""Which network addresses media may be fetched from."""

from __future__ import annotations

import ipaddress

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(text: str) -> bool:
    """Whether `text` is an address in the open internet; False for anything that is no address.

    Not public: private, loopback, link-local, carrier-grade NAT, multicast, reserved and unspecified
    addresses, and IPv6 forms that carry such an IPv4 address.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return all(_is_global(form) for form in (address, *_carried(address)))


def is_numeric_host(host: str) -> bool:
    """Whether a client library would connect to `host` without asking a resolver."""
    return ":" in host or host.replace(".", "").isdigit()


def _is_global(address: _Address) -> bool:
    is_site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not address.is_multicast and not is_site_local


def _carried(address: _Address) -> list[_Address]:
    """IPv4 addresses inside a 6to4, Teredo or NAT64 address."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    carried: list[_Address | None] = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        carried.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [inner for inner in carried if inner is not None]
