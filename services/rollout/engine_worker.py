"""What the engine's own processes do with adapters: vLLM mixes one of these into its worker.

vLLM's add_lora reads, scales, pins and copies an adapter on the thread that steps the model, which
stalls meanwhile. Here another thread moves the file to the device, where no running request reads
it; the stepping thread then only registers it, between two steps.

    stage(slot_id, folder) ─▶ a thread ─▶ commit(slot_id): loading, ready, or what went wrong

Methods are called by name through collective_rpc, on the stepping thread of every rank. What they
need of vLLM they find on `self`, so that only vllm_engine.py imports it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch._utils import _unflatten_dense_tensors

from shared.adapters import ADAPTER_WEIGHTS, LINEAR_MODULES, read_header
from shared.model_folder import linear_shapes, weight_files

READY, LOADING = "ready", "loading"  # Results of commit; anything else is an error message.
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Views of a slot: the whole of it, and the part that an adapter fills.
_Views = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Layout:
    """What every adapter file of a run has in common."""

    names: tuple[str, ...]  # Names of the tensors, with their path in the base, in file order.
    shapes: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Staged:
    """An adapter on its way in."""

    thread: threading.Thread
    scaling: float = 1.0
    layout: _Layout = _Layout((), ())
    tensors: list[torch.Tensor] = field(default_factory=list)  # In bfloat16, on the device.
    error: str | None = None


class _Stage:
    """Moves adapters to the device while the engine works.

    Every call of torch releases the interpreter, and next to a busy engine it takes milliseconds to
    get it back: hence few calls, each for all tensors, with their buffers kept.
    """

    device: torch.device  # This and the next field belong to the worker.
    model_runner: Any

    @cached_property
    def tandem_staged(self) -> dict[int, _Staged]:
        return {}

    @cached_property
    def tandem_stream(self) -> Any:
        """One for all: the allocator keeps the memory of each."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def tandem_stage(self, slot_id: int, folder: str) -> None:
        """Begin to load an adapter; returns at once."""
        if self.tandem_stream:  # The last step of a retired version may still read its slot.
            self.tandem_stream.wait_stream(torch.cuda.current_stream(self.device))
        thread = threading.Thread(target=self.tandem_load, args=(slot_id, Path(folder)))
        thread.daemon = True
        self.tandem_staged[slot_id] = _Staged(thread)
        thread.start()

    def tandem_load(self, slot_id: int, folder: Path) -> None:
        staged = self.tandem_staged[slot_id]
        try:
            with torch.inference_mode(), self.tandem_beside():
                self.tandem_place(slot_id, staged, folder / ADAPTER_WEIGHTS)
        except BaseException as error:  # The commit reports it; the engine keeps running.
            staged.error = f"{type(error).__name__}: {error}"

    @contextmanager
    def tandem_beside(self) -> Iterator[None]:
        """Inside, work goes to a stream of its own, which is done at the end."""
        if self.tandem_stream is None:
            yield
            return
        with torch.cuda.stream(self.tandem_stream):
            yield
        self.tandem_stream.synchronize()

    def tandem_place(self, slot_id: int, staged: _Staged, file: Path) -> None:
        """All that can be done before the adapter is known to requests."""
        raise NotImplementedError


class SlotWorker(_Stage):
    """Adapters go into vLLM's LoRA slots."""

    def tandem_commit(self, slot_id: int) -> str:
        """Make the adapter servable under `slot_id` once it is loaded."""
        if self.tandem_staged[slot_id].thread.is_alive():
            return LOADING
        staged, slots = self.tandem_staged.pop(slot_id), self._tandem_slots
        if staged.error:
            if slot_id in slots.lora_index_to_id:
                slots.lora_index_to_id[slots.lora_index_to_id.index(slot_id)] = None
            return staged.error
        slots._active_adapters[slot_id] = None
        slots._registered_adapters[slot_id] = _InItsSlot(slot_id)
        return READY

    def tandem_place(self, slot_id: int, staged: _Staged, file: Path) -> None:
        """Fill a free slot, which no running request reads."""
        slots = self._tandem_slots
        index = slots.lora_index_to_id.index(None)
        slots.lora_index_to_id[index] = slot_id
        staged.scaling, staged.layout, flat = _read(file, self.device)
        whole, parts = self._tandem_views(staged.layout)[index]
        tensors = _unflatten_dense_tensors(flat, parts)
        b = [t for name, t in zip(staged.layout.names, tensors, strict=True) if ".lora_B." in name]
        torch._foreach_mul_(b, staged.scaling)
        torch._foreach_zero_(whole)
        torch._foreach_copy_(parts, tensors)

    @cached_property
    def tandem_slot_views(self) -> dict[_Layout, list[_Views]]:
        return {}

    def _tandem_views(self, layout: _Layout) -> list[_Views]:
        """Of every slot, where such an adapter goes; made once, for the first of its run."""
        if layout not in self.tandem_slot_views:
            self.tandem_slot_views.clear()
            num_slots = len(self._tandem_slots.lora_index_to_id)
            self.tandem_slot_views[layout] = [
                self._views(layout, index) for index in range(num_slots)
            ]
        return self.tandem_slot_views[layout]

    def _views(self, layout: _Layout, index: int) -> _Views:
        slots, by_name = self._tandem_slots, {}
        for path, module in slots.modules.items():
            linears = slots.packed_modules.get(path, [path])
            sides = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
            for linear, (a, b) in zip(linears, sides, strict=True):
                by_name[f"{linear}.lora_A.weight"] = a[index, 0]  # [rank of a slot, in]
                by_name[f"{linear}.lora_B.weight"] = b[index, 0]  # [out, rank of a slot]
        if unknown := set(layout.names) - by_name.keys():
            raise LookupError(f"the engine has no LoRA layer for {min(unknown)}")
        parts = [
            by_name[name][tuple(map(slice, shape))]
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        ]
        return list(by_name.values()), parts

    @property
    def _tandem_slots(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager


@dataclass(frozen=True, slots=True)
class _InItsSlot:
    """In place of the LoRAModel from which vLLM would fill an evicted slot again: none ever is."""

    id: int


@dataclass(frozen=True, slots=True)
class _Pair:
    """What an adapter adds to one linear: scaling · B · A."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear of the engine, which may be several of the base in one."""

    module: Any
    parts: Mapping[str, int]  # Path in the base -> number of rows of the weight, in order.
    base: torch.Tensor  # The weight without an adapter.
    is_packed: bool  # Whether the engine repacked the weight for its kernels.


class MergedWorker(_Stage):
    """One adapter at a time is added to the weights themselves, and taken out again exactly."""

    @cached_property
    def tandem_linears(self) -> list[_Linear]:
        """With a copy of the base: of the engine's weights, or where it packs them (on a CPU) of
        the checkpoint's."""
        model, folder = self.model_runner.model, Path(self.model_runner.model_config.model)
        packed, shapes = model.packed_modules_mapping, linear_shapes(folder)
        linears = []
        for name, module in model.named_modules():
            prefix, _, leaf = name.rpartition(".")
            paths = [f"{prefix}.{part}" for part in packed.get(leaf, [leaf])]
            if not (paths[0] in shapes and paths[0].endswith(LINEAR_MODULES)):
                continue
            is_packed = not module.weight.numel()
            stored = [_stored_weight(folder, path) for path in paths] if is_packed else []
            base = torch.cat(stored) if is_packed else module.weight.detach().clone()
            rows = {path: shapes[path][0] for path in paths}
            linears.append(_Linear(module, rows, base, is_packed))
        known = {path for linear in linears for path in linear.parts}
        if unknown := {p for p in shapes if p.endswith(LINEAR_MODULES)} - known:
            raise LookupError(
                f"{type(model).__name__} of vLLM names {min(unknown)} otherwise: adapters cannot "
                "be merged into it; set ROLLOUT_SERVING_MODE=lora"
            )
        return linears

    @cached_property
    def tandem_merged(self) -> set[str]:
        """The paths in the base of what has an adapter in its weights now."""
        return set()

    def tandem_commit(self, slot_id: int) -> str:
        """Say when the adapter can be merged."""
        staged = self.tandem_staged[slot_id]
        if staged.thread.is_alive():
            return LOADING
        if staged.error:
            del self.tandem_staged[slot_id]
        return staged.error or READY

    def tandem_place(self, slot_id: int, staged: _Staged, file: Path) -> None:
        staged.scaling, staged.layout, flat = _read(file, self.device)
        if staged.layout not in self.tandem_shapes:
            self.tandem_shapes.clear()
            self.tandem_shapes[staged.layout] = [
                torch.empty(shape, device="meta") for shape in staged.layout.shapes
            ]
        staged.tensors = list(_unflatten_dense_tensors(flat, self.tandem_shapes[staged.layout]))

    @cached_property
    def tandem_shapes(self) -> dict[_Layout, list[torch.Tensor]]:
        """Tensors of the shapes of the adapters of a run."""
        return {}

    def tandem_drop(self, slot_id: int) -> None:
        del self.tandem_staged[slot_id]

    def tandem_merge(self, slot_id: int | None) -> None:
        """Set the weights to the base with this adapter merged in, or to the base for None.

        Nothing may run meanwhile. base + scaling · B · A is rounded to bfloat16 once.
        """
        pairs: dict[str, _Pair] = {}
        scaling = 1.0
        if slot_id is not None:
            staged = self.tandem_staged[slot_id]
            scaling, pairs = staged.scaling, _pairs(staged)
        self.tandem_merged.update(pairs)
        with torch.inference_mode():
            for linear in self.tandem_linears:
                if not linear.parts.keys().isdisjoint(self.tandem_merged):
                    _write(linear, pairs, scaling)
        self.tandem_merged.intersection_update(pairs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _write(linear: _Linear, pairs: Mapping[str, _Pair], scaling: float) -> None:
    weight = torch.empty_like(linear.base) if linear.is_packed else linear.module.weight
    rows = list(linear.parts.values())
    parts = zip(linear.parts, linear.base.split(rows), weight.split(rows), strict=True)
    for path, base, target in parts:
        if pair := pairs.get(path):
            torch.addmm(base, pair.b, pair.a, alpha=scaling, out=target)
        else:
            target.copy_(base)
    if linear.is_packed:
        linear.module.weight = torch.nn.Parameter(weight, requires_grad=False)
        linear.module.quant_method.process_weights_after_loading(linear.module)


def _stored_weight(folder: Path, path: str) -> torch.Tensor:
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            if f"{path}.weight" in tensors.keys():  # noqa: SIM118 (not a dict)
                weight: torch.Tensor = tensors.get_tensor(f"{path}.weight")
                return weight.to(torch.bfloat16)
    raise LookupError(f"{folder} has no weight of {path}")


def _pairs(staged: _Staged) -> dict[str, _Pair]:
    tensors = dict(zip(staged.layout.names, staged.tensors, strict=True))
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {
        path: _Pair(tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"])
        for path in paths
    }


def _read(file: Path, device: torch.device) -> tuple[float, _Layout, torch.Tensor]:
    """Scaling, layout and flat bfloat16 tensors of a verified adapter file, in one copy."""
    header, num_bytes = read_header(file), file.stat().st_size
    blob = torch.from_file(str(file), shared=False, size=num_bytes, dtype=torch.uint8)
    tensors = sorted(header.tensors.items(), key=lambda item: item[1].start)
    blob = blob[tensors[0][1].start :].to(device)
    if {info.dtype for _, info in tensors} == {"BF16"}:
        flat = blob.view(torch.bfloat16)
    else:
        sizes = [info.end - info.start for _, info in tensors]
        parts = zip(tensors, blob.split(sizes), strict=True)
        flat = torch.cat([part.view(_DTYPES[i.dtype]).to(torch.bfloat16) for (_, i), part in parts])
    layout = _Layout(
        tuple(name.removeprefix("base_model.model.") for name, _ in tensors),
        tuple(info.shape for _, info in tensors),
    )
    return header.manifest.scaling, layout, flat
