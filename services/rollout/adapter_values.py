"""Proof that an adapter's values are finite, and small enough to compute with.

    bytes that arrive ─▶ file ─▶ ValueScan ─▶ check_values (─▶ every tensor, if it must)

A NaN that a forward pass writes into the KV cache outlives its adapter: other policies read it.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np

from shared.adapters import ELEMENT_BYTES, MAX_HEADER_BYTES, AdapterHeader
from shared.errors import InvalidAdapter
from shared.schemas import AdapterManifest

# Largest element of A, B or scaling · B · A; trained adapters stay near 1.
_MAX_WEIGHT_CHANGE = 1e3
_BUFFER_BYTES = 1 << 20
_DIVERGED = (
    "the trainer's step diverged; lower its learning rate, or resume from an earlier version"
)


class ValueScan:
    """The most extreme of a file's tensors, if they have 16 bits, read while it is being written.

    Read after the last byte, they would keep the sender waiting, long where the cores are busy; so
    do those of 32 bits, which no trainer of ours sends.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._buffer = bytearray(_BUFFER_BYTES)
        # Offset of the next byte; None until the header's size is known.
        self._position: int | None = None
        self.extremes = _Extremes()

    def __enter__(self) -> ValueScan:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_on(self) -> None:
        """Look at what was written since."""
        file = self._file.fileno()
        if self._position is None and len(prefix := os.pread(file, 8, 0)) == 8:
            self._position = 8 + min(struct.unpack("<Q", prefix)[0], MAX_HEADER_BYTES)
        if self._position is None:
            return
        while num_bytes := os.preadv(file, [self._buffer], self._position) // 2 * 2:
            self._position += num_bytes
            self.extremes.take(np.frombuffer(self._buffer, "<u2", num_bytes // 2))


class _Extremes:
    """Of numbers, by their bits: the largest positive and the most negative one.

    Numbers of one sign have the order of their bits read as integers, in which Inf and NaN come
    last; negative ones are above all others when the bits are read without a sign.
    """

    def __init__(self) -> None:
        self._positive = self._negative = -1  # Negative while there is none.

    def take(self, unsigned: np.ndarray) -> None:
        size = unsigned.itemsize
        self._positive = max(self._positive, int(unsigned.view(f"<i{size}").max()))
        self._negative = max(self._negative, int(unsigned.max()) - (1 << (8 * size - 1)))

    def largest(self, dtype: str) -> float:
        """The largest absolute value of numbers of a `dtype`; NaN or Inf if there is one."""
        bits = max(self._positive, self._negative)
        if dtype == "BF16":  # A bfloat16 is the upper half of a float32.
            bits <<= 16
        width = 2 if dtype == "F16" else 4
        return float(np.array([bits], f"<u{width}").view(f"<f{width}")[0])


def check_values(file: Path, header: AdapterHeader, scan: ValueScan) -> None:
    """Refuse NaN, Inf, and finite weights so large that activations overflow to them.

    Raises InvalidAdapter, also for a file that safetensors would not read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # Refuses overlapping tensors and left-over bytes.
            pass
    except SafetensorError as error:
        raise InvalidAdapter(f"the body is not a safetensors file: {error}") from error
    dtypes = {info.dtype for info in header.tensors.values()}
    if len(dtypes) == 1 and ELEMENT_BYTES[dtype := dtypes.pop()] == 2:
        # Cheap bound first: it nearly always holds for the largest value in both A and B.
        largest = scan.extremes.largest(dtype)
        if _change(largest, largest, header.manifest) <= _MAX_WEIGHT_CHANGE:
            return
    _check_every_tensor(np.memmap(file, np.uint8, mode="r"), header)


def _check_every_tensor(content: np.ndarray, header: AdapterHeader) -> None:
    """Raise InvalidAdapter for the first tensor, or pair of A and B, with too large values."""
    largest = {}
    for name, info in header.tensors.items():
        extremes = _Extremes()
        extremes.take(content[info.start : info.end].view(f"<u{ELEMENT_BYTES[info.dtype]}"))
        largest[name] = extremes.largest(info.dtype)
        if not math.isfinite(largest[name]):
            raise InvalidAdapter(f"tensor {name!r} has NaN or Inf: {_DIVERGED}")
    for name in (name for name in largest if name.endswith(".lora_A.weight")):
        b = largest[name.replace(".lora_A.", ".lora_B.")]
        if (change := _change(largest[name], b, header.manifest)) > _MAX_WEIGHT_CHANGE:
            raise InvalidAdapter(
                f"the adapter of {name.removesuffix('.lora_A.weight')!r} may change a weight by "
                f"{change:.3g}, the limit is {_MAX_WEIGHT_CHANGE:g}: {_DIVERGED}"
            )


def _change(a: float, b: float, manifest: AdapterManifest) -> float:
    """Bound of an element of A, B and scaling · B · A, whose elements are at most a and b."""
    return max(a, b, manifest.scaling * manifest.rank * a * b)
