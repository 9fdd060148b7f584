"""Where a base comes from and how it is quantized: trainer and replica must do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.schemas import QuantizationRecipe

# Every file whose content enters the identity of a base, so that it does not depend on what
# another tool has left in the hub's cache.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_checkpoint(model: str) -> Path:
    """The folder of a checkpoint: a local one, or a hub id, downloaded unless HF_HUB_OFFLINE."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.startswith((".", "/", "~")):
        raise ValueError(f"the model folder {model} does not exist: name a checkpoint or a hub id")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=_HUB_FILES))


def quantized_load_options(source: Path, device: str) -> dict[str, Any]:
    """Arguments of `AutoModelForCausalLM.from_pretrained` for the 4-bit base of a QLoRA policy.

    A checkpoint that is already 4-bit keeps its stored quantization state.
    """
    import torch
    from transformers import BitsAndBytesConfig

    recipe = QuantizationRecipe()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}}
    if "quantization_config" not in json.loads((source / "config.json").read_text()):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quant_type,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(recipe.skipped_modules),
        )
    return options
