"""The adapter file, checked by hand on files of a few bytes."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.adapters import (
    ELEMENT_BYTES,
    MANIFEST_KEY,
    AdapterHeader,
    TensorInfo,
    check_digest,
    check_tensors,
    content_digest,
    expected_shapes,
    from_peft,
    manifest_metadata,
    parse_content_digest,
    peft_config,
    read_header,
)
from shared.errors import DigestMismatch, InvalidAdapter, InvalidRequest, ServiceError
from shared.schemas import AdapterManifest, BaseIdentity, PolicyId

BASE = BaseIdentity(weights="0" * 64, recipe=None, tokenizer="1" * 64, chat_template=None)
POLICY = PolicyId(run_id="run", version=1)
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
LINEAR_SHAPES = {Q_PROJ: (4, 6), UP_PROJ: (12, 6)}
EMPTY_SHA256 = "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"  # Empty body (RFC 9530).


def manifest(**fields: Any) -> AdapterManifest:
    defaults = {"rank": 2, "scaling": 2.0, "target_modules": ("q_proj",)}
    return AdapterManifest(policy=POLICY, base=BASE, **{**defaults, **fields})


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b"" if isinstance(header, bytes) else b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(*shape: int, dtype: str = "F32", start: int = 0, end: int | None = None) -> object:
    num_bytes = 4
    for size in shape:
        num_bytes *= size
    offsets = [start, start + num_bytes if end is None else end]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}


def changed(**fields: object) -> dict[str, str]:
    """The metadata of a manifest with other values, of any type and size."""
    return {MANIFEST_KEY: json.dumps(manifest().model_dump(mode="json") | fields)}


def num_bytes(error: ServiceError) -> int:
    """Of the answer to a client."""
    return len(json.dumps(error.to_problem(), ensure_ascii=False).encode())


# --- digest -------------------------------------------------------------------------------------


def test_the_digest_header_has_the_form_of_rfc_9530() -> None:
    assert content_digest(hashlib.sha256(b"").digest()) == EMPTY_SHA256


def test_the_announced_digest_is_read_back_in_hex() -> None:
    assert parse_content_digest(EMPTY_SHA256) == hashlib.sha256(b"").hexdigest()
    assert parse_content_digest(f"md5=:AAAA:, {EMPTY_SHA256}") == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "sha-256",
        "sha-256=47DEQpj8HBSa",
        "sha-256=:AAAA:",
        "sha-256=:abcde:",
        "sha-256=::",
        "sha-512=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:",
        "xsha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:",
    ],
)
def test_a_header_that_is_not_a_sha_256_is_refused_and_quoted(header: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_content_digest(header)
    assert repr(header) in refused.value.detail


def test_a_body_that_differs_from_its_announced_digest_is_refused() -> None:
    check_digest(announced="ab", received="ab", num_bytes=1)
    with pytest.raises(DigestMismatch, match="the 7 bytes received have SHA-256 cd"):
        check_digest(announced="ab", received="cd", num_bytes=7)


# --- header -------------------------------------------------------------------------------------


def test_the_manifest_and_the_tensor_table_are_read(tmp_path: Path) -> None:
    name = f"base_model.model.{Q_PROJ}.lora_A.weight"
    path = write(
        tmp_path / "a",
        {"__metadata__": manifest_metadata(manifest()), name: entry(2, 6)},
        bytes(48),
    )
    header = read_header(path)
    assert header.manifest == manifest()
    size = path.stat().st_size
    assert header.tensors == {name: TensorInfo("F32", (2, 6), start=size - 48, end=size)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a body of 0 bytes"),
        (b"1234567", "a body of 7 bytes"),
        (struct.pack("<Q", 1 << 40), "the limit is 1048576"),
        (struct.pack("<Q", 2) + b"{]", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 2) + b"{}", "has no 'tandem_manifest'"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "the key 'a' twice"),
        (struct.pack("<Q", 90010) + b'{"a":[' + b"{}," * 30000 + b"0]}", "more than 30000 objects"),
        (struct.pack("<Q", 20000) + b"[" * 20000, "not a safetensors file"),
        (struct.pack("<Q", 5006) + b'{"a":' + b"9" * 5000 + b"}", "not a safetensors file"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else None,
)
def test_a_file_that_is_not_safetensors_is_refused(
    content: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(InvalidAdapter, match=says):
        read_header(path)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (None, "'t' is malformed"),
        ({}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [1]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 4]}, "'t' is malformed"),
        (entry(2, 6, dtype="F64"), "dtype F64: write it as one of BF16, F16, F32"),
        (entry(2, 6, end=47), r"shape \[2, 6\] and dtype F32 spans 47 bytes"),
        (entry(2, 6, dtype="BF16"), "dtype BF16 spans 48 bytes"),
        (entry(-2, -6, end=48), "'t' is malformed"),
        # Fault S8: their product took seconds, and the answer held its digits.
        ({"dtype": "F32", "shape": [1e308] * 4000, "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [10**308] * 1000, "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [1] * 4000, "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "F32", "shape": [2**62] * 8, "data_offsets": [0, 4]}, "spans 4 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 10**400]}, "'t' is malformed"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "'t' is malformed"),
        ({"dtype": "\ud800" * 10**5, "shape": [1], "data_offsets": [0, 4]}, "write it as one of"),
    ],
)
def test_a_tensor_entry_that_contradicts_itself_is_refused(
    tensor: object, says: str, tmp_path: Path
) -> None:
    header = {"__metadata__": manifest_metadata(manifest()), "t": tensor}
    with pytest.raises(InvalidAdapter, match=says) as refused:
        read_header(write(tmp_path / "a", header))
    assert num_bytes(refused.value) <= 4096


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, "no 'tandem_manifest'"),
        ("text", "no 'tandem_manifest'"),
        ({MANIFEST_KEY: 3}, "no 'tandem_manifest'"),
        ({MANIFEST_KEY: "{"}, "manifest field 'manifest' is"),
        ({MANIFEST_KEY: "{}"}, "manifest field 'policy'"),
        ({MANIFEST_KEY: "[" * 16000}, "manifest field 'manifest'"),
        # Fault S8: what a file holds is neither worked on nor quoted at any length.
        ({MANIFEST_KEY: " " * 20000}, "no 'tandem_manifest' of at most 16384 characters"),
        (changed(**{"x" * 15000: 1}), "the unsupported field 'xxx"),
        (changed(rank=10**400), "'rank' is <integer of 1329 bits>: "),
        (changed(scaling=-(10**300)), "'scaling' is "),
        (changed(target_modules=["q_proj"] * 1100), "'target_modules' is .* at most 1024 items"),
        (changed(target_modules=["q_proj" * 100]), "'target_modules.0' is .* at most 256 char"),
        (changed(format="\n" * 7000), "manifest field 'format' is "),
    ],
)
def test_metadata_without_a_manifest_is_refused(
    metadata: object, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapter, match=says) as refused:
        read_header(write(tmp_path / "a", {"__metadata__": metadata}))
    assert num_bytes(refused.value) <= 4096


def cpu_s(work: Callable[[], object]) -> float:
    """CPU time of the fastest of some calls, which other processes do not change."""

    def once() -> float:
        started = time.thread_time()
        work()
        return time.thread_time() - started

    return min(once() for _ in range(3))


def test_eight_times_as_many_keys_are_not_64_times_the_work(tmp_path: Path) -> None:
    """Fault S8: which key is there twice was found by counting each of them."""

    def refuse(num_keys: int) -> None:
        keys = [*range(num_keys - 1), num_keys - 2]
        table = ",".join(f'"{key:07}":0' for key in keys).encode()
        with pytest.raises(InvalidAdapter, match=f"the key '{num_keys - 2:07}' twice"):
            read_header(write(tmp_path / "a", b"{" + table + b"}"))

    assert cpu_s(lambda: refuse(64_000)) < 32 * cpu_s(lambda: refuse(8_000))


def test_many_long_names_are_refused_in_one_short_sentence(tmp_path: Path) -> None:
    """Fault S8: the answer had a megabyte."""
    names = [f"{i:01000}" for i in range(900)]
    header = {"__metadata__": manifest_metadata(manifest())} | dict.fromkeys(names, entry(0))
    with pytest.raises(InvalidAdapter, match=r"has no tensor .* \(and 1 more\)") as refused:
        check_tensors(read_header(write(tmp_path / "a", header)), LINEAR_SHAPES)
    assert num_bytes(refused.value) <= 4096
    surplus = dict.fromkeys(names, TensorInfo("F32", (0,), 0, 0))
    with pytest.raises(
        InvalidAdapter, match=r"an unexpected tensor .* \(and 899 more\)"
    ) as refused:
        check_tensors(AdapterHeader(manifest(), {**complete().tensors, **surplus}), LINEAR_SHAPES)
    assert num_bytes(refused.value) <= 4096


@pytest.mark.parametrize(
    ("config", "names", "says"),
    [
        (
            {"r": 10**400, "lora_alpha": 16},
            ["a.q_proj.lora_A.weight"],
            "no usable r and lora_alpha",
        ),
        ({"r": 8, "lora_alpha": 10**400}, ["a.q_proj.lora_A.weight"], "no usable r and lora_alpha"),
        ({"r": 0, "lora_alpha": 1}, ["a.q_proj.lora_A.weight"], "no usable r and lora_alpha"),
        (
            {"r": 8, "lora_alpha": 16},
            [f"a.m{i}.lora_A.weight" for i in range(1100)],
            "names of ten",
        ),
        ({"r": 8, "lora_alpha": 16, "bias": "x" * 9999}, [], r"with bias='xxx"),
    ],
)
def test_a_peft_folder_with_extreme_values_is_refused(
    config: dict[str, object], names: list[str], says: str, tmp_path: Path
) -> None:
    """Fault S8, where a downloaded adapter is pushed: some ended in an OverflowError."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    write(tmp_path / "adapter_model.safetensors", dict.fromkeys(names, entry(0)))
    with pytest.raises(InvalidAdapter, match=says) as refused:
        from_peft(tmp_path, POLICY, BASE)
    assert num_bytes(refused.value) <= 4096


@pytest.mark.parametrize(("padding", "dtype"), [(1, "BF16"), (2, "F32")])
def test_a_misaligned_tensor_is_refused(tmp_path: Path, padding: int, dtype: str) -> None:
    """safetensors reads such a file, but its bytes on a GPU cannot be viewed as a tensor."""
    name, size = f"base_model.model.{Q_PROJ}.lora_A.weight", 12 * ELEMENT_BYTES[dtype]
    entry = {"dtype": dtype, "shape": [2, 6], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": manifest_metadata(manifest()), name: entry}).encode()
    path = write(tmp_path / "a", header + b" " * (-len(header) % 8 + padding), bytes(size))
    with pytest.raises(InvalidAdapter, match=f"not a multiple of {ELEMENT_BYTES[dtype]}"):
        read_header(path)


# --- tensors ------------------------------------------------------------------------------------


def complete(**fields: Any) -> AdapterHeader:
    shapes = expected_shapes(manifest(**fields), LINEAR_SHAPES)
    tensors = {name: TensorInfo("BF16", shape, 0, 0) for name, shape in shapes.items()}
    return AdapterHeader(manifest(**fields), tensors)


def test_an_adapter_of_one_module_has_two_tensors() -> None:
    assert expected_shapes(manifest(rank=3), LINEAR_SHAPES) == {
        f"base_model.model.{Q_PROJ}.lora_A.weight": (3, 6),
        f"base_model.model.{Q_PROJ}.lora_B.weight": (4, 3),
    }


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "v_proj", "layers.0.q_proj"])
def test_a_target_that_the_base_does_not_have_is_refused(target: str) -> None:
    with pytest.raises(
        InvalidAdapter, match=f"'{target}' cannot be served: choose from q_proj, up"
    ):
        expected_shapes(manifest(target_modules=(target,)), LINEAR_SHAPES)


def test_a_complete_adapter_passes() -> None:
    check_tensors(complete(target_modules=("q_proj", "up_proj")), LINEAR_SHAPES)


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    header = complete()
    first, second = sorted(header.tensors)
    without = AdapterHeader(header.manifest, {first: header.tensors[first]})
    with pytest.raises(InvalidAdapter, match=f"has no tensor '{second}'$"):
        check_tensors(without, LINEAR_SHAPES)
    surplus = AdapterHeader(header.manifest, {**header.tensors, "x": TensorInfo("F32", (1,), 0, 0)})
    with pytest.raises(InvalidAdapter, match=r"has an unexpected tensor 'x'$"):
        check_tensors(surplus, LINEAR_SHAPES)
    thin = AdapterHeader(
        header.manifest, {**header.tensors, first: TensorInfo("F32", (1, 6), 0, 0)}
    )
    with pytest.raises(InvalidAdapter, match=r"has shape \[1, 6\], .* rank 2 need \[2, 6\]"):
        check_tensors(thin, LINEAR_SHAPES)


@pytest.mark.parametrize(("scaling", "alpha"), [(2.0, 4), (0.5, 1), (1.25, 2.5)])
def test_peft_gets_an_alpha_so_that_alpha_over_rank_is_the_scaling(
    scaling: float, alpha: float
) -> None:
    config = peft_config(manifest(scaling=scaling), "base")
    assert (config["r"], config["lora_alpha"]) == (2, alpha)
    assert config["lora_alpha"] / config["r"] == scaling
