"""The inputs of a model's layers, in host memory between its forward and its backward pass.

    forward:   layer's input ─▶ (another stream) ─▶ pinned host memory
    backward:  the layer that is next ◀─ device ◀─ host, copied while the one before it computes

With gradient checkpointing they are all that a forward pass keeps, and they grow with its tokens
times the number of layers. The device then holds those of one or two layers.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_BYTES = 1 << 20  # Smaller tensors are not worth a copy.
_MAX_LEAVING = 2  # Copies to host memory in flight, at most.


@dataclass(slots=True, eq=False)
class _Parked:
    host: Tensor
    device: torch.device
    earlier: _Parked | None  # The input parked just before, which the backward pass needs next.
    returned: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class _Garage:
    """Of one forward pass.

    The program waits for copies of an earlier layer, so that it is never far ahead of the device:
    memory that another stream uses is free again once that has happened, and a program that runs
    ahead would have torch take new memory for every layer instead.
    """

    def __init__(self, width: int, min_bytes: int) -> None:
        self._width = width
        self._min_bytes = min_bytes
        self._last: _Parked | None = None
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[torch.cuda.Event] = deque()

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        is_state = tensor.is_floating_point() and tensor.dim() > 1
        if not is_state or tensor.shape[-1] != self._width or tensor.nbytes < self._min_bytes:
            return tensor
        with self._beside(tensor.device):
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
            if self._stream:
                # Its memory must not be reused before the copy is done.
                tensor.record_stream(self._stream)
                self._leaving.append(self._stream.record_event())
        if len(self._leaving) > _MAX_LEAVING:
            self._leaving.popleft().synchronize()
        self._last = _Parked(host, tensor.device, self._last)
        return self._last

    def unpack(self, packed: Tensor | _Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = self._returned(packed)
        packed.returned = None
        if packed.arrived:
            packed.arrived.synchronize()
            tensor.record_stream(torch.cuda.current_stream(packed.device))
        if packed.earlier:
            self._returned(packed.earlier)
        return tensor

    def _returned(self, packed: _Parked) -> Tensor:
        if packed.returned is None:
            with self._beside(packed.device):
                packed.returned = packed.host.to(packed.device, non_blocking=True)
                if self._stream:
                    packed.arrived = self._stream.record_event()
        return packed.returned

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """Inside, work is on a stream of its own, after all that was begun before."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield


@contextlib.contextmanager
def inputs_on_host(width: int, *, min_bytes: int = _MIN_BYTES) -> Iterator[None]:
    """Inside, what a forward pass saves of states [..., `width`] is kept in host memory."""
    garage = _Garage(width, min_bytes)
    with torch.autograd.graph.saved_tensors_hooks(garage.pack, garage.unpack):
        yield
