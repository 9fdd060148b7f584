"""A reward function of the user's in a process of its own.

    trainer: FunctionProcess ──{prompts, completions, columns}──▶ child: the function
                             ◀──JSON: rewards, or what it raised─

Rewards may run what a model wrote, so the trainer never unpickles what the child sends, and the
child's environment has no secret of the trainer. There the function can hang, also in C code that
never lets another thread run, use up its memory or end the interpreter, and the trainer says so and
continues. It runs in the main thread, where signal.alarm works, and never twice at once. What it
prints is in the trainer's log. A new run imports it anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from services.trainer.rewards.batch import NoNumber, as_reward

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_EXIT_S = 5.0  # How long an ending process may take.
_TRACE_CHARACTERS = 8000
_PROBLEM_CHARACTERS = 600
_MAX_ANSWER_BYTES = 4 << 20
# What a process needs from the environment, and what is named for rewards; never other variables,
# some of which are secrets.
_INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TERM|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV"
    r"|PYTHON\w+|(OMP|MKL|OPENBLAS|NUMEXPR|CUDA|NVIDIA|XDG)_\w+|SSL_CERT_(FILE|DIR)"
    r"|HF_(HOME|HUB_CACHE|HUB_OFFLINE)|TOKENIZERS_PARALLELISM|REWARD_\w+"
)


class FunctionFailed(Exception):
    """Why there are no rewards."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a function takes by name; `takes_any` when its signature says so or is unknown."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool


@dataclass(frozen=True, slots=True)
class _Raised:
    problem: str
    trace: str


def _read_parameters(answer: list[Any]) -> Parameters:
    required, optional, takes_any = answer
    return Parameters(tuple(required), tuple(optional), bool(takes_any))


def _read_values(answer: list[Any]) -> list[float | NoNumber]:
    """Numbers, and as texts what is none."""
    return [
        NoNumber(value[:_PROBLEM_CHARACTERS]) if isinstance(value, str) else as_reward(value)
        for value in answer
    ]


class FunctionProcess:
    """The trainer's side. `path` is `module:function` on the trainer's import path."""

    def __init__(self, path: str, *, max_memory_bytes: int | None = None) -> None:
        self._path = path
        self._max_memory_bytes = max_memory_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None  # Our end, which can be shut down to end a call.
        self._connection: Connection | None = None  # The connection over that socket.
        self._parameters = Parameters((), (), takes_any=True)

    async def start(self, *, timeout_s: float) -> Parameters:
        """The function's parameters; starts the process unless it runs. Raises FunctionFailed."""
        if self._child is None:
            self._start_child()
            try:
                question = (self._path, self._max_memory_bytes)
                self._parameters = await self._ask(question, _read_parameters, timeout_s=timeout_s)
            except FunctionFailed:
                self.close()
                raise
        return self._parameters

    def _start_child(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            inherited = {k: v for k, v in os.environ.items() if _INHERITED.fullmatch(k)}
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), str(theirs.fileno())],
                start_new_session=True,  # Processes that the function starts end with it.
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            )
        self._connection = Connection(os.dup(self._socket.fileno()))

    async def call(
        self, arguments: Mapping[str, Any], *, timeout_s: float
    ) -> list[float | NoNumber]:
        """The function's values, converted by `as_reward`. Raises FunctionFailed."""
        return await self._ask(dict(arguments), _read_values, timeout_s=timeout_s)

    async def _ask(
        self, question: Any, read: Callable[[list[Any]], Answer], *, timeout_s: float
    ) -> Answer:
        """The child's answer. Raises FunctionFailed, and kills a child that gave none.

        `read` makes something of the answered list in a thread, as a hostile one may be long.
        """
        child, connection = self._child, self._connection
        assert child
        assert connection

        def exchange() -> _Raised | Answer:
            connection.send(question)
            succeeded, result = json.loads(connection.recv_bytes(_MAX_ANSWER_BYTES))
            return read(result) if succeeded else _Raised(*map(str, result))

        exchanging = asyncio.ensure_future(asyncio.to_thread(exchange))
        try:
            await asyncio.wait({exchanging}, timeout=timeout_s)
            if not exchanging.done() and child.poll() is None:
                raise FunctionFailed(f"took more than {timeout_s:g} s")
            error = exchanging.exception() if exchanging.done() else EOFError()
            if isinstance(error, OSError) and str(error) == "bad message length":
                raise FunctionFailed(f"answered more than {_MAX_ANSWER_BYTES} bytes, and was ended")
            # The process is gone, or only its forks hold the other end of the connection.
            if isinstance(error, EOFError | OSError):
                raise FunctionFailed(
                    f"ended its process, which {await _ending(child)}{self._memory_hint}"
                )
            if error:
                raise FunctionFailed("wrote to its connection to the trainer, and was ended")
        finally:
            if not exchanging.done() or exchanging.exception():
                self._kill()
                await asyncio.wait({exchanging})  # Nobody answers any more, so it ends at once.
                exchanging.exception()  # Retrieve it, so that asyncio does not warn.
                self.close()
        answer = exchanging.result()
        if not isinstance(answer, _Raised):
            return answer
        problem = answer.problem[:_PROBLEM_CHARACTERS]
        if "memory" in problem.lower():
            problem += self._memory_hint
        trace = answer.trace[-_TRACE_CHARACTERS:].rstrip()
        log.error("reward function %s %s\n%s", self._path, problem, trace)
        raise FunctionFailed(problem)

    @property
    def _memory_hint(self) -> str:
        limit = self._max_memory_bytes
        return f"; its max_memory_bytes is {limit}: raise it" if limit is not None else ""

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
        path, max_memory_bytes = connection.recv()
        if max_memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (max_memory_bytes, max_memory_bytes))
        is_loaded, function = _try(_load, path)
        _answer(connection, is_loaded, _parameters(function) if is_loaded else function)
        # One loop for all calls: what a coroutine opens stays usable.
        with asyncio.Runner() as runner:
            while is_loaded:
                _answer(connection, *_try(_rewards, function, connection.recv(), runner))
    except (EOFError, OSError):  # The trainer closed the connection.
        pass


def _answer(connection: Connection, succeeded: bool, result: Any) -> None:
    connection.send_bytes(json.dumps([succeeded, result]).encode())


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
) -> list[float | str]:
    """Numbers, and the text of what is none."""
    values = function(**arguments)
    if inspect.isawaitable(values):
        values = runner.run(_result(values))
    if hasattr(values, "tolist"):  # Arrays and tensors become Python numbers.
        values = values.tolist()
    if isinstance(values, str | Mapping | Set) or not isinstance(values, Iterable):
        raise TypeError(f"it returned {values!r:.80}, not a list of numbers")
    rewards = map(as_reward, values)
    return [value.text if isinstance(value, NoNumber) else value for value in rewards]


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
