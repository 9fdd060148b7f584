"""Hugging Face checkpoint folders: what they hold, without loading them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, sorted by name. ValueError when none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model_dir} has no *.safetensors: give a Hugging Face checkpoint in that format"
        )
    return files


def linear_shapes(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every two-dimensional weight inside the decoder layers."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in weight_files(model_dir):
        for name, entry in _header(path).items():
            if name.endswith(".weight") and ".layers." in name and len(entry["shape"]) == 2:
                shapes[name.removesuffix(".weight")] = (entry["shape"][0], entry["shape"][1])
    return shapes


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return header


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One digest over the contents of the files, in the given order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
