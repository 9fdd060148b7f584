"""How a base is found, and which errors describe a missing or incomplete one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
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


def test_every_file_of_a_bases_identity_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    """Otherwise the identity would depend on what another tool left in the hub's cache."""
    downloaded: list[str] = []

    def snapshot_download(_: str, *, allow_patterns: list[str], **_wanted: object) -> str:
        downloaded.extend(filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns))
        return str(tiny_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("owner/model") == tiny_checkpoint
    assert set(PUBLISHED) - set(downloaded) == {"README.md", "pytorch_model.bin"}


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type":')


def name_a_second_shard(folder: Path) -> None:
    files = {"a": "model.safetensors", "b": "model-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "no such folder; name a checkpoint folder or a hub id"),
        (remove("config.json"), "the folder has no config.json"),
        (cut_config, "config.json cannot be read"),
        (remove("model.safetensors"), "the folder has no \\*.safetensors"),
        (
            name_a_second_shard,
            "1 of its 2 weight files are missing, for example model-00002.safetensors",
        ),
        (remove("tokenizer.json", "tokenizer_config.json"), "the folder has no tokenizer"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_in_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(ValueError, match=f"^ROLLOUT_MODEL {folder}: {sentence}") as raised:
        resolve_checkpoint(str(folder), "ROLLOUT_MODEL")
    assert "\n" not in str(raised.value)


def test_an_empty_folder_is_reported_as_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder is empty"):
        resolve_checkpoint(str(tmp_path))


def answered(cls: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", "http://hub/api/models/owner/model")
    return cls("two\n\nparagraphs", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (answered(RepositoryNotFoundError, 404), ValueError, "neither a local folder nor a model"),
        (answered(GatedRepoError, 401), ValueError, "is gated; accept .* and set HF_TOKEN"),
        (answered(HfHubHTTPError, 401), ValueError, "rejected HF_TOKEN"),
        (answered(HfHubHTTPError, 429), ConnectionError, "two$"),
        (LocalEntryNotFoundError("no"), ConnectionError, "does not answer"),
        (OSError(30, "Read-only file system"), ValueError, "HF_HOME=.* is not writable"),
        (OSError(28, "No space left on device"), ValueError, "HF_HOME=.* is full"),
    ],
)
def test_a_failed_download_is_explained_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception], sentence: str
) -> None:
    def snapshot_download(_: str, *, allow_patterns: list[str], **_wanted: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(raised, match=f"^TRAINER_MODEL owner/model: .*{sentence}") as caught:
        resolve_checkpoint("owner/model", "TRAINER_MODEL")
    assert "\n" not in str(caught.value)


def test_a_gated_model_with_a_token_asks_to_request_access(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(_: str, *, allow_patterns: list[str], **_wanted: object) -> str:
        raise answered(GatedRepoError, 403)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    with pytest.raises(ValueError, match=r"request access for the HF_TOKEN account"):
        resolve_checkpoint("owner/model")


def test_a_revision_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(_: str, **wanted: object) -> str:
        asked.update(wanted)
        raise answered(RevisionNotFoundError, 404)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"owner/model has no revision 'v9'; name a branch, tag"):
        resolve_checkpoint("owner/model", revision="v9", token="hf_own")
    assert (asked["revision"], asked["token"]) == ("v9", "hf_own")


def test_offline_a_model_that_is_not_cached_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"not in the cache .* HF_HUB_OFFLINE forbids"):
        resolve_checkpoint("owner/model")
