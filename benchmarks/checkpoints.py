"""Checkpoints and adapters with random weights in the shapes of real models, to measure speed only.

Weights are normal with standard deviation 0.02, so that logits have an ordinary size. The tokenizer
is the demo's, whose few characters are the first ids of every vocabulary.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.adapters import LINEAR_MODULES, expected_shapes, manifest_metadata
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId, QuantizationRecipe

FIRST_ORDINARY_TOKEN = 3  # lower ids are special tokens
_SHARED_MEMORY = Path("/dev/shm")
_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool


# Shapes of Qwen3, except the first two: one small enough for tests, 0.6B with a small vocabulary.
SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(256, 768, 4, 4, 2, 64, 2048, False),
    "mid": Shape(1024, 3072, 28, 16, 8, 128, 2048, False),
    "1.7b": Shape(2048, 6144, 28, 16, 8, 128, 151936, True),
    "4b": Shape(2560, 9728, 36, 32, 8, 128, 151936, True),
    "8b": Shape(4096, 12288, 36, 32, 8, 128, 151936, False),
}


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder, in shared memory if the machine has any; removed at the end."""
    memory = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def write_checkpoint(
    shape: str, folder: Path, *, device: str, recipe: QuantizationRecipe | None = None
) -> None:
    """Write a Qwen3 with random bfloat16 weights, drawn tensor by tensor on `device`; a `recipe`
    also quantizes its linears there."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from examples.demo.model import make_tokenizer

    config = _config(SHAPES[shape], recipe)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in empty.named_parameters():
        if parameter.ndim == 1:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        weight = torch.randn(parameter.shape, generator=generator, device=device) * _SPREAD
        weight = weight.to(torch.bfloat16)
        if recipe and name.split(".")[-2] in LINEAR_MODULES:
            weight, state = _quantized(weight, recipe)
            tensors.update({f"{name}.{key}": value for key, value in state.items()})
        tensors[name] = weight.cpu()
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes need the memory
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def _quantized(weight: Any, recipe: QuantizationRecipe) -> tuple[Any, dict[str, Any]]:
    """The packed weight, and the other tensors that a 4-bit checkpoint stores for it."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight,
        blocksize=recipe.block_size,
        compress_statistics=recipe.double_quant,
        quant_type=recipe.quant_type,
    )
    return packed, {key: value.cpu() for key, value in state.as_dict(packed=True).items()}


def _config(shape: Shape, recipe: QuantizationRecipe | None) -> Any:
    import torch
    from transformers import BitsAndBytesConfig, Qwen3Config

    quantization = {}
    if recipe:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quant_type,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(recipe.skipped_modules),
        ).to_dict()
    return Qwen3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
        **quantization,
    )


def random_adapter(
    base: BaseIdentity, linear_shapes: Mapping[str, tuple[int, int]], policy: PolicyId, *, rank: int
) -> tuple[AdapterManifest, bytes]:
    """The manifest and the content of an adapter for all linears; a small B keeps it near the base.

    `linear_shapes`: module path -> (out, in), as in shared/model_folder.py.
    """
    import torch
    from safetensors.torch import save

    manifest = AdapterManifest(
        policy=policy, base=base, rank=rank, scaling=1.0, target_modules=LINEAR_MODULES
    )
    generator = torch.Generator().manual_seed(policy.version)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.01).to(torch.bfloat16)
        for name, shape in expected_shapes(manifest, linear_shapes).items()
    }
    return manifest, save(tensors, manifest_metadata(manifest))
