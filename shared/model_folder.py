"""The shapes and the identity of a Hugging Face checkpoint folder, without loading its weights.

The weights digest covers the tensors and the architecture: config.json without the keys that saving
it again may change. The tokenizer and the chat template have separate digests because a difference
there changes every prompt without raising an error.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.schemas import BaseIdentity, QuantizationRecipe

_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, sorted by name. Raises ValueError if none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model_dir} has no *.safetensors files: name a Hugging Face checkpoint that has them"
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


# --- identity -----------------------------------------------------------------------------------


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def recipe_digest(recipe: QuantizationRecipe) -> str:
    return _sha256_of_json(recipe.model_dump(mode="json"))


def base_identity(model_dir: Path, recipe: QuantizationRecipe | None) -> BaseIdentity:
    """The identity of the base in `model_dir`, quantized with `recipe` (None: the 16-bit weights).

    Reads every byte of the weights, which takes about a second per 1.5 GB.
    """
    config = json.loads((model_dir / "config.json").read_text())
    architecture = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    generation = model_dir / "generation_config.json"
    if generation.exists():  # vLLM also stops at the end tokens listed there.
        architecture["generation_eos"] = json.loads(generation.read_text()).get("eos_token_id")
    tensors = sha256_of_files(weight_files(model_dir))
    tokenizer_files = [model_dir / name for name in _TOKENIZER_FILES]
    return BaseIdentity(
        weights=_sha256_of_json([architecture, tensors]),
        recipe=recipe_digest(recipe) if recipe else None,
        tokenizer=sha256_of_files(path for path in tokenizer_files if path.exists()),
        chat_template=_chat_template_digest(model_dir),
    )


def _chat_template_digest(model_dir: Path) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.exists():
        return _sha256_of_json(file.read_text())
    config = model_dir / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.exists() else None
    return _sha256_of_json(template) if template else None


def identity_difference(replica: BaseIdentity, trainer: BaseIdentity) -> str | None:
    """A phrase that names the difference, or None if the replica may serve the trainer's policy.

    A replica with the original 16-bit weights (no recipe) may serve a 4-bit trainer's policy: its
    operator chose the larger logprob gap.
    """
    for field in BaseIdentity.model_fields:
        ours, theirs = getattr(replica, field), getattr(trainer, field)
        if ours != theirs and not (field == "recipe" and ours is None):
            return f"{field} {_short(ours)} on the replica, {_short(theirs)} on the trainer"
    return None


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
