"""The connections of a service: how many there are, and what each may cost before it has a key.

listening socket ─▶ Listener ─▶ Connection ─▶ app
                    │           ├ 431: the head of a request is too long
                    │           ├ 504: it takes too long to arrive
                    │           └ 503: almost all places are taken
                    └ no place is left: further clients wait in the kernel's queue
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from services.http import problem_response
from shared.errors import DeadlineExceeded, HeadTooLarge, ServiceError, Unavailable

log = logging.getLogger(__name__)
MAX_HEAD_BYTES = 64 << 10  # Request line and headers.
_MAX_DESCRIPTORS, _FEW_DESCRIPTORS = 1 << 16, 4096
_OWN_DESCRIPTORS = 256  # Kept for files, the engine and outgoing requests.
_MAX_CONNECTIONS = 8192
_ACCEPTS_PER_TURN = 64
_ACCEPT_PAUSE_S = 0.1
_LINGER_S = 2.0  # Lets a refused client read the answer before its connection is reset.
_EVICTABLE_S = 5.0  # Idle time after which a connection gives its place to a waiting client.
_ALWAYS_ANSWERED = ("/healthz", "/readyz")


def max_connections() -> int:
    """Raise the limit of open files as far as allowed; the number of connections that it permits.

    Warns when these are few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    allowed = max(8, min(_MAX_CONNECTIONS, soft - _OWN_DESCRIPTORS))
    if soft < _FEW_DESCRIPTORS:
        log.warning(
            "the limit of open files is %d, which permits %d connections at a time; others wait: "
            "raise it (ulimit -n, LimitNOFILE of systemd, ulimits in a compose file)",
            soft,
            allowed,
        )
    return allowed


class Connection(HttpToolsProtocol):
    """uvicorn's connection with bounds on the head of a request: its bytes and its time."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        head_timeout_s: float,
        is_crowded: Callable[[], bool],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._head_timeout_s = head_timeout_s
        self._is_crowded = is_crowded
        self._on_lost = on_lost
        self._is_in_head = True
        self._num_head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None  # Runs while a head is awaited.
        self._is_refused = False
        self._idle_since: float | None = None  # Time since when no request runs or arrives.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._idle_since = None
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes and not self.transport.is_closing():
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(
                    HeadTooLarge(
                        f"the request line and headers are over {MAX_HEAD_BYTES} bytes: send data "
                        "in the body"
                    )
                )
            elif self._timer is None:
                self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._is_in_head, self._num_head_bytes = False, 0
        app = self.config.loaded_app
        self.app = _Crowded(app) if self._is_crowded() else app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self._num_head_bytes:
            self._idle_since = self.loop.time()

    @property
    def has_had_request(self) -> bool:
        return self.cycle is not None

    @property
    def is_evictable(self) -> bool:
        return self._idle_since is not None and (self.loop.time() - self._idle_since > _EVICTABLE_S)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self._head_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if not self._num_head_bytes:
            self.transport.close()
        else:
            self._refuse(
                DeadlineExceeded(
                    f"the headers did not arrive within {self._head_timeout_s:g} s: send the "
                    "request again"
                )
            )

    def _refuse(self, error: ServiceError) -> None:
        """Answer without the app, and read nothing more from this client."""
        self._is_refused = True
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # Another answer is being written.
            return
        response = problem_response(error)
        status = HTTPStatus(error.status)
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", "connection: close"]
        lines += [f"{k.decode()}: {v.decode()}" for k, v in response.raw_headers]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + bytes(response.body))
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


class _Crowded:
    """The app while almost all places are taken: it answers health checks and refuses the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in _ALWAYS_ANSWERED:
            return await self._app(scope, receive, send)
        response = problem_response(
            Unavailable(
                "this service has almost no free connection: send the request again, or to another "
                "replica",
                retry_after_s=1.0,
            )
        )
        response.headers["Connection"] = "close"
        return await response(scope, receive, send)


class Listener:
    """Accepts connections while there is a place; further clients wait in the kernel's queue.

    At the limit of open files an event loop would accept clients only to reset them.
    """

    def __init__(
        self,
        listener: socket.socket,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        limit: int,
        head_timeout_s: float,
        unread_timeout_s: float,
    ) -> None:
        self._socket = listener
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._limit = limit
        self._head_timeout_s = head_timeout_s
        self._unread_timeout_s = unread_timeout_s
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._is_paused = True
        self._is_closed = False
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept who has connected already, and refuse new clients.

        A forked process inherits the listening socket. If only this process closed it, connections
        would still be accepted but never answered, so the socket is shut down first. That resets
        the connections which wait to be accepted, so these are accepted before.
        """
        self._pause()
        self._is_closed = True
        with contextlib.suppress(OSError):  # Most often because none is left.
            while True:
                self._open(self._socket.accept()[0])
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @property
    def has_silent_connections(self) -> bool:
        """Whether a client is connected that has not sent a request yet."""
        return bool(self._opening) or not all(c.has_had_request for c in self._connections())

    def _connections(self) -> list[Connection]:
        return [c for c in self._state.connections if isinstance(c, Connection)]

    def _num_places(self) -> int:
        return self._limit - len(self._state.connections) - len(self._opening)

    def _is_crowded(self) -> bool:
        return self._num_places() < self._limit // 8

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self._loop.remove_reader(self._socket)

    def _resume(self) -> None:
        if self._is_paused and not self._is_closed:
            self._is_paused = False
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if self._num_places() <= 0:
                self._pause()
                self._make_room()
                return
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # No descriptor or memory: it can be free soon.
                log.warning("cannot accept connections: %s", error)
                self._pause()
                self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)
                return
            self._open(connection)

    def _make_room(self) -> None:
        """Close connections that have long been idle, and look again while there is no place."""
        for connection in self._connections():
            if connection.is_evictable:
                connection.transport.close()
        self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)

    def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel ends a connection whose client has read nothing for so long.
        connection.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._unread_timeout_s * 1000)
        )
        task = self._loop.create_task(
            self._loop.connect_accepted_socket(self._protocol, connection)
        )
        self._opening.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("a connection could not be opened: %s", error)

    def _protocol(self) -> Connection:
        return Connection(
            self._config,
            self._state,
            self._app_state,
            head_timeout_s=self._head_timeout_s,
            is_crowded=self._is_crowded,
            on_lost=self._resume,
        )
