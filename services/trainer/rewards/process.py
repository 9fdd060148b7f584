"""A reward function of the user's in a process of its own.

    trainer: FunctionProcess ──{prompts, completions, columns}──▶ child: the function
                             ◀──rewards, or what it raised──────

There it can hang, also in C code that never lets another thread run, use up its memory or end the
interpreter, and the trainer says so and continues. It runs in the main thread, where signal.alarm
works, and never twice at once. What it prints is in the trainer's log. A new run imports it anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from services.trainer.rewards.batch import as_reward

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_EXIT_S = 5.0  # How long an ending process may take.
_TRACE_CHARACTERS = 8000


class FunctionFailed(Exception):
    """Why there are no rewards."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a function takes by name; `takes_any` when its signature says so or is unknown."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool


class FunctionProcess:
    """The trainer's side. `path` is `module:function` on the trainer's import path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None  # Our end, which can be shut down to end a call.
        self._connection: Connection | None = None  # The connection over that socket.
        self._parameters = Parameters((), (), takes_any=True)

    async def start(self, *, timeout_s: float) -> Parameters:
        """The function's parameters; starts the process unless it runs. Raises FunctionFailed."""
        if self._child is None:
            self._start_child()
            try:
                self._parameters = Parameters(*await self._ask(self._path, timeout_s=timeout_s))
            except FunctionFailed:
                self.close()
                raise
        return self._parameters

    def _start_child(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), str(theirs.fileno())],
                start_new_session=True,  # Processes that the function starts end with it.
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            )
        self._connection = Connection(os.dup(self._socket.fileno()))

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> Sequence[Any]:
        """The function's values, converted by `as_reward`. Raises FunctionFailed."""
        values: Sequence[Any] = await self._ask(dict(arguments), timeout_s=timeout_s)
        return values

    async def _ask(self, question: Any, *, timeout_s: float) -> Any:
        """The child's answer. Raises FunctionFailed, and kills a child that did not answer."""
        child, connection = self._child, self._connection
        assert child
        assert connection

        def exchange() -> tuple[bool, Any]:
            connection.send(question)
            answer: tuple[bool, Any] = connection.recv()
            return answer

        exchanging = asyncio.ensure_future(asyncio.to_thread(exchange))
        try:
            await asyncio.wait({exchanging}, timeout=timeout_s)
            if not exchanging.done() and child.poll() is None:
                raise FunctionFailed(f"took more than {timeout_s:g} s")
            # The process is gone, or only its forks hold the other end of the connection.
            if not exchanging.done() or isinstance(exchanging.exception(), EOFError | OSError):
                raise FunctionFailed(f"ended its process, which {await _ending(child)}")
        finally:
            if not exchanging.done() or exchanging.exception():
                self._kill()
                await asyncio.wait({exchanging})  # Nobody answers any more, so it ends at once.
                exchanging.exception()  # Retrieve it, so that asyncio does not warn.
                self.close()
        succeeded, result = exchanging.result()
        if not succeeded:
            problem, trace = result
            log.error("reward function %s %s\n%s", self._path, problem, trace.rstrip())
            raise FunctionFailed(problem)
        return result

    def _kill(self) -> None:
        """End the process with everything it started, and wake whoever waits for its answer."""
        if self._child:
            with suppress(ProcessLookupError):  # The process may be gone while its workers are not.
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        if self._socket:
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._kill()
        if self._socket:
            self._socket.close()
        if self._connection:
            self._connection.close()
        self._child = self._socket = self._connection = None


async def _ending(child: subprocess.Popen[bytes]) -> str:
    """How a process ended that has closed its connection."""
    try:
        code = await asyncio.to_thread(child.wait, _EXIT_S)
    except subprocess.TimeoutExpired:
        return "closed its connection to the trainer"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


# --- the child ----------------------------------------------------------------------------------


def main() -> None:
    parent_pid, descriptor = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The trainer answers Ctrl-C.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return  # The trainer ended before this.
    connection = Connection(descriptor)
    try:
        is_loaded, function = _try(_load, connection.recv())
        connection.send((is_loaded, _parameters(function) if is_loaded else function))
        # One loop for all calls: what a coroutine opens stays usable.
        with asyncio.Runner() as runner:
            while is_loaded:
                connection.send(_try(_rewards, function, connection.recv(), runner))
    except (EOFError, OSError):  # The trainer closed the connection.
        pass


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is no function, it is {function!r:.60}")
    loaded: Callable[..., Any] = function
    return loaded


def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # Some functions of C modules have no signature.
        return (), (), True
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return (
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _rewards(
    function: Callable[..., Any], arguments: Mapping[str, Any], runner: asyncio.Runner
) -> list[Any]:
    values = function(**arguments)
    if inspect.isawaitable(values):
        values = runner.run(_result(values))
    if hasattr(values, "tolist"):  # Arrays and tensors become Python numbers.
        values = values.tolist()
    if isinstance(values, str | Mapping | Set) or not isinstance(values, Iterable):
        raise TypeError(f"it returned {values!r:.80}, not a list of numbers")
    return [as_reward(value) for value in values]


async def _result(values: Awaitable[Any]) -> Any:
    return await values


def _try(work: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """(True, the result), or (False, (what it raised, the trace))."""
    try:
        return True, work(*arguments)
    except BaseException as error:  # User code may also call sys.exit.
        trace = traceback.format_exc()[-_TRACE_CHARACTERS:]
        return False, (f"raised {error!r:.300}{_where(error)}", trace)


def _where(error: BaseException) -> str:
    """The last line outside of this file that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    return f" in {outside[-1].filename}, line {outside[-1].lineno}" if outside else ""


if __name__ == "__main__":
    main()
