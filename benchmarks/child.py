"""Runs one side of a measurement in a child process that the parent drives.

    Child(build, ...) ─spawn─▶ build() ─▶ subject, its event loop
    child.run(f, ...) ───────▶ await f(subject, ...) on that loop ─▶ result

Children boot concurrently but are measured one at a time: `run` blocks until its result is there.
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
    """A failure in a child; the message has its traceback and the end of its log."""


class Child(Generic[Subject]):
    """A child process, used as a context manager.

    `build`, the functions that are run, their arguments and their results are pickled.
    """

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
        with contextlib.suppress(OSError):  # the child has already ended
            self._connection.send(None)
        self._process.join(_CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def wait_until_ready(self) -> float:
        """Wait for the subject; returns seconds since the start. Raises ChildError on failure."""
        if self._ready_s is None:
            if not self._connection.poll(_READY_TIMEOUT_S):
                late = f"{self.name} is not ready after {_READY_TIMEOUT_S:g} s"
                raise ChildError(late + self._end())
            self._answer()
            self._ready_s = time.perf_counter() - self._started
        return self._ready_s

    def run(self, function: Callable[..., Coroutine[Any, Any, Result]], *arguments: Any) -> Result:
        """Run `await function(subject, *arguments)` in the child. Raises ChildError on failure."""
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
            settle_memory()  # the services and vLLM's own server do
            connection.send((True, None))
            _answer_calls(connection, subject, loop)
    except Exception:  # the parent reports every failure
        with contextlib.suppress(OSError):  # the parent has ended
            connection.send((False, traceback.format_exc()))


def _answer_calls(connection: Connection, subject: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Answer calls until the parent says to stop or ends."""
    with contextlib.suppress(EOFError):
        while (call := connection.recv()) is not None:
            function, arguments = call
            future = asyncio.run_coroutine_threadsafe(function(subject, *arguments), loop)
            try:
                result = future.result()
            except Exception:  # only this call failed; the subject can answer others
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
