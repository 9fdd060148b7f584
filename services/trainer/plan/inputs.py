"""What is planned for: the shape of a model, from its config.json, and the memory of a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.base_model import resolve_checkpoint
from services.boot import one_line
from services.machine import WeightBytes, weight_bytes
from shared.schemas import QuantizationRecipe

GIB = 1 << 30
# Decoders of full attention and gated MLPs, whose linears are LINEAR_MODULES and for which the
# trainer has fused kernels: what others allocate was not looked at.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_SCALES_PER_GROUP = 256  # Scales that share a float32 in bitsandbytes' double quantization.
# The GiB that torch's `total_memory` has, the least of what was seen, and whether it converts to
# FP8 (compute capability 8.9).
_GPUS: Mapping[str, tuple[float, bool]] = {
    "A10 24GB": (21.9, False),
    "A10G 24GB": (21.9, False),
    "A100 40GB": (39.3, False),
    "A100 80GB": (79.1, False),
    "A6000 48GB": (47.4, False),
    "B200 180GB": (178.3, True),
    "H100 80GB": (79.1, True),
    "H200 141GB": (139.8, True),
    "L4 24GB": (22.0, True),
    "L40 48GB": (44.3, True),
    "L40S 48GB": (44.3, True),
    "RTX 3090 24GB": (23.6, False),
    "RTX 4090 24GB": (23.5, True),
    "RTX 5090 32GB": (31.3, True),
}


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool  # Whether the head shares the embeddings' weight.
    max_context: int
    files: WeightBytes | None  # Sizes of the 16-bit weights, if they are present.

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each linear of a layer."""
        attention = (self.query_width, self.hidden), *[(self.key_width, self.hidden)] * 2
        mlp = *[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)
        return (*attention, (self.hidden, self.query_width), *mlp)

    @property
    def num_linear(self) -> int:
        """Weights of the linears of all layers."""
        return self.layers * sum(num_out * num_in for num_out, num_in in self.linears)

    @property
    def largest_linear(self) -> int:
        return max(num_out * num_in for num_out, num_in in self.linears)

    def num_lora(self, rank: int) -> int:
        """Weights of an adapter of all linears."""
        return rank * self.layers * sum(num_out + num_in for num_out, num_in in self.linears)

    @property
    def weights(self) -> WeightBytes:
        """Of the files; without files, of the shape, less norms and biases (a few thousandths)."""
        if self.files:
            return self.files
        rest = (1 if self.is_tied else 2) * self.vocabulary * self.hidden
        bf16, nf4 = 2 * (self.num_linear + rest), self.num_linear // 2 + 2 * rest
        return WeightBytes(stored=bf16, bf16=bf16, nf4=nf4, linears=2 * self.num_linear)

    @property
    def nf4_bytes(self) -> int:
        """Of the trainer's base with its scales: 8 bits per block, a float32 per group of them."""
        blocks = self.num_linear / QuantizationRecipe().block_size
        return self.weights.nf4 + round(blocks + 4 * blocks / _SCALES_PER_GROUP)


def read_model(model: str) -> Model:
    """From a checkpoint folder, a hub id or a config.json alone.

    Raises ValueError for one that the planner does not know, OSError when the hub does not answer.
    """
    file, folder = Path(model).expanduser(), None
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    if not file.is_file():
        folder = resolve_checkpoint(model, "--model")
        file, name = folder / "config.json", Path(model).name or folder.name
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"--model {model} is no config.json ({one_line(error)}): name one, a checkpoint "
            "folder, or a hub id"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"--model {model} is no config.json: it holds no settings")
    _refuse_unknown(model, config)

    def count(field: str, default: int | None = None) -> int:
        value = config.get(field) or default
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"--model {model}: config.json has no {field}, or no number of it")
        return value

    hidden, heads = count("hidden_size"), count("num_attention_heads")
    # The headers of a 4-bit checkpoint say less than its shape.
    has_16_bits = folder is not None and "quantization_config" not in config
    return Model(
        name=name,
        hidden=hidden,
        intermediate=count("intermediate_size"),
        layers=count("num_hidden_layers"),
        heads=heads,
        kv_heads=count("num_key_value_heads", heads),
        head_dim=count("head_dim", hidden // heads),
        vocabulary=count("vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings")),
        max_context=count("max_position_embeddings"),
        files=weight_bytes(folder) if folder and has_16_bits else None,
    )


def _refuse_unknown(model: str, config: Mapping[str, Any]) -> None:
    kind, layers = config.get("model_type"), set(config.get("layer_types") or ())
    if kind not in _MODEL_TYPES:
        raise ValueError(
            f"--model {model} is of model_type {kind!r}, whose memory was not looked at: the "
            f"planner knows {', '.join(_MODEL_TYPES)}"
        )
    has_window = config.get("sliding_window") and config.get("use_sliding_window", True)
    if layers - {"full_attention"} or (not layers and has_window):
        raise ValueError(
            f"--model {model} has sliding windows, whose memory was not looked at: the planner "
            "knows full attention alone"
        )


# --- the GPU ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    usable_bytes: int
    has_fp8: bool | None  # None when unknown.


def find_gpu(text: str) -> Gpu:
    """By its name, as in "H100" or "NVIDIA A100-SXM4-80GB", or its GiB. Raises ValueError."""
    if size := re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?(?:gi?b)?", text.strip().lower()):
        if not float(size[1]):
            raise ValueError("--gpu 0: name a GPU, or its GiB")
        return Gpu(f"a GPU of {float(size[1]):g} GiB", int(float(size[1]) * GIB), None)
    words = {
        word.removeprefix("rtx").removesuffix("gb")
        for word in re.findall("[a-z0-9]+", text.lower())
    }
    named = [name for name in _GPUS if name.split()[-2].lower() in words]
    if len(named) > 1:
        named = [name for name in named if name.split()[-1].removesuffix("GB") in words] or named
    if len(named) > 1:
        raise ValueError(f"--gpu {text} may be {' or '.join(named)}: say which")
    if not named:
        raise ValueError(
            f"--gpu {text} is not known: give its GiB, as `nvidia-smi` has them, or one of "
            f"{', '.join(_GPUS)}"
        )
    (name,) = named
    gibibytes, has_fp8 = _GPUS[name]
    return Gpu(name, int(gibibytes * GIB), has_fp8)
