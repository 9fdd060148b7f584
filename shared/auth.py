"""Bearer tokens: one key for both services, compared in constant time, never logged."""

from __future__ import annotations

import hmac
import ipaddress
from typing import Annotated

from pydantic import Field

from shared.errors import Unauthorized

ApiKey = Annotated[str, Field(pattern=r"^[!-~]+$")]  # Characters that an HTTP header can carry.


def check_bind(host: str, api_key: str | None) -> None:
    """Raise ValueError if `host` is reachable from other machines and there is no key."""
    if not is_loopback(host) and not api_key:
        raise ValueError(
            f"refusing to listen on {host} without a key: set TANDEM_API_KEY, or bind 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """True for an address or name that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authorization(api_key: str | None) -> dict[str, str]:
    """The request header that carries the key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def check_authorization(header: str | None, api_key: str | None) -> None:
    """Raise Unauthorized unless `header` carries `api_key`. Without a key everyone is allowed."""
    if not api_key:
        return
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), api_key.encode()):
        raise Unauthorized("send 'Authorization: Bearer <TANDEM_API_KEY>' with the service's key")
