"""What both services do when they have started, or cannot: then, one sentence and an exit code.

ValueError               a setting or the machine is wrong, starting again cannot help   exit 2
OSError, MemoryError     it may help: the hub is away, another process has the memory    exit 1
anything else            a crash, logged with its trace                                  exit 1
"""

from __future__ import annotations

import ctypes
import gc
import logging

from pydantic import ValidationError

_MAX_CHARACTERS = 600
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def one_line(error: BaseException) -> str:
    """The first paragraph of what an error says, in one line; its class where that says more."""
    text = str(error)
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        text = ": ".join(map(str, (*item["loc"], item["msg"].removeprefix("Value error, "))))
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())[:_MAX_CHARACTERS]
    if isinstance(error, ValueError | OSError | MemoryError | RuntimeError) and paragraph:
        return paragraph
    return f"{type(error).__name__}: {paragraph}".rstrip(": ")


def report(log: logging.Logger, what: str, error: Exception) -> tuple[str, int]:
    """Log why `what` did not work; the sentence, and the exit code that it stands for."""
    sentence = f"{what}: {one_line(error)}"
    is_foreseen = isinstance(error, ValueError | OSError | MemoryError)
    log.error("%s", sentence, exc_info=None if is_foreseen else error)
    if is_foreseen:
        log.debug("the whole trace", exc_info=error)
    return sentence, 2 if isinstance(error, ValueError) else 1


def settle_memory() -> None:
    """Set up the memory of a service that has loaded, until the process exits.

    The garbage collector leaves what exists now alone: looking through what torch and vLLM import
    takes 0.5 s, in which no request is answered. And malloc keeps some of what is freed: by default
    every piece of an upload comes from the kernel and goes back, page by page, which more than
    doubles the time of an upload.
    """
    gc.collect()
    gc.freeze()
    for parameter, num_bytes in ((_M_MMAP_THRESHOLD, 4 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
        ctypes.CDLL(None).mallopt(parameter, num_bytes)
