"""An adapter in PEFT's format, from a folder to the LoRA tensors of a policy and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.trainer.durable import write_file
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.run_config import LoraConfig
from shared.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config

_PER_MODULE = ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save")


def is_lora_folder(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists()


def write_lora(folder: Path, adapter: PublishedAdapter, base_model: str) -> None:
    """Write the files, each whole or not at all; other files in the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(peft_config(adapter.manifest, base_model), indent=2).encode()
    write_file(folder / ADAPTER_WEIGHTS, adapter.content)
    write_file(folder / ADAPTER_CONFIG, config)


def read_lora_config(folder: Path) -> tuple[LoraConfig, str]:
    """Rank, factor and modules of an adapter, and the base it was made for. Raises ValueError."""
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {ADAPTER_CONFIG}: name a folder that save_lora, PEFT or Unsloth wrote"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} is not JSON ({error}): save it again"
        ) from error
    if found := [name for name in _PER_MODULE if config.get(name)]:
        raise ValueError(
            f"{folder} is an adapter with {found[0]}, which replicas do not serve: train one "
            "without it"
        )
    targets = config.get("target_modules")
    if config.get("peft_type") != "LORA" or not isinstance(targets, list):
        raise ValueError(
            f"{folder} is no LoRA adapter that names its target_modules: a replica can serve no "
            "other"
        )
    lora = LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        target_modules=tuple(targets),
    )
    return lora, str(config.get("base_model_name_or_path") or "")


def read_lora(
    folder: Path, shapes: Mapping[str, torch.Size], current: LoraConfig
) -> dict[str, Tensor]:
    """The adapter in the shapes and with the factor of `current`, with the same effect.

    A smaller rank is filled with 0, as is a module that it lacks. Raises ValueError for one that
    does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lora, _ = read_lora_config(folder)
    if lora.rank > current.rank:
        raise ValueError(
            f"the adapter in {folder} has rank {lora.rank}, this model's LoRA has {current.rank}: "
            f"load the model with max_lora_rank={lora.rank} or more"
        )
    try:
        found = load_file(folder / ADAPTER_WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}): save the adapter again"
        ) from error
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in found.items():
        if name not in tensors or not _fits(tensor, tensors[name], lora.rank, name):
            raise ValueError(
                f"the adapter in {folder} has a tensor {name} of shape {list(tensor.shape)}, which "
                "this model's LoRA does not have: was it made for this base, and are its modules "
                "in target_modules?"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"the adapter in {folder} is not finite in {name}: save it again")
        factor = lora.scaling / current.scaling if name.endswith("lora_B.weight") else 1.0
        rows, columns = tensor.shape
        tensors[name][:rows, :columns] = tensor.float() * factor
    if not found:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} has no tensor: save the adapter again")
    return tensors


def lora_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Equal for tensors that are equal in bfloat16, which is what replicas get."""
    sha256 = hashlib.sha256()
    for tensor in tensors.values():
        sha256.update(tensor.to(torch.bfloat16).view(torch.uint8).numpy().data)
    return sha256.digest()


def _fits(tensor: Tensor, ours: Tensor, rank: int, name: str) -> bool:
    """Whether shapes are equal except for the rank."""
    if name.endswith("lora_A.weight"):
        return tensor.shape == (rank, ours.shape[1])
    return tensor.shape == (ours.shape[0], rank)
