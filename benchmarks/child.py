"""A process of its own for one side of a measurement: something built there, and driven from here.

    Child(build, ...) ─spawn─▶ build() ─▶ subject, its event loop
    child.run(f, ...) ───────▶ await f(subject, ...) on that loop ─▶ result

Children boot beside each other and are measured one at a time: `run` returns when all is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import uvloop

from services.boot import settle_memory

Subject = TypeVar("Subject")
Result = TypeVar("Result")
Build = ParamSpec("Build")
Built = AbstractContextManager[tuple[Subject, asyncio.AbstractEventLoop]]
_READY_TIMEOUT_S = 900.0
_CLOSE_TIMEOUT_S = 60.0
_NUM_LOG_LINES = 40


class ChildError(Exception):
    """What went wrong in a child, with its trace and the end of its log."""


class Child(Generic[Subject]):
    """Use as a context manager. `build`, what is run, its arguments and results are pickled."""

    def __init__(
        self,
        name: str,
        log: Path,
        environment: Mapping[str, str],
        build: Callable[Build, Built[Subject]],
        *arguments: Build.args,
        **options: Build.kwargs,
    ) -> None:
        self.name = name
        self._log = log
        self._started = time.perf_counter()
        self._ready_s: float | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, log, dict(environment), build, arguments, options)
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Child[Subject]:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.send(None)
        self._process.join(_CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def wait_until_ready(self) -> float:
        """Seconds that it took, seen from here. Raises ChildError when it could not be built."""
        if self._ready_s is None:
            if not self._connection.poll(_READY_TIMEOUT_S):
                late = f"{self.name} is not ready after {_READY_TIMEOUT_S:g} s"
                raise ChildError(late + self._end())
            self._answer()
            self._ready_s = time.perf_counter() - self._started
        return self._ready_s

    def run(self, function: Callable[..., Coroutine[Any, Any, Result]], *arguments: Any) -> Result:
        """The result of `await function(subject, *arguments)` there. Raises ChildError."""
        self._connection.send((function, arguments))
        result: Result = self._answer()
        return result

    def _answer(self) -> Any:
        try:
            is_result, value = self._connection.recv()
        except EOFError as error:
            raise ChildError(f"{self.name} ended{self._end()}") from error
        if not is_result:
            raise ChildError(f"{self.name}: {value}{self._end()}")
        return value

    def _end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:]
        return "\n".join(["; the end of its log:", *lines])


def _serve(
    connection: Connection,
    log: Path,
    environment: Mapping[str, str],
    build: Callable[..., Built[Any]],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
) -> None:
    os.environ.update(environment)
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        with build(*arguments, **options) as (subject, loop):
            settle_memory()  # as the services do, and vLLM's own server
            connection.send((True, None))
            _answer_calls(connection, subject, loop)
    except Exception:  # whatever it is, the parent says it
        with contextlib.suppress(OSError):  # the parent has gone
            connection.send((False, traceback.format_exc()))


def _answer_calls(connection: Connection, subject: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Until the parent wants no more, or is no more."""
    with contextlib.suppress(EOFError):
        while (call := connection.recv()) is not None:
            function, arguments = call
            future = asyncio.run_coroutine_threadsafe(function(subject, *arguments), loop)
            try:
                result = future.result()
            except Exception:  # of the call: the subject goes on
                connection.send((False, traceback.format_exc()))
            else:
                connection.send((True, result))


@contextlib.contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_TIMEOUT_S)
