"""Who holds which base: digests of a Hugging Face checkpoint folder, equal on both services.

The weights digest covers the tensors and the architecture (config.json without what a re-save
changes); tokenizer and chat template have digests of their own, because a difference there shifts
every prompt without any error.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shared.checkpoints import sha256_of_files, weight_files
from shared.schemas import BaseIdentity, QuantizationRecipe

_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def recipe_digest(recipe: QuantizationRecipe) -> str:
    return _sha256_of_json(recipe.model_dump(mode="json"))


def base_identity(model_dir: Path, recipe: QuantizationRecipe | None) -> BaseIdentity:
    """The identity of the base in `model_dir`, computed with `recipe` (None: as it is, 16-bit).

    Reads every byte of the weights: about a second per 1.5 GB.
    """
    config = json.loads((model_dir / "config.json").read_text())
    architecture = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
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


def identity_difference(ours: BaseIdentity, theirs: BaseIdentity) -> str | None:
    """One phrase that names what differs, or None."""
    for field in BaseIdentity.model_fields:
        a, b = getattr(ours, field), getattr(theirs, field)
        if a != b:
            return f"{field} {_short(a)} here, {_short(b)} there"
    return None


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
