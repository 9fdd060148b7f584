"""The exact base: what bitsandbytes makes of the source, and whose weights these are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.rollout.base import Base, prepare_base
from shared.model_folder import base_identity, identity_difference, linear_shapes, weight_files
from shared.schemas import QuantizationRecipe

RECIPE = QuantizationRecipe()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= load_file(file)
    return tensors


def nf4_round_trip(weight: Tensor) -> Tensor:
    """What QLoRA computes with: bf16 -> NF4 with double quantization -> bf16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    plain: Tensor = dequantize_4bit(packed, state)
    return plain.to(torch.bfloat16)


def prepare(source: Path, cache_dir: Path, *, exact: bool = True) -> Base:
    return prepare_base(str(source), exact=exact, cache_dir=cache_dir, device="cpu")


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, base_cache: Path) -> Base:
    return prepare(tiny_checkpoint, base_cache)


@pytest.fixture
def copied_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def quantized_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as somebody else saved it in 4 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from services.base_model import quantized_load_options

    folder = tmp_path_factory.mktemp("quantized") / "tiny-bnb-4bit"
    options = quantized_load_options(tiny_checkpoint, "cpu")
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


def test_every_decoder_linear_is_the_nf4_round_trip_of_the_source(
    base: Base, tiny_checkpoint: Path
) -> None:
    source, served = tensors_of(tiny_checkpoint), tensors_of(base.path)
    linears = [f"{path}.weight" for path in linear_shapes(tiny_checkpoint)]
    assert len(linears) == 4 * 7
    for name in linears:
        assert torch.equal(served[name], nf4_round_trip(source[name]))
        assert not torch.equal(served[name], source[name])


def test_head_embeddings_and_norms_stay_as_they_are(base: Base, tiny_checkpoint: Path) -> None:
    source, served = tensors_of(tiny_checkpoint), tensors_of(base.path)
    assert served.keys() == source.keys()
    others = served.keys() - {f"{path}.weight" for path in linear_shapes(tiny_checkpoint)}
    assert len(others) == 2 + 2 * 4 + 1  # head, embeddings, two norms per layer, the last norm
    for name in others:
        assert served[name].dtype == torch.bfloat16
        assert torch.equal(served[name], source[name])


def test_the_served_checkpoint_is_an_ordinary_bf16_model(base: Base, tiny_checkpoint: Path) -> None:
    config = json.loads((base.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (base.path / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_the_shapes_of_the_linears_are_out_by_in(base: Base) -> None:
    assert base.linear_shapes["model.layers.0.self_attn.k_proj"] == (64, 128)
    assert base.linear_shapes["model.layers.3.mlp.down_proj"] == (128, 384)


def test_the_second_time_nothing_is_built(base: Base, tiny_checkpoint: Path) -> None:
    cache_dir = base.path.parent.parent
    built = (base.path / "config.json").stat().st_mtime_ns
    again = prepare(tiny_checkpoint, cache_dir)
    assert again == base
    assert (again.path / "config.json").stat().st_mtime_ns == built
    assert list((cache_dir / "bases").iterdir()) == [base.path]


def test_a_moved_checkpoint_hits_the_same_cache(base: Base, copied_checkpoint: Path) -> None:
    moved = prepare(copied_checkpoint, base.path.parent.parent)
    assert (moved.path, moved.identity) == (base.path, base.identity)


def test_original_serves_the_source_folder(tiny_checkpoint: Path, base: Base) -> None:
    original = prepare(tiny_checkpoint, base.path.parent.parent, exact=False)
    assert original.path == tiny_checkpoint
    assert original.identity.recipe is None
    assert original.identity.weights == base.identity.weights
    exact, sixteen_bit = base.identity, original.identity
    assert identity_difference(replica=sixteen_bit, trainer=exact) is None
    difference = identity_difference(replica=exact, trainer=sixteen_bit)
    assert difference
    assert difference.startswith("recipe")


def test_one_weight_byte_is_another_base(tiny_checkpoint: Path, copied_checkpoint: Path) -> None:
    file = copied_checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ours, theirs = (base_identity(path, RECIPE) for path in (tiny_checkpoint, copied_checkpoint))
    assert ours.weights != theirs.weights
    assert (ours.recipe, ours.tokenizer, ours.chat_template) == (
        theirs.recipe,
        theirs.tokenizer,
        theirs.chat_template,
    )


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat_template"),
    ],
)
def test_another_tokenizer_or_template_is_another_base(
    file: str, field: str, tiny_checkpoint: Path, copied_checkpoint: Path
) -> None:
    path = copied_checkpoint / file
    path.write_text(path.read_text() + " ")
    ours, theirs = (base_identity(path, RECIPE) for path in (tiny_checkpoint, copied_checkpoint))
    difference = identity_difference(ours, theirs)
    assert difference
    assert difference.startswith(field)


def test_a_re_saved_config_is_the_same_base(tiny_checkpoint: Path, copied_checkpoint: Path) -> None:
    path = copied_checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "0.0", "use_cache": False}))
    assert base_identity(tiny_checkpoint, RECIPE) == base_identity(copied_checkpoint, RECIPE)


def test_another_rope_is_another_base(tiny_checkpoint: Path, copied_checkpoint: Path) -> None:
    path = copied_checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 5e5}}))
    ours, theirs = (base_identity(path, RECIPE) for path in (tiny_checkpoint, copied_checkpoint))
    assert ours.weights != theirs.weights


def test_a_4bit_checkpoint_serves_its_stored_quantization(
    base: Base, quantized_checkpoint: Path, tmp_path: Path
) -> None:
    """The stored state is what is dequantized, so both ways end in the same tensors."""
    served = tensors_of(prepare(quantized_checkpoint, tmp_path).path)
    expected = tensors_of(base.path)
    assert served.keys() == expected.keys()
    for name, tensor in served.items():
        assert torch.equal(tensor, expected[name])


def test_the_exact_base_changes_what_the_model_says(base: Base, tiny_checkpoint: Path) -> None:
    source, served = tensors_of(tiny_checkpoint), tensors_of(base.path)
    name = "model.layers.0.mlp.up_proj.weight"
    change = (served[name].float() - source[name].float()).norm() / source[name].float().norm()
    assert 0.05 < float(change) < 0.15  # NF4 keeps about 3.5 bits


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no \\*\\.safetensors"):
        prepare(tmp_path, tmp_path / "cache")


def test_a_base_that_cannot_be_built_leaves_nothing_in_the_cache(
    copied_checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((copied_checkpoint / "config.json").read_text())
    (copied_checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    with pytest.raises(ValueError, match="could not be built"):
        prepare(copied_checkpoint, tmp_path / "cache")
    assert list((tmp_path / "cache" / "bases").iterdir()) == []


def test_the_served_folder_has_the_tokenizer_and_template_of_its_identity(
    base: Base, copied_checkpoint: Path
) -> None:
    """The cache outlives an edited template: it is keyed by everything that it serves."""
    template = copied_checkpoint / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    edited = prepare(copied_checkpoint, base.path.parent.parent)
    assert edited.path != base.path
    assert base_identity(edited.path, RECIPE).chat_template == edited.identity.chat_template
