"""Values of an adapter, looked at while the file is being written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.rollout.adapter_values import ValueScan, check_values
from shared.adapters import expected_shapes, read_header
from shared.errors import InvalidAdapter
from shared.schemas import BaseIdentity, PolicyId
from tests.adapters import adapter_file, make_manifest, make_tensors

SHAPES = {f"model.layers.{i}.mlp.up_proj": (257, 33) for i in range(2)}  # odd: rows end anywhere
BASE = BaseIdentity(weights="0" * 64, recipe=None, tokenizer="0" * 64, chat_template=None)
MANIFEST = make_manifest(BASE, PolicyId(run_id="run", version=1), target_modules=("up_proj",))
NAMES = tuple(expected_shapes(MANIFEST, SHAPES))


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) for n, t in make_tensors(MANIFEST, SHAPES, seed=0).items()}


def receive(path: Path, content: bytes, piece_bytes: int) -> None:
    """As a replica does, in pieces of any size."""
    with path.open("xb") as file, ValueScan(path) as scan:
        for start in range(0, len(content), piece_bytes):
            file.write(content[start : start + piece_bytes])
            file.flush()
            scan.read_on()
    check_values(path, read_header(path), scan)


@pytest.mark.parametrize("piece_bytes", [1 << 20, 4096, 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -2000.0])
def test_one_bad_value_is_found_wherever_it_is(
    tmp_path: Path, value: float, dtype: torch.dtype, piece_bytes: int
) -> None:
    for number, (name, where) in enumerate((n, w) for n in NAMES for w in (0, 123, -1)):
        bad = tensors(dtype)
        bad[name].view(-1)[where] = value
        with pytest.raises(InvalidAdapter, match=r"NaN or Inf|may change a weight by"):
            receive(tmp_path / str(number), adapter_file(MANIFEST, bad), piece_bytes)


@pytest.mark.parametrize("piece_bytes", [1 << 20, 1, 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ordinary_values_are_let_in(tmp_path: Path, dtype: torch.dtype, piece_bytes: int) -> None:
    receive(tmp_path / "file", adapter_file(MANIFEST, tensors(dtype)), piece_bytes)


def test_a_large_value_whose_partner_is_small_is_let_in(tmp_path: Path) -> None:
    """The bound for all tensors at once is exceeded: 2 · 8 · 100², no pair's own is."""
    few = {name: torch.zeros_like(tensor) for name, tensor in tensors(torch.bfloat16).items()}
    few[NAMES[0]].fill_(100.0)
    receive(tmp_path / "file", adapter_file(MANIFEST, few), 4096)
