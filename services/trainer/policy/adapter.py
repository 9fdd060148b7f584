"""A published version of the policy: its adapter file, and the folder that PEFT loads.

Needs no torch: the fleet sends adapters that it never computes with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from shared.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config
from shared.schemas import AdapterManifest, PolicyId


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    manifest: AdapterManifest
    content: bytes | memoryview  # The adapter file.
    content_digest: str  # RFC 9530
    probe_logprobs: tuple[float, ...] = ()  # Logprobs of the run's probe; empty without one.

    @property
    def policy(self) -> PolicyId:
        return self.manifest.policy


def write_adapter(
    folder: Path, content: bytes | memoryview, manifest: AdapterManifest, source: str
) -> dict[str, str]:
    """Write an adapter file as `PeftModel.from_pretrained` loads it; file name -> SHA-256."""
    config = json.dumps(peft_config(manifest, source), indent=2).encode()
    return {
        ADAPTER_WEIGHTS: write_digested(folder / ADAPTER_WEIGHTS, content),
        ADAPTER_CONFIG: write_digested(folder / ADAPTER_CONFIG, config),
    }


def write_digested(path: Path, content: bytes | memoryview) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
