"""The adapter file: one self-describing safetensors file, verified before an engine loads it.

    trainer: tensors + manifest ─▶ bytes ──HTTP──▶ file ─▶ read_header ─▶ check_tensors ─▶ engine

The manifest is part of the safetensors metadata, so the digest, the stored file and
`GET /policies/{version}` all refer to the same bytes. Tensors have the names of PEFT and vLLM:
`base_model.model.<module path>.lora_A.weight` of shape [rank, in], `.lora_B.weight` of [out, rank].
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.errors import DigestMismatch, InvalidAdapter, InvalidRequest, shown
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId

MAX_HEADER_BYTES = 1 << 20  # 392 tensors take 50 KB; safetensors itself allows 100 MB.
_MAX_CONTAINERS = 30_000  # JSON objects and lists in a header; a tensor has three.
_MAX_MANIFEST_BYTES = 1 << 14  # One has 700 bytes.
_MAX_DIMENSIONS = 8
_MAX_INT64 = 2**63 - 1
MANIFEST_KEY = "tandem_manifest"
# File names of an adapter folder in PEFT and vLLM.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # BF16, F16 or F32, as safetensors names them.
    shape: tuple[int, ...]
    start: int  # First byte of the tensor in the file.
    end: int  # First byte after it.


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    manifest: AdapterManifest
    tensors: Mapping[str, TensorInfo]


# --- digest (RFC 9530) --------------------------------------------------------------------------


def content_digest(sha256: bytes) -> str:
    """The value of the `Content-Digest` header for a SHA-256."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


def parse_content_digest(header: str | None) -> str:
    """The announced SHA-256 in hex. Raises InvalidRequest if the header does not hold one."""
    match = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):", header or "")
    if match is None:
        raise InvalidRequest(
            f"Content-Digest is {shown(header)}: send "
            "'sha-256=:<base64 of the SHA-256 of the body>:' (RFC 9530)"
        )
    return base64.b64decode(match[1]).hex()


def check_digest(*, announced: str, received: str, num_bytes: int) -> None:
    if announced != received:
        raise DigestMismatch(
            f"the {num_bytes} bytes received have SHA-256 {received}, but Content-Digest announced "
            f"{announced}: the upload was truncated or altered; send it again"
        )


# --- write --------------------------------------------------------------------------------------


def manifest_metadata(manifest: AdapterManifest) -> dict[str, str]:
    """The safetensors metadata that makes an adapter file self-describing."""
    # safetensors writes several keys in any order: one key keeps the bytes reproducible.
    return {MANIFEST_KEY: manifest.model_dump_json()}


def file_header(manifest: AdapterManifest, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The header of a bfloat16 adapter file; the tensors' bytes follow in the order of `shapes`.

    A caller that writes them itself avoids the two copies that safetensors makes of each tensor.
    """
    entries: dict[str, Any] = {"__metadata__": manifest_metadata(manifest)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + ELEMENT_BYTES["BF16"] * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    return _encode_header(entries)


def _encode_header(entries: Mapping[str, Any]) -> bytes:
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # Aligns the tensors to 8 bytes.
    return struct.pack("<Q", len(header)) + header


def peft_config(manifest: AdapterManifest, base_model: str) -> dict[str, Any]:
    """The adapter_config.json that makes PEFT and vLLM apply the file as its manifest describes.

    Both compute scaling = lora_alpha / r.
    """
    alpha = manifest.scaling * manifest.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": manifest.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(manifest.target_modules),
        "inference_mode": True,
    }


# PEFT options that change what a LoRA computes and that no replica can serve. A falsy value is off.
_UNSERVABLE = (
    "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out",
    "trainable_token_indices", "layer_replication",
)  # fmt: skip


def from_peft(folder: Path, policy: PolicyId, base: BaseIdentity) -> bytes:
    """The adapter file for `policy` on `base`: the tensors of a PEFT folder under a new header.

    Raises InvalidAdapter if the folder is not a PEFT adapter, or no replica can serve it.
    """
    try:
        with (folder / ADAPTER_CONFIG).open("rb") as file:
            config = json.loads(file.read(MAX_HEADER_BYTES))
        path = folder / ADAPTER_WEIGHTS
        header, first_byte = _header_json(path)
        tensors = path.read_bytes()[first_byte:]
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidAdapter(
            f"{folder} is not a PEFT adapter with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} "
            f"({error}): save the adapter there with model.save_pretrained()"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InvalidAdapter(f"{folder} is not a LoRA adapter: replicas serve only LoRA adapters")
    for name in _UNSERVABLE:
        if config.get(name):
            raise InvalidAdapter(
                f"{folder} was trained with {name}: a replica serves LoRA adapters with one rank "
                "and one scaling for all modules, without DoRA, biases or saved modules"
            )
    if (bias := config.get("bias", "none")) != "none":
        raise InvalidAdapter(
            f"{folder} was trained with bias={shown(bias)}, which no replica serves: train it with "
            "bias='none'"
        )
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _tensor_info(name, entry, first_byte=0)  # The new header ends at a multiple of 8.
    leaves = {name.partition(".lora_")[0].rpartition(".")[2] for name in header}
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        manifest = AdapterManifest(
            policy=policy,
            base=base,
            rank=rank,
            scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
            target_modules=tuple(sorted(leaves)),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InvalidAdapter(
            f"{folder} has no usable r and lora_alpha in {ADAPTER_CONFIG}, or no usable names of "
            f"tensors in {ADAPTER_WEIGHTS}: save the adapter again"
        ) from error
    return _encode_header({"__metadata__": manifest_metadata(manifest), **header}) + tensors


# --- read and check -----------------------------------------------------------------------------


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidAdapter(f"the safetensors header has the key {shown(key)} twice")
        found[key] = value
    return found


def _header_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset at which the tensors' bytes begin."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise InvalidAdapter(f"a body of {num_bytes} bytes is not a safetensors file")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise InvalidAdapter(
                f"the safetensors header claims {header_bytes} bytes, but the limit is "
                f"{MAX_HEADER_BYTES}: the file is not an adapter, or not a safetensors file"
            )
        raw = file.read(header_bytes)
    if raw.count(b"{") + raw.count(b"[") > _MAX_CONTAINERS:  # They are what takes time to parse.
        raise InvalidAdapter(
            f"the safetensors header has more than {_MAX_CONTAINERS} objects and lists, of which a "
            "tensor needs three: the file is not an adapter"
        )
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicate_keys)
    except (ValueError, RecursionError) as error:  # RecursionError: hostile, deeply nested JSON.
        raise InvalidAdapter(f"the body is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise InvalidAdapter("the body is not a safetensors file: its header is not an object")
    return header, 8 + header_bytes


def _parse_manifest(metadata: Any) -> AdapterManifest:
    text = metadata.get(MANIFEST_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str) or len(text) > _MAX_MANIFEST_BYTES:
        raise InvalidAdapter(
            f"the safetensors metadata has no {MANIFEST_KEY!r} of at most {_MAX_MANIFEST_BYTES} "
            "characters: write the file with an AdapterManifest (shared/schemas.py) in its metadata"
        )
    try:
        return AdapterManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        if first["type"] == "extra_forbidden":
            raise InvalidAdapter(
                f"the manifest has the unsupported field {shown(field)}: an adapter has one rank "
                "and one scaling for all its modules, and no DoRA, biases or saved modules"
            ) from error
        raise InvalidAdapter(
            f"manifest field {shown(field)} is {shown(first.get('input'))}: {first['msg']}"
        ) from error


def _tensor_info(name: str, entry: Any, first_byte: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [start, end]} if len(
            sizes
        ) <= _MAX_DIMENSIONS and all(map(_is_size, (*sizes, start, end))):
            shape = tuple(sizes)
        case _:
            raise InvalidAdapter(
                f"the header entry of tensor {shown(name)} is malformed: it needs a dtype, a shape "
                f"of at most {_MAX_DIMENSIONS} sizes, and the two data_offsets"
            )
    if dtype not in ELEMENT_BYTES:
        raise InvalidAdapter(
            f"tensor {shown(name)} has dtype {dtype:.16}: write it as one of "
            f"{', '.join(ELEMENT_BYTES)}"
        )
    if end - start != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise InvalidAdapter(
            f"tensor {shown(name)} of shape {list(shape)} and dtype {dtype} spans {end - start} "
            "bytes: shape, dtype and data_offsets contradict each other"
        )
    if (first_byte + start) % ELEMENT_BYTES[dtype]:
        raise InvalidAdapter(
            f"tensor {shown(name)} of dtype {dtype} starts at byte {first_byte + start}, which is "
            f"not a multiple of {ELEMENT_BYTES[dtype]}: pad the header with spaces, and put wide "
            "dtypes first"
        )
    return TensorInfo(dtype, shape, first_byte + start, first_byte + end)


def _is_size(value: object) -> bool:
    """Whether it is an integer that 64 bits hold, as safetensors has them: no float, no bool."""
    return type(value) is int and 0 <= value <= _MAX_INT64


def read_header(path: Path) -> AdapterHeader:
    """Parse the header of an adapter file without trusting it. Raises InvalidAdapter."""
    header, first_byte = _header_json(path)
    manifest = _parse_manifest(header.pop("__metadata__", None))
    tensors = {name: _tensor_info(name, entry, first_byte) for name, entry in header.items()}
    return AdapterHeader(manifest, tensors)


def expected_shapes(
    manifest: AdapterManifest, linear_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Tensor name -> shape of a complete adapter. `linear_shapes` maps module path -> (out, in).

    Raises InvalidAdapter for a target module that the base does not have.
    """
    shapes: dict[str, tuple[int, int]] = {}
    leaves = {path.rpartition(".")[2] for path in linear_shapes}
    for target in manifest.target_modules:
        if target not in leaves or target not in LINEAR_MODULES:
            supported = [name for name in LINEAR_MODULES if name in leaves]
            raise InvalidAdapter(
                f"target module {shown(target)} cannot be served: choose from "
                f"{', '.join(supported)}"
            )
    for path, (num_out, num_in) in linear_shapes.items():
        if path.rpartition(".")[2] in manifest.target_modules:
            shapes[f"base_model.model.{path}.lora_A.weight"] = (manifest.rank, num_in)
            shapes[f"base_model.model.{path}.lora_B.weight"] = (num_out, manifest.rank)
    return shapes


def check_tensors(header: AdapterHeader, linear_shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InvalidAdapter unless the tensors are exactly those that the manifest describes."""
    expected = expected_shapes(header.manifest, linear_shapes)
    _refuse("has no tensor", sorted(expected.keys() - header.tensors.keys()))
    _refuse("has an unexpected tensor", sorted(header.tensors.keys() - expected.keys()))
    for name, info in header.tensors.items():
        if info.shape != expected[name]:
            raise InvalidAdapter(
                f"tensor {name!r} has shape {list(info.shape)}, but this base and rank "
                f"{header.manifest.rank} need {list(expected[name])}"
            )


def _refuse(problem: str, names: list[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise InvalidAdapter(f"the adapter {problem} {shown(names[0])}{more}")
