"""Files and folders that are on disk whole or not at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_WRITING = ".writing"


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Put `content` at `path` in one step."""
    writing = path.with_name(path.name + _WRITING)
    with writing.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    writing.rename(path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which appears at `path` when the block ends.

    An existing folder is replaced with `replace`, otherwise OSError is raised. When the block
    raises, `path` is unchanged.
    """
    writing = path.with_name(path.name + _WRITING)
    _remove(writing)
    writing.mkdir(parents=True)
    try:
        yield writing
        for file in writing.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        _sync_folder(writing)
        if replace:
            _remove(path)
        writing.rename(path)
    except BaseException:
        _remove(writing)
        raise
    _sync_folder(path.parent)


def remove_unfinished(parent: Path) -> None:
    """Remove what a killed process left in `parent` from within `new_folder`."""
    for writing in parent.glob(f"*{_WRITING}"):
        _remove(writing)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
