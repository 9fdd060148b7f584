"""Exit codes, the sentences that an operator reads, and memory after the start."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys

import pytest
from pydantic import BaseModel, Field, ValidationError

from services.boot import one_line, report, settle_memory

log = logging.getLogger("services.test")


class Limits(BaseModel):
    share: float = Field(le=1)


@pytest.mark.parametrize(
    ("error", "exit_code", "has_trace"),
    [
        (ValueError("a wrong setting"), 2, False),
        (ConnectionError("the hub is away"), 1, False),
        (MemoryError("others have it"), 1, False),
        (KeyError("a bug"), 1, True),
    ],
    ids=lambda value: str(value),
)
def test_2_means_that_a_restart_does_not_help(
    error: Exception, exit_code: int, has_trace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "services")
    sentence, code = report(log, "boot failed", error)
    assert code == exit_code
    (record,) = caplog.records
    assert record.getMessage() == sentence
    assert bool(record.exc_info) is has_trace


def test_the_traceback_of_a_foreseen_failure_is_logged_at_debug(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "services")
    report(log, "boot failed", ValueError("a wrong setting"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "DEBUG"]
    assert caplog.records[1].exc_info


def test_the_first_paragraph_of_a_message_becomes_one_line() -> None:
    assert one_line(ValueError("no such\n  architecture\n\nupgrade with pip")) == (
        "no such architecture"
    )


def test_an_error_with_a_short_message_is_prefixed_with_its_class() -> None:
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(MemoryError()) == "MemoryError"


def test_a_validation_error_is_its_field_and_message() -> None:
    with pytest.raises(ValidationError) as raised:
        Limits.model_validate({"share": 5})
    assert one_line(raised.value) == "share: Input should be less than or equal to 1"


def test_the_garbage_collector_ignores_what_exists_at_the_start() -> None:
    before = len(gc.get_objects())
    settle_memory()
    try:
        assert len(gc.get_objects()) < before / 100
    finally:
        gc.unfreeze()


def test_the_memory_of_uploads_is_reused() -> None:
    """Returning it to the kernel would cause a page fault for every 4 KiB of the next upload."""
    script = """
import resource
from services.boot import settle_memory
settle_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for measured in (False, True):
    start = faults()
    for _ in range(100):
        [bytes(256_000) for _ in range(16)]
print(faults() - start)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(answer.stdout) < 1000, answer.stderr  # Without reuse it would be about 100,000.
