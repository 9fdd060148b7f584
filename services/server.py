"""A service process: settings or one sentence, then uvicorn with a stop of the service's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import BaseSettings

log = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=BaseSettings)
_LAST_REQUESTS_S = 0.2  # for requests on connections that were accepted a moment ago


def read_settings(cls: type[Settings]) -> Settings:
    """The settings from the environment; exits with one sentence per mistake."""
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
    """Serves until `exit`. The first SIGTERM or SIGINT calls `on_stop`, a second one exits."""

    def __init__(self, app: FastAPI, *, host: str, port: int, on_stop: Callable[[], object]):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=10,
                timeout_keep_alive=75,
            )
        )
        self.exit_code = 0
        self._listener: socket.socket | None = None
        self._on_stop = on_stop
        self._num_signals = 0

    def exit(self, code: int) -> None:
        self.exit_code = max(self.exit_code, code)
        self.should_exit = True

    def run_until_exit(self) -> int:
        """Serve; the exit code of the process. Nothing is loaded when the port is taken."""
        try:
            family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
            address = (self.config.host, self.config.port)
            listener = socket.create_server(address, family=family, backlog=2048)
        except OSError as error:
            number = error.errno or 0  # below 0: a name that cannot be resolved
            reason = os.strerror(number) if number > 0 else "no such host"
            print(
                f"cannot listen on {self.config.host}:{self.config.port}: {reason}; choose another "
                "host or port, or end what listens there",
                file=sys.stderr,
            )
            return 2
        self._listener = listener.dup()  # uvicorn closes the other one
        uvloop.run(self._serve_with_signals(listener))
        return self.exit_code if self.started else 1

    async def _serve_with_signals(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await self.serve(sockets=[listener])

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._on_stop()
        else:
            log.warning("told to stop once more: not waiting for what still runs")
            logging.getLogger("uvicorn.error").disabled = True  # has a trace for each of that
            self.force_exit = True
            self.exit(1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse connections, answer those that are open, close.

        A process that was forked here has the listening socket too: closed by us alone, it would
        still take connections, which nobody answers.
        """
        if self._listener:
            for server in self.servers:
                server.close()
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            await asyncio.sleep(_LAST_REQUESTS_S)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn would close the listener at once; the service decides what a signal means."""
        yield
