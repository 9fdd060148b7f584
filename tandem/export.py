"""A policy as files that other tools load: an adapter for PEFT, or one merged into 16-bit weights.

    folder of a run, of a checkpoint or of an adapter ─▶ read_policy ─┐
    trainer: GET /policy, /policy/adapters/{version} ─────────────────┴▶ TrainedPolicy
                                  PEFT's folder ◀── write_peft ◀── │ ──▶ write_merged ──▶ checkpoint

The policy computes W x + scaling · B (A x), with the W that was trained with (4-bit weights, back
in bf16), A and B in bf16. The merged weights are W + scaling · B A in float32, rounded once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load
from torch import Tensor

from services.base_model import resolve_checkpoint, write_dense
from services.machine import check_memory, memory, size, weight_bytes
from services.trainer.durable import new_folder
from services.trainer.policy.adapter import write_adapter
from services.trainer.run.checkpoints import saved_adapter
from shared.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_header
from shared.errors import InvalidAdapter
from shared.model_folder import base_identity, recipe_digest
from shared.schemas import AdapterManifest, BaseIdentity, QuantizationRecipe

ExportedBase = Literal["exact", "original"]
_LIBRARY_BYTES = 256 << 20  # Private memory of torch, transformers and bitsandbytes.


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    manifest: AdapterManifest
    adapter: bytes  # The adapter file.
    model: str  # Checkpoint folder or hub id of the base.


# --- read ---------------------------------------------------------------------------------------


def read_policy(folder: Path) -> TrainedPolicy:
    """The newest policy of a run's folder, or that of one checkpoint or adapter folder.

    Raises ValueError for a folder without one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name that of a run, as runs/<run_id>")
    if (folder / ADAPTER_WEIGHTS).is_file():
        candidates = [folder]
    else:
        candidates = [f for f in _adapter_folders(folder) if (f / ADAPTER_WEIGHTS).is_file()]
    if not candidates:
        raise ValueError(
            f"{folder} has neither adapter/ nor checkpoints/ with an adapter in it: name the "
            "folder of a run that has saved one, as runs/<run_id>"
        )
    newest = max(candidates, key=lambda f: _manifest(f).policy.age_key)
    adapter = (newest / ADAPTER_WEIGHTS).read_bytes()
    if (newest / "state.json").is_file():  # A checkpoint can tell whether it is whole.
        adapter = saved_adapter(newest)
    return TrainedPolicy(_manifest(newest), adapter, _model_name(newest))


def _adapter_folders(run_dir: Path) -> Iterator[Path]:
    yield run_dir / "adapter"
    yield from (run_dir / "checkpoints").glob("step-*[0-9]")


def _manifest(folder: Path) -> AdapterManifest:
    try:
        return read_header(folder / ADAPTER_WEIGHTS).manifest
    except InvalidAdapter as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {error.detail}") from error


def _model_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no usable {ADAPTER_CONFIG}: restore it from a copy"
        ) from error


# --- write --------------------------------------------------------------------------------------


def refuse_existing(output: Path) -> None:
    """Raise ValueError where something would be overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: name another folder, or remove it")


def write_peft(policy: TrainedPolicy, output: Path) -> None:
    """The adapter as `PeftModel.from_pretrained` loads it, on disk whole or not at all."""
    refuse_existing(output)
    with new_folder(output) as folder:
        write_adapter(folder, policy.adapter, policy.manifest, policy.model)


def write_merged(
    policy: TrainedPolicy, output: Path, *, base: ExportedBase = "exact", device: str = "cpu"
) -> None:
    """A bf16 checkpoint of the policy, on disk whole or not at all.

    `exact` is the base that was trained with, `original` the 16-bit weights that it was quantized
    from. Raises ValueError when the model is another one than was trained, MemoryError or OSError
    when there is no room.
    """
    refuse_existing(output)
    source = resolve_checkpoint(policy.model)
    _refuse_other_base(policy, source)
    in_4bit = base == "exact" and policy.manifest.base.recipe is not None
    _check_room(policy, source, output.absolute().parent, in_4bit=in_4bit)
    deltas = _deltas(policy)

    def merge(module: str, weight: Tensor) -> Tensor:
        if (delta := deltas.pop(module, None)) is None:
            return weight
        return (weight.float() + delta().to(weight.device)).to(torch.bfloat16)

    with new_folder(output) as folder:
        write_dense(source, folder, device, in_4bit=in_4bit, change=merge)
        if deltas:
            raise ValueError(
                f"the adapter changes {next(iter(deltas))}, which is no linear of {policy.model}: "
                "this transformers names the modules differently from the one that trained it"
            )


def _deltas(policy: TrainedPolicy) -> dict[str, Callable[[], Tensor]]:
    """Module path -> scaling · B A [out, in] in float32, computed on demand."""
    tensors = load(policy.adapter)

    def delta(module: str) -> Tensor:
        a, b = (
            tensors[f"base_model.model.{module}.lora_{part}.weight"].bfloat16().float()
            for part in "AB"
        )
        product: Tensor = policy.manifest.scaling * (b @ a)
        return product

    prefix, suffix = "base_model.model.", ".lora_A.weight"
    modules = [n.removeprefix(prefix).removesuffix(suffix) for n in tensors if n.endswith(suffix)]
    return {module: lambda module=module: delta(module) for module in modules}  # type: ignore[misc]


def _refuse_other_base(policy: TrainedPolicy, source: Path) -> None:
    trained = policy.manifest.base
    recipe = QuantizationRecipe()
    if trained.recipe not in (None, recipe_digest(recipe)):
        raise ValueError(
            f"policy {policy.manifest.policy} was trained on a base that was quantized in another "
            "way than this version does: export it with the version that trained it"
        )
    found = base_identity(source, recipe if trained.recipe else None)
    others = [n for n in BaseIdentity.model_fields if getattr(found, n) != getattr(trained, n)]
    if others:
        raise ValueError(
            f"{policy.model} is not what policy {policy.manifest.policy} was trained on, its "
            f"{' and '.join(others).replace('_', ' ')} differ: name that checkpoint with --model"
        )


def _check_room(policy: TrainedPolicy, source: Path, folder: Path, *, in_4bit: bool) -> None:
    weights = weight_bytes(source)
    parts = {"bf16 weights": weights.bf16, "torch": _LIBRARY_BYTES}
    if in_4bit:
        parts["4-bit weights"] = weights.nf4
    check_memory(f"merging into {policy.model}", parts, memory())
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < weights.bf16:
        raise OSError(
            f"{existing} has {size(free)} free, the merged checkpoint of {policy.model} takes "
            f"{size(weights.bf16)}: free space there, or export to another disk"
        )
