"""Rewards as users write them, good and bad: each is run in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import sys
import time
from array import array
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

constant = 3.0


def count_characters(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    return [
        float(len(p) + len(c) + len(a))
        for p, c, a in zip(prompts, completions, answer, strict=True)
    ]


def environment(completions: list[str], path: list[str]) -> list[float]:
    Path(path[0]).write_text(json.dumps(dict(os.environ)))
    return [1.0] * len(completions)


class RunsACommand:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def answers_an_object(completions: list[str], path: list[str]) -> list[Any]:
    return [RunsACommand(path[0])] * len(completions)


def writes_an_object_itself(completions: list[str], path: list[str]) -> list[float]:
    content = pickle.dumps((True, [RunsACommand(path[0])]))
    Connection(os.dup(int(sys.argv[2]))).send_bytes(content)
    return [1.0] * len(completions)


def answers_at_length(completions: list[str], **_: object) -> list[float]:
    return [0.5] * (8 << 20)


def takes_memory(completions: list[str], **_: object) -> list[float]:
    return [float(len(bytearray(1 << 30)))] * len(completions)


async def always_half(completions: list[str], **_: object) -> list[float]:
    return [0.5 for _ in completions]


async def event_loop(completions: list[str], **_: object) -> list[float]:
    return [float(id(asyncio.get_running_loop()))] * len(completions)


def an_array(completions: list[str], **_: object) -> Any:
    """It has `tolist`, as arrays of numpy and tensors have."""
    return array("f", [0.5] * len(completions))


def fractions(completions: list[str], **_: object) -> Any:
    return (Fraction(1, 2) for _ in completions)


def process_id(completions: list[str], **_: object) -> list[float]:
    return [float(os.getpid())] * len(completions)


def interrupted_by_its_own_alarm(completions: list[str], **_: object) -> list[float]:
    """Only the main thread of a process may set an alarm."""

    def on_alarm(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(30)
    except TimeoutError:
        return [1.0] * len(completions)
    return [0.0] * len(completions)


def broken_by_43(completions: list[str], **_: object) -> list[float]:
    return [1.0 / (text != "43") for text in completions]


def broken_by_two(completions: list[str], **_: object) -> list[float]:
    if len(completions) == 2:
        raise RuntimeError("one at a time")
    return [1.0]


def leaves_43_out(completions: list[str], **_: object) -> list[float]:
    return [1.0 for text in completions if text != "43"]


def leaves_long_out(completions: list[str], **_: object) -> list[float]:
    return [1.0 for text in completions if len(text) < 100]


def forgets_to_return(**_: object) -> None:
    pass


def by_name(completions: list[str], **_: object) -> dict[str, float]:
    return dict.fromkeys(completions, 1.0)


def nan_for_43(completions: list[str], **_: object) -> list[float]:
    return [float("nan" if text == "43" else 1) for text in completions]


def infinite(completions: list[str], **_: object) -> list[float]:
    return [float("inf")] * len(completions)


def nothing(completions: list[str], **_: object) -> list[None]:
    return [None] * len(completions)


def text(completions: list[str], **_: object) -> list[str]:
    return ["0.5"] * len(completions)


def too_large(completions: list[str], **_: object) -> list[int]:
    return [10**400] * len(completions)


async def sleeps_for_43(completions: list[str], **_: object) -> list[float]:
    if "43" in completions:
        await asyncio.sleep(600)
    return [1.0] * len(completions)


def hangs_in_c_for_43(completions: list[str], **_: object) -> list[float]:
    """A regular expression that no signal handler and no other thread interrupts."""
    if "43" in completions:
        re.fullmatch(r"(a+)+b", "a" * 64)
    return [1.0] * len(completions)


def leaves(**_: object) -> list[float]:
    sys.exit(3)


def dies_of_43(completions: list[str], **_: object) -> list[float]:
    if "43" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [1.0] * len(completions)


class _OneAtATime:
    """Fails when a call begins before the last one has ended."""

    def __init__(self) -> None:
        self.is_running = False

    def __call__(self, completions: list[str], **_: object) -> list[float]:
        assert not self.is_running
        self.is_running = True
        time.sleep(0.05)
        self.is_running = False
        return [1.0] * len(completions)


alone = _OneAtATime()


def needs_gold(completions: list[str], gold: list[str], **_: object) -> list[float]:
    return [float(a == b) for a, b in zip(completions, gold, strict=True)]


def takes_no_columns(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def waits_for_a_file(completions: list[str], path: list[str], **_: object) -> list[float]:
    while not Path(path[0]).exists():
        time.sleep(0.01)
    return [1.0] * len(completions)


def leaves_a_worker(completions: list[str], path: list[str], **_: object) -> list[float]:
    """Its worker has all that was open here."""
    worker = os.fork()
    if worker:
        Path(path[0]).write_text(str(worker))
        os._exit(3)
    time.sleep(30)
    os._exit(0)
