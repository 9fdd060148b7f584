"""A replica says to its trainer that it exists: POST /replicas, again before the lease ends.

    renew() ─▶ POST /replicas, every interval_s ─▶ end() ─▶ DELETE /replicas/{id}

What the trainer makes of it (admission, quarantine) is the trainer's own. One that is away is asked
again for ever: the replica serves meanwhile.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from urllib.parse import urlsplit

from shared.errors import ServiceError, Unauthorized, Unavailable
from shared.schemas import ReplicaRegistration
from shared.trainer_client import TrainerClient

log = logging.getLogger(__name__)
_END_TIMEOUT_S = 2.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Registration:
    """Of the replica that listens on `host`:`port`, or is reached at `advertise_url`."""

    def __init__(
        self,
        trainer: TrainerClient,
        *,
        host: str,
        port: int,
        advertise_url: str | None,
        lease_s: float,
    ) -> None:
        self._trainer = trainer
        self._host = host
        self._port = port
        self._advertise_url = advertise_url
        self._lease_s = lease_s
        self._id: str | None = None  # The trainer's id of this replica.
        self._said = ""

    @property
    def interval_s(self) -> float:
        """Time between two registrations, of which there are three per lease."""
        return self._lease_s / 3

    async def renew(self, boot_id: str) -> None:
        """Register, or log why it is not possible now."""
        try:
            await self._renew(boot_id)
        except Unauthorized:
            self._say(
                logging.WARNING,
                f"not registered: {self._trainer.url} refuses this replica's key: start both "
                "with the same TANDEM_API_KEY",
            )
        except ServiceError as error:
            self._say(
                logging.WARNING,
                f"not registered with {self._trainer.url}, asking again: {error}",
            )

    async def end(self) -> None:
        """Leave the trainer's fleet; within 2 s, as the lease ends anyway."""
        try:
            if self._id is not None:
                async with asyncio.timeout(_END_TIMEOUT_S):
                    await self._trainer.remove(self._id)
        except (ServiceError, TimeoutError) as error:
            log.warning("could not leave the fleet of %s: %r", self._trainer.url, error)
        finally:
            await self._trainer.aclose()

    async def _renew(self, boot_id: str) -> None:
        url = self._advertise_url or await self._own_url()
        status = await self._trainer.register(
            ReplicaRegistration(url=url, lease_s=self._lease_s, boot_id=boot_id)
        )
        self._id = status.id
        if status.state == "quarantined":
            self._say(logging.ERROR, f"{self._trainer.url} quarantines {url}: {status.detail}")
        else:
            self._say(logging.INFO, f"registered with {self._trainer.url} as {url}")

    def _say(self, level: int, message: str) -> None:
        """Log what is new, once."""
        if message != self._said:
            self._said = message
            log.log(level, message)

    async def _own_url(self) -> str:
        """Where the replica listens; on every address, the one that routes to the trainer."""
        host = self._host
        if _is_wildcard(host):
            host = await self._address_towards_trainer()
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    async def _address_towards_trainer(self) -> str:
        target = urlsplit(self._trainer.url)
        port = target.port or _DEFAULT_PORTS[target.scheme]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(target.hostname, port, type=socket.SOCK_DGRAM)
            family, _, _, _, address = found[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # Picks the route without sending anything.
                return str(probe.getsockname()[0])
        # UnicodeError means that it cannot be a host name.
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"no route to {target.hostname}: {error}") from error


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""
