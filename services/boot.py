"""What both services do when they have started, or cannot: then, one sentence and an exit code.

ValueError               a setting or the machine is wrong, starting again cannot help   exit 2
OSError, MemoryError     it may help: the hub is away, another process has the memory    exit 1
anything else            a crash, logged with its trace                                  exit 1
"""

from __future__ import annotations

import gc
import logging

from pydantic import ValidationError

_MAX_CHARACTERS = 600


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


def freeze_heap() -> None:
    """Keep what exists now from the garbage collector, until the process exits.

    Looking through what torch and vLLM import takes 0.5 s, in which no request is answered.
    """
    gc.collect()
    gc.freeze()
