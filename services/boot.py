"""How both services report that they cannot start, and what they do once they have started.

A service that cannot start logs one sentence and exits:

ValueError               a setting or the machine is wrong: a restart does not help           exit 2
OSError, MemoryError     the hub or the memory is unavailable: a restart may help             exit 1
anything else            a crash, logged with its traceback                                   exit 1
"""

from __future__ import annotations

import ctypes
import gc
import logging

from pydantic import ValidationError

_MAX_CHARACTERS = 600
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # From glibc's malloc.h.


def one_line(error: BaseException) -> str:
    """The first paragraph of an error's message on one line, with its class where that helps."""
    text = str(error)
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        text = ": ".join(map(str, (*item["loc"], item["msg"].removeprefix("Value error, "))))
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())[:_MAX_CHARACTERS]
    if isinstance(error, ValueError | OSError | MemoryError | RuntimeError) and paragraph:
        return paragraph
    return f"{type(error).__name__}: {paragraph}".rstrip(": ")


def report(log: logging.Logger, what: str, error: Exception) -> tuple[str, int]:
    """Log why `what` failed. Returns that sentence and the exit code."""
    sentence = f"{what}: {one_line(error)}"
    is_foreseen = isinstance(error, ValueError | OSError | MemoryError)
    log.error("%s", sentence, exc_info=None if is_foreseen else error)
    if is_foreseen:
        log.debug("full traceback", exc_info=error)
    return sentence, 2 if isinstance(error, ValueError) else 1


def settle_memory() -> None:
    """Tune the memory management of a service that has finished loading.

    The garbage collector ignores all existing objects: scanning what torch and vLLM import takes
    0.5 s, during which the service answers no request. malloc keeps some freed memory: by default
    it returns every piece of an upload to the kernel and requests it again page by page, which more
    than doubles the time of an upload.
    """
    gc.collect()
    gc.freeze()
    for parameter, num_bytes in ((_M_MMAP_THRESHOLD, 4 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
        ctypes.CDLL(None).mallopt(parameter, num_bytes)
