"""The address of a client: its connection's, or the one that a trusted proxy tells."""

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_of(scope: Scope, proxies: Sequence[Network]) -> str:
    """Who asks. X-Forwarded-For is read from its end, and only as far as `proxies` wrote it."""
    peer = _address((scope.get("client") or ("",))[0])
    if peer is None:
        return "-"
    told = ",".join(Headers(scope=scope).getlist("x-forwarded-for")).split(",")
    while told and any(peer in network for network in proxies):
        earlier = _address(told.pop().strip())
        if earlier is None:
            break
        peer = earlier
    return str(peer)


def _address(text: str) -> Address | None:
    """An address, with or without a port; None for anything else."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)  # an IPv4 client of an IPv6 socket
    return address if mapped is None else mapped
