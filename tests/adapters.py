"""Adapter files for tests: valid ones with an obvious effect, and knobs to break them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from shared.adapters import LINEAR_MODULES, expected_shapes, manifest_metadata
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId

LinearShapes = Mapping[str, tuple[int, int]]  # module path -> (out, in)


def make_manifest(
    base: BaseIdentity,
    policy: PolicyId,
    *,
    rank: int = 8,
    scaling: float = 2.0,
    target_modules: tuple[str, ...] = LINEAR_MODULES,
) -> AdapterManifest:
    return AdapterManifest(
        policy=policy, base=base, rank=rank, scaling=scaling, target_modules=target_modules
    )


def make_tensors(
    manifest: AdapterManifest, shapes: LinearShapes, *, seed: int, strength: float = 0.05
) -> dict[str, Tensor]:
    """Every tensor that the manifest requires: normal, standard deviation `strength`, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (strength * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        for name, shape in expected_shapes(manifest, shapes).items()
    }


def adapter_file(manifest: AdapterManifest, tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = save(dict(tensors), metadata=manifest_metadata(manifest))
    return content
