"""A service process: read the settings or exit with a sentence, then serve and stop gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from services.connections import Listener, max_connections

log = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=BaseSettings)
_FIRST_REQUEST_S = 5.0  # How long a stop waits for a connection's first request.


def read_settings(cls: type[Settings]) -> Settings:
    """The settings from the environment. Prints one sentence per mistake and exits with 2."""
    try:
        return cls()
    except ValidationError as error:
        prefix = cls.model_config.get("env_prefix", "")
        for item in error.errors():
            name = prefix + "_".join(str(part) for part in item["loc"]).upper()
            message = item["msg"].removeprefix("Value error, ")
            print(f"{name}: {message} (see docs/settings.md)", file=sys.stderr)
        raise SystemExit(2) from None


class Server(uvicorn.Server):
    """Serves until `exit`. The first SIGTERM or SIGINT calls `on_stop`; the second one exits.

    A client has `head_timeout_s` to send the head of a request, and is disconnected when it has
    read nothing of an answer for `unread_timeout_s`.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str,
        port: int,
        on_stop: Callable[[], object],
        head_timeout_s: float = 30.0,
        unread_timeout_s: float = 120.0,
    ):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=10,
                timeout_keep_alive=75,
            )
        )
        self.exit_code = 0
        self._head_timeout_s = head_timeout_s
        self._unread_timeout_s = unread_timeout_s
        self._socket: socket.socket | None = None
        self._listener: Listener | None = None
        self._on_stop = on_stop
        self._num_signals = 0

    def exit(self, code: int) -> None:
        self.exit_code = max(self.exit_code, code)
        self.should_exit = True

    def run_until_exit(self) -> int:
        """Serve, and return the exit code. If the port is taken, nothing is loaded."""
        try:
            family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
            address = (self.config.host, self.config.port)
            self._socket = socket.create_server(address, family=family, backlog=2048)
        except OSError as error:
            number = error.errno or 0  # Negative if the host name does not resolve.
            reason = os.strerror(number) if number > 0 else "no such host"
            print(
                f"cannot listen on {self.config.host}:{self.config.port}: {reason}; choose another "
                "host or port, or stop the process that listens there",
                file=sys.stderr,
            )
            return 2
        uvloop.run(self._serve_with_signals())
        return self.exit_code if self.started else 1

    async def _serve_with_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await self.serve(sockets=[])  # uvicorn accepts nothing by itself.

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert self._socket
        self._listener = Listener(
            self._socket,
            self.config,
            self.server_state,
            self.lifespan.state,
            limit=max_connections(),
            head_timeout_s=self._head_timeout_s,
            unread_timeout_s=self._unread_timeout_s,
        )

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._on_stop()
        else:
            log.warning("second stop signal: exiting without waiting for running requests")
            # It would log a traceback for each request that is cut off.
            logging.getLogger("uvicorn.error").disabled = True
            self.force_exit = True
            self.exit(1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections, answer requests on open ones, then close."""
        if self._listener:
            self._listener.close()
            # uvicorn closes a connection that has had no request yet.
            deadline = time.monotonic() + _FIRST_REQUEST_S
            while not self.force_exit and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
                if not self._listener.has_silent_connections:
                    break
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Keep uvicorn from handling signals: it would close the listener at once."""
        yield
