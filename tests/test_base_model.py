"""Where a base comes from."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from services.base_model import resolve_checkpoint

PUBLISHED = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
]


def test_every_file_of_a_bases_identity_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would depend on what another tool has left in the hub's cache."""
    downloaded: list[str] = []

    def snapshot_download(_: str, *, allow_patterns: list[str]) -> str:
        downloaded.extend(filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns))
        return "snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("owner/model") == Path("snapshot")
    assert set(PUBLISHED) - set(downloaded) == {"README.md", "pytorch_model.bin"}
