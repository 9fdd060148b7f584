"""Where replicas may be: a configured URL to the addresses behind its name, now.

Looked up again every second: what a resolver says to keep for ten minutes is old when a replica has
been replaced.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket

import httpx

log = logging.getLogger(__name__)
_TIMEOUT_S = 5.0
_TEMPORARY = (socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM)


def replica_id(url: str) -> str:
    """`host:port` of a replica's URL."""
    parsed = httpx.URL(url)
    host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
    return f"{host}:{parsed.port or (443 if parsed.scheme == 'https' else 80)}"


async def addresses(url: str) -> set[str] | None:
    """The URLs of all replicas behind `url`; None when the resolver does not answer.

    An address stands for itself, and so does an https URL, whose certificate is for the name.
    """
    parsed = httpx.URL(url)
    if parsed.scheme == "https" or _is_address(parsed.host):
        return {f"{parsed.scheme}://{replica_id(url)}"}
    loop, port = asyncio.get_running_loop(), parsed.port or 80
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            found = await loop.getaddrinfo(parsed.host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        return None
    except socket.gaierror as error:  # No such name, so no replica runs.
        return None if error.errno in _TEMPORARY else set()
    except UnicodeError:  # It cannot be a host name.
        return set()
    hosts = {str(address[0]) for *_, address in found}
    return {f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in hosts}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
